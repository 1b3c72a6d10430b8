"""Products that a replay need not repeat: cut behind them, and cheap ops that stood in the way moved behind them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.graph.graphs_by_hand import GraphBuilder, transformer_graph
from tinybp_lightning.graph import Graph, ValueId, verify_graph
from tinybp_lightning.graph.frontier import frontier_profile
from tinybp_lightning.graph.products import cut_behind_products, delay_cheap_ops, saved_bytes

MANY = 1000


def ops_of(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


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


def gated(build: GraphBuilder, x: ValueId, act: Callable[[ValueId], ValueId], up_reads: ValueId | None = None) -> Graph:
    gate = act(build.reading("gate", x, flops=MANY))
    up = build.reading("up", x if up_reads is None else up_reads, flops=MANY)
    return build.build(build.reading("mul", gate, up))


def test_an_activation_function_moves_to_where_it_is_read() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    graph = gated(build, x, lambda t: build.reading("silu", t))
    delayed = delay_cheap_ops(graph)
    verify_graph(delayed)
    assert ops_of(graph) == ["norm", "gate", "silu", "up", "mul"]
    assert ops_of(delayed) == ["norm", "gate", "up", "silu", "mul"]
    assert replace(delayed, nodes=()) == replace(graph, nodes=())
    assert cuts_of(delayed) == (2,)
    assert cuts_of(graph) == (1,)


def test_an_op_that_passes_no_product_stays() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    gate = build.reading("silu", x)
    up = build.reading("tanh", x)
    graph = build.build(build.reading("mul", gate, up))
    assert delay_cheap_ops(graph) == graph


@pytest.mark.parametrize("why", ["unsaved", "random", "parameter", "in-place", "flops", "shared", "region", "write"])
def test_an_op_stays_where_its_move_would_cost_or_change_something(why: str) -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    parameter = build.parameter()

    def act(gate: ValueId) -> ValueId:
        match why:
            case "unsaved":  # `gate` would live longer for it
                return build.op("silu", [gate], 10)
            case "parameter":
                return build.reading("scale", gate, parameter)
            case "in-place":
                return build.write("silu_", gate)
            case "flops":
                return build.reading("silu", gate, flops=1)
            case "shared":  # its gradient and that of the second product would be summed in another order
                return build.reading("silu", x)
            case "region":
                made = build.reading("silu", gate)
                build.flag("set_grad_enabled")
                return made
            case "write":
                made = build.reading("silu", gate)
                build.write("add_", x)
                return made
            case _:
                return build.reading("silu", gate)

    graph = gated(build, x, act)
    if why == "random":
        nodes = tuple(replace(node, is_random=node.op == "silu") for node in graph.nodes)
        graph = replace(graph, nodes=nodes)
    assert delay_cheap_ops(graph) == graph
