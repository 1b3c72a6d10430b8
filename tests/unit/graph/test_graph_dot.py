"""The DOT text: one cluster a block, every edge once, names that cannot break out of their quotes."""

import re

import pytest

from tests.unit.graph.graphs_by_hand import GraphBuilder, chain_graph, transformer_graph
from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph import Granularity, choose_cuts, to_dot


def test_small_graph_literally() -> None:
    build = GraphBuilder("two ops")
    x, w = build.input(4), build.parameter(7)
    a = build.op("linear", [x, w], 5, module="fc")
    graph = build.build(build.op("relu", [a], 5))
    expected = r"""
digraph "two ops" {
  rankdir="TB"; node [shape=box, fontname="monospace"];
  i0 [shape=ellipse, label="x0 uint8[4]"];
  subgraph cluster_0 {
    label="fc[0:1]";
    n0 [label="linear_0\nlinear\n5 B"];
  }
  subgraph cluster_1 {
    label="two ops[1:2]";
    n1 [label="relu_1\nrelu\n5 B"];
  }
  i0 -> n0 [label="x0 uint8[4]"];
  n0 -> n1 [label="v2 uint8[5]"];
  o0 [shape=ellipse, label="output 0"];
  n1 -> o0 [label="v3 uint8[5]"];
}
"""
    assert to_dot(graph, cuts=[0]) == expected.lstrip()


def test_every_block_is_a_cluster_and_every_node_in_one() -> None:
    graph = transformer_graph(3)
    cuts = choose_cuts(graph, granularity=Granularity.COARSE)
    text = to_dot(graph, cuts=cuts)
    assert len(re.findall(r"subgraph cluster_\d+ {", text)) == len(cuts) + 1
    assert sorted(map(int, re.findall(r"^    n(\d+) \[label", text, re.MULTILINE))) == list(range(len(graph.nodes)))


def test_names_are_escaped() -> None:
    build = GraphBuilder('say "hi"\\')
    graph = build.build(build.op('o"p\n\\l', [build.input(4)], 5))
    text = to_dot(graph)
    assert text.startswith('digraph "say \\"hi\\"\\\\" {')
    assert 'n0 [label="o\\"p\\n\\\\l_0\\no\\"p\\n\\\\l\\n5 B"];' in text
    quoted = re.compile(r'"(?:[^"\\\n]|\\.)*"')
    assert '"' not in quoted.sub("", text)


def test_an_input_that_is_returned_is_shown() -> None:
    build = GraphBuilder()
    x = build.input(4)
    a = build.op("op", [x], 5)
    assert 'i0 -> o0 [label="x0 uint8[4]"];' in to_dot(build.build(x, a))


def test_bad_cuts_are_refused() -> None:
    with pytest.raises(GraphError, match="leaves an empty block"):
        to_dot(chain_graph(3), cuts=[2])
