"""Signatures forget names, places and which weights; they see everything that a block's cost depends on."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given

from tests.unit.graph.graphs_by_hand import LAYER_OPS, GraphBuilder, transformer_graph
from tests.unit.graph.strategies_graph import graphs
from tinybp_lightning.graph import (
    Graph,
    StorageId,
    StorageKind,
    ValueId,
    block_signature,
    frontier_profile,
    graph_signature,
    layout_signature,
)


def layer_signatures(graph: Graph, num_layers: int) -> list[str]:
    starts = [2 + LAYER_OPS * layer for layer in range(num_layers)]
    return [block_signature(graph, start, start + LAYER_OPS) for start in starts]


def test_layers_of_a_stack_are_equal() -> None:
    graph = transformer_graph(4)
    assert len(set(layer_signatures(graph, 4))) == 1
    assert layer_signatures(transformer_graph(2), 2)[0] == layer_signatures(graph, 4)[0]
    assert layer_signatures(transformer_graph(2, hidden=8), 2)[0] != layer_signatures(graph, 4)[0]


def renamed(graph: Graph) -> Graph:
    return replace(
        graph,
        name="other",
        nodes=tuple(replace(node, name="n", module="m") for node in graph.nodes),
        values=tuple(replace(value, name="v") for value in graph.values),
    )


@given(graphs())
def test_names_do_not_count(graph: Graph) -> None:
    assert graph_signature(graph) == graph_signature(renamed(graph))
    assert block_signature(graph, 0, len(graph.nodes)) == block_signature(renamed(graph), 0, len(graph.nodes))


@given(graphs())
def test_lives_given_or_computed_make_no_difference(graph: Graph) -> None:
    lives = frontier_profile(graph).value_lives
    assert block_signature(graph, 0, 1) == block_signature(graph, 0, 1, value_lives=lives)


def base() -> Graph:
    """`op(x, w)`, then `op(a, w)`, whose result is returned."""
    build = GraphBuilder()
    x, w = build.input(4), build.parameter(4)
    a = build.op("op", [x, w], 4, save_output=True)
    return build.build(build.op("op", [a, w], 4))


def with_last_node(**changes: object) -> Graph:
    graph = base()
    return replace(graph, nodes=(*graph.nodes[:-1], replace(graph.nodes[-1], **changes)))


def with_last_value(**changes: object) -> Graph:
    graph = base()
    return replace(graph, values=(*graph.values[:-1], replace(graph.values[-1], **changes)))


def with_storage_of(value: int, **changes: object) -> Graph:
    graph = base()
    storages = tuple(replace(s, **changes) if s.id == graph.values[value].storage else s for s in graph.storages)
    return replace(graph, storages=storages)


DIFFERENT = {
    "op": with_last_node(op="other"),
    "dataflow": with_last_node(reads=(ValueId(2), ValueId(2))),
    "other input": with_last_node(reads=(ValueId(2), ValueId(0))),
    "argument order": with_last_node(reads=(ValueId(1), ValueId(2))),
    "writes": with_last_node(writes=(StorageId(2),)),
    "saved": with_last_node(saved=(StorageId(2),)),
    "copies": with_last_node(saved=(StorageId(2),), copies=((StorageId(2), StorageId(2)),)),
    "flops": with_last_node(flops=3),
    "random": with_last_node(is_random=True),
    "collective": with_last_node(is_collective=True),
    "shape": with_last_value(shape=(2, 2)),
    "dtype": with_last_value(dtype="int8"),
    "requires_grad": with_last_value(requires_grad=False),
    "alias": with_last_value(storage=StorageId(2)),
    "no tensor": with_last_value(storage=None),
    "storage size": with_storage_of(3, size_bytes=8),
    "storage kind": with_storage_of(1, kind=StorageKind.BUFFER),
    "outputs": replace(base(), outputs=(ValueId(3), ValueId(2))),
}


@pytest.mark.parametrize("graph", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_each_difference_shows(graph: Graph) -> None:
    assert graph_signature(graph) != graph_signature(base())
    assert block_signature(graph, 0, 2) != block_signature(base(), 0, 2)


def test_graph_signature_sees_unread_inputs() -> None:
    build = GraphBuilder()
    x = build.input(4)
    a = build.op("op", [x], 4)
    without = build.build(a)
    build.input(9)
    assert graph_signature(build.build(a)) != graph_signature(without)


def test_tied_weights_are_not_two_weights() -> None:
    def two_ops(*, tied: bool) -> Graph:
        build = GraphBuilder()
        x, w = build.input(4), build.parameter(4)
        other = w if tied else build.parameter(4)
        return build.build(build.op("op", [build.op("op", [x, w], 4), other], 4))

    assert block_signature(two_ops(tied=True), 0, 2) != block_signature(two_ops(tied=False), 0, 2)


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from tests.unit.graph.graphs_by_hand import transformer_graph\n"
        "from tinybp_lightning.graph import graph_signature\n"
        "print(graph_signature(transformer_graph(2)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert printed == graph_signature(transformer_graph(2))
    assert len(printed) == 32


def test_a_layout_has_no_sizes() -> None:
    small, large = transformer_graph(2), transformer_graph(2, hidden=8)
    assert graph_signature(small) != graph_signature(large)
    assert layout_signature(small) == layout_signature(large)
    assert layout_signature(small) != layout_signature(transformer_graph(3))


@given(graphs())
def test_a_layout_sees_all_but_sizes(graph: Graph) -> None:
    assert layout_signature(graph) == layout_signature(renamed(graph))
    grown = replace(graph, storages=tuple(replace(s, size_bytes=s.size_bytes + 1) for s in graph.storages))
    assert layout_signature(grown) == layout_signature(graph)
    other = replace(graph, nodes=tuple(replace(node, op=f"{node.op}_") for node in graph.nodes))
    assert layout_signature(other) != layout_signature(graph)
    wider = replace(graph, values=tuple(replace(v, shape=(*v.shape, 1)) for v in graph.values))
    assert layout_signature(wider) != layout_signature(graph)
