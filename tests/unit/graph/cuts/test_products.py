"""Blocks are cut behind compute-heavy ops that a replay would repeat; it skips ops of which nothing saved is made."""

from dataclasses import replace

import pytest

from tests.unit.graph.graphs_by_hand import GraphBuilder, transformer_graph
from tinybp_lightning.graph import Graph
from tinybp_lightning.graph.cuts.products import cut_behind_products, saved_bytes, skippable_ops
from tinybp_lightning.graph.frontier import frontier_profile

MANY = 1000


def cuts_of(graph: Graph, *cuts: int) -> tuple[int, ...]:
    return cut_behind_products(graph, frontier_profile(graph), cuts)


def two_convolutions(*, flops: tuple[int, int] = (MANY, MANY)) -> Graph:
    """`norm, silu, conv` twice, between two ops on either side."""
    build = GraphBuilder()
    x = build.input(10)
    x = build.reading("relu", build.reading("relu", x))
    for count in flops:
        x = build.reading("norm", x)
        x = build.reading("conv", build.reading("silu", x), flops=count)
    return build.build(build.reading("relu", build.reading("relu", x)))


def test_a_block_is_cut_behind_the_product_in_its_middle() -> None:
    assert cuts_of(two_convolutions(), 1, 7) == (1, 4, 7)


def test_a_block_that_ends_with_its_product_stays() -> None:
    assert cuts_of(two_convolutions(), 1, 4, 7) == (1, 4, 7)


def test_a_product_of_few_operations_is_not_worth_a_block() -> None:
    assert cuts_of(two_convolutions(flops=(1, MANY)), 1, 7) == (1, 7)
    assert cuts_of(two_convolutions(flops=(MANY, 1)), 1, 7) == (1, 4, 7)


def test_without_operations_nothing_is_known_of_products() -> None:
    graph = transformer_graph(2)
    assert cuts_of(graph, 3, 9) == (3, 9)


def test_a_product_that_saves_its_own_result_is_repeated_anyway() -> None:
    build = GraphBuilder()
    x = build.reading("relu", build.reading("relu", build.input(10)))
    x = build.op("attention", [x], 10, save_output=True, flops=MANY)
    x = build.reading("norm", build.reading("norm", x))
    assert cuts_of(build.build(x)) == ()


def test_products_of_one_tensor_stay_together() -> None:
    """What all three read is saved by the first: a replay stops there."""
    build = GraphBuilder()
    x = build.reading("norm", build.reading("norm", build.input(10)))
    q, k, v = (build.reading("linear", x, flops=MANY) for _ in range(3))
    x = build.op("attention", [q, k, v], 10, saved=[build.storage_of(t) for t in (q, k, v)], save_output=True)
    x = build.op("add", [x], 10)
    assert cuts_of(build.build(x)) == (4,)


def test_a_cut_just_behind_a_product_moves_to_it() -> None:
    build = GraphBuilder()
    x = build.reading("linear", build.reading("norm", build.input(10)), flops=MANY)
    x = build.reading("silu", x)
    x = build.op("norm", [build.reading("norm", x)], 10)
    graph = build.build(x)
    assert cuts_of(graph, 2) == (1,)


def test_a_narrower_cut_just_behind_a_product_stays() -> None:
    build = GraphBuilder()
    x = build.reading("linear", build.reading("norm", build.input(10)), flops=MANY)
    x = build.reading("pool", x, size=5)
    x = build.op("norm", [build.reading("norm", x)], 10)
    assert cuts_of(build.build(x), 2) == (2,)


def three_products(*, last_size: int = 10) -> Graph:
    """`norm, norm`, three products of its result, and what saves theirs."""
    build = GraphBuilder()
    x = build.reading("norm", build.reading("norm", build.input(10)))
    q, k = (build.copying("linear", x, flops=MANY) for _ in range(2))
    v = build.copying("linear", x, size=last_size, flops=MANY)
    return build.build(build.op("mul", [build.reading("silu", t) for t in (v, k, q)], 10))


def test_a_cut_just_before_a_product_moves_behind_it() -> None:
    assert cuts_of(three_products(), 3) == (4,)
    assert cuts_of(three_products(last_size=30), 3) == (3,), "it is wider there"


def test_cuts_on_both_sides_of_a_product_become_one() -> None:
    assert cuts_of(three_products(), 3, 5) == (4,)
    assert cuts_of(three_products(), 3, 6) == (4, 6)


def test_a_cut_before_a_product_whose_block_would_repeat_another_stays() -> None:
    """The second product saves what the first one made."""
    build = GraphBuilder()
    x = build.reading("norm", build.reading("norm", build.input(10)))
    second = build.copying("linear", build.copying("linear", x, flops=MANY), flops=MANY)
    x = build.op("norm", [build.reading("silu", second)], 10)
    assert cuts_of(build.build(x), 2) == (2,)


@pytest.mark.parametrize(("num_layers", "is_cut_finer"), [(20, True), (60, False)])
def test_a_long_chain_gets_no_more_blocks_but_its_cuts_are_moved(num_layers: int, *, is_cut_finer: bool) -> None:
    build = GraphBuilder()
    x = build.input(10)
    for _ in range(num_layers):
        x = build.reading("conv", build.reading("norm", x), flops=MANY)
        x = build.reading("conv", build.reading("norm", x), flops=MANY)
        x = build.reading("silu", x)
    graph = build.build(build.reading("norm", build.reading("norm", x)))
    behind_layers = [5 * layer + 4 for layer in range(num_layers)]
    found = cuts_of(graph, *behind_layers)
    assert {cut - 1 for cut in behind_layers} <= set(found)
    assert not {*behind_layers} & set(found)
    assert len(found) == (2 if is_cut_finer else 1) * num_layers


def test_what_is_saved_is_counted_once_and_without_parameters() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(7))
    x = build.reading("mul", build.reading("linear", x, build.parameter(100)), x)
    assert saved_bytes(build.build(x)) == 20


def test_a_cut_behind_a_product_takes_in_another_that_is_read_with_it() -> None:
    """A time embedding's projection, beside a convolution: neither is repeated, and there is one block for both."""
    build = GraphBuilder()
    embedding = build.input(1)
    x = build.reading("norm", build.reading("norm", build.input(100), size=100), size=100)
    x = build.reading("conv", x, size=100, flops=MANY)
    projection = build.reading("linear", build.reading("silu", embedding, size=1), size=1, flops=1)
    x = build.op("add", [x, projection], 100)
    x = build.reading("norm", build.reading("norm", x, size=100), size=100)
    assert cuts_of(build.build(x)) == (4,)


def test_a_cut_is_behind_the_last_product_that_is_as_heavy_even_where_that_is_wider() -> None:
    """A gate and the way up: cut between them, one of the two would be repeated."""
    build = GraphBuilder()
    x = build.reading("norm", build.reading("norm", build.input(10)))
    gate, up = (build.reading(name, x, size=30, flops=MANY) for name in ("gate", "up"))
    x = build.reading("mul", build.reading("silu", gate, size=30), up, size=30)
    x = build.reading("norm", build.reading("down", x, flops=MANY))
    assert cuts_of(build.build(x), 1) == (1, 3)


def test_a_cut_is_not_carried_to_a_wider_place() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.reading("norm", build.input(10)))
    a = build.reading("conv", x, flops=MANY)
    b = build.reading("linear", build.reading("silu", build.input(10)), flops=1)
    x = build.reading("norm", build.reading("norm", build.op("add", [a, b], 10)))
    assert cuts_of(build.build(x)) == (2,)


def skippable(graph: Graph, start: int = 0, stop: int | None = None) -> list[str]:
    stop = len(graph.nodes) if stop is None else stop
    return [graph.nodes[n].op for n in sorted(skippable_ops(graph, start, stop))]


def two_products(build: GraphBuilder, *, in_place: bool = False) -> Graph:
    """Two products of results of their own that are read behind the block only."""
    x = build.input(10)
    a = build.reading("product", build.reading("norm", x), flops=MANY)
    b = build.reading("projection", build.reading("silu", x), flops=MANY)
    total = build.write("add_", a, [b]) if in_place else build.op("add", [a, b], 10)
    return build.build(build.reading("norm", total))


def test_products_that_meet_in_a_sum_are_skippable_until_the_sum_is_saved() -> None:
    graph = two_products(GraphBuilder())
    assert skippable(graph, stop=4) == ["product", "projection"]
    assert skippable(graph, stop=5) == ["product", "projection", "add"]
    assert skippable(graph) == ["norm"]


def test_what_is_changed_in_place_is_not_looked_into() -> None:
    graph = two_products(GraphBuilder(), in_place=True)
    assert skippable(graph, stop=4) == ["product", "projection"]
    assert skippable(graph, stop=5) == ["projection", "add_"]


def test_a_region_is_not_looked_into() -> None:
    build = GraphBuilder()
    x = build.input(10)
    a = build.reading("product", build.reading("norm", x), flops=MANY)
    build.flag("set_grad_enabled")
    b = build.reading("projection", build.reading("silu", x), flops=MANY)
    assert skippable(build.build(build.op("add", [a, b], 10))) == ["projection", "add"]


def test_an_op_that_saves_what_it_makes_is_run() -> None:
    build = GraphBuilder()
    x = build.op("exp", [build.reading("norm", build.input(10))], 10, save_output=True)
    assert skippable(build.build(x)) == []


def test_an_op_that_saves_a_copy_of_what_it_reads_has_saved_before_it_computes() -> None:
    build = GraphBuilder()
    a, b = (build.copying("linear", build.reading("silu", build.input(10)), flops=MANY) for _ in range(2))
    assert skippable(build.build(build.op("add", [a, b], 10))) == ["linear", "linear", "add"]


@pytest.mark.parametrize("why", ["is_random", "is_collective"])
def test_an_op_with_effects_is_run(why: str) -> None:
    build = GraphBuilder()
    build.reading("product", build.input(10), flops=MANY)
    graph = build.build(build.reading("norm", build.input(10)))
    assert skippable(graph) == ["product", "norm"]
    node = replace(graph.nodes[0], **{why: True})
    assert skippable(replace(graph, nodes=(node, graph.nodes[1]))) == ["norm"]


def test_an_op_that_writes_a_buffer_is_run() -> None:
    build = GraphBuilder()
    buffer = build.parameter()
    build.reading("norm", build.input(10))
    graph = build.build(build.reading("norm", build.input(10)))
    node = replace(graph.nodes[0], writes=(build.storage_of(buffer),))
    assert skippable(replace(graph, nodes=(node, graph.nodes[1]))) == ["norm"]


def test_a_view_of_a_skippable_result_is_skippable() -> None:
    build = GraphBuilder()
    x = build.input(10)
    made = build.reading("product", build.reading("norm", x), flops=MANY)
    seen = build.view("view", made, 10)
    build.reading("norm", x)
    graph = build.build(build.op("add", [seen, x], 10))
    assert skippable(graph, stop=4) == ["product", "view", "norm"]
    build = GraphBuilder()
    made = build.reading("product", build.reading("norm", build.input(10)), flops=MANY)
    graph = build.build(build.reading("exp", build.view("view", made, 10)))
    assert skippable(graph) == ["exp"]
