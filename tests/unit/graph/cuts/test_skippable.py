"""Ops whose results a replay does not need: nothing saved is made of them."""

from dataclasses import replace

import pytest

from tests.unit.graph.graphs_by_hand import GraphBuilder
from tinybp_lightning.graph import Graph
from tinybp_lightning.graph.cuts.products import skippable_ops

MANY = 1000


def spare(graph: Graph, start: int = 0, stop: int | None = None) -> list[str]:
    stop = len(graph.nodes) if stop is None else stop
    return [graph.nodes[n].op for n in sorted(skippable_ops(graph, start, stop))]


def two_products(build: GraphBuilder, *, in_place: bool = False) -> Graph:
    """Two products of results of their own that are read behind the block only."""
    x = build.input(10)
    a = build.reading("product", build.reading("norm", x), flops=MANY)
    b = build.reading("projection", build.reading("silu", x), flops=MANY)
    total = build.write("add_", a, [b]) if in_place else build.op("add", [a, b], 10)
    return build.build(build.reading("norm", total))


def test_products_that_meet_in_a_sum_are_spare_until_the_sum_is_saved() -> None:
    graph = two_products(GraphBuilder())
    assert spare(graph, stop=4) == ["product", "projection"]
    assert spare(graph, stop=5) == ["product", "projection", "add"]
    assert spare(graph) == ["norm"]


def test_what_is_changed_in_place_is_not_looked_into() -> None:
    graph = two_products(GraphBuilder(), in_place=True)
    assert spare(graph, stop=4) == ["product", "projection"]
    assert spare(graph, stop=5) == ["projection", "add_"]


def test_a_region_is_not_looked_into() -> None:
    build = GraphBuilder()
    x = build.input(10)
    a = build.reading("product", build.reading("norm", x), flops=MANY)
    build.flag("set_grad_enabled")
    b = build.reading("projection", build.reading("silu", x), flops=MANY)
    assert spare(build.build(build.op("add", [a, b], 10))) == ["projection", "add"]


def test_an_op_that_saves_what_it_makes_is_run() -> None:
    build = GraphBuilder()
    x = build.op("exp", [build.reading("norm", build.input(10))], 10, save_output=True)
    assert spare(build.build(x)) == []


def test_an_op_that_saves_a_copy_of_what_it_reads_has_saved_before_it_computes() -> None:
    build = GraphBuilder()
    a, b = (build.copying("linear", build.reading("silu", build.input(10)), flops=MANY) for _ in range(2))
    assert spare(build.build(build.op("add", [a, b], 10))) == ["linear", "linear", "add"]


@pytest.mark.parametrize("why", ["is_random", "is_collective"])
def test_an_op_with_effects_is_run(why: str) -> None:
    build = GraphBuilder()
    build.reading("product", build.input(10), flops=MANY)
    graph = build.build(build.reading("norm", build.input(10)))
    assert spare(graph) == ["product", "norm"]
    node = replace(graph.nodes[0], **{why: True})
    assert spare(replace(graph, nodes=(node, graph.nodes[1]))) == ["norm"]


def test_an_op_that_writes_a_buffer_is_run() -> None:
    build = GraphBuilder()
    buffer = build.parameter()
    build.reading("norm", build.input(10))
    graph = build.build(build.reading("norm", build.input(10)))
    node = replace(graph.nodes[0], writes=(build.storage_of(buffer),))
    assert spare(replace(graph, nodes=(node, graph.nodes[1]))) == ["norm"]


def test_a_view_of_a_spare_result_is_spare() -> None:
    build = GraphBuilder()
    x = build.input(10)
    made = build.reading("product", build.reading("norm", x), flops=MANY)
    seen = build.view("view", made, 10)
    build.reading("norm", x)
    graph = build.build(build.op("add", [seen, x], 10))
    assert spare(graph, stop=4) == ["product", "view", "norm"]
    build = GraphBuilder()
    made = build.reading("product", build.reading("norm", build.input(10)), flops=MANY)
    graph = build.build(build.reading("exp", build.view("view", made, 10)))
    assert spare(graph) == ["exp"]
