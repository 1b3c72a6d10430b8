"""Ops that run later than they were written, so that a replay need not repeat the product before them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.graph.graphs_by_hand import GraphBuilder
from tinybp_lightning.graph import Graph, StorageKind, ValueId, verify_graph
from tinybp_lightning.graph.cuts.products import cut_behind_products
from tinybp_lightning.graph.cuts.reorder import delay_ops
from tinybp_lightning.graph.frontier import frontier_profile

MANY = 1000


def ops_of(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def gated(build: GraphBuilder, x: ValueId, act: Callable[[ValueId], ValueId]) -> Graph:
    gate = act(build.reading("gate", x, flops=MANY))
    up = build.reading("up", x, flops=MANY)
    return build.build(build.reading("mul", gate, up))


def batch_norm(build: GraphBuilder, x: ValueId, statistics: ValueId, parameter: ValueId) -> ValueId:
    made = build.reading("batch_norm", x, parameter)
    build.nodes[-1] = replace(build.nodes[-1], writes=(build.storage_of(statistics),))
    return made


def test_an_activation_function_moves_to_where_it_is_read() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    graph = gated(build, x, lambda t: build.reading("silu", t))
    delayed = delay_ops(graph, may_move_parameters=True)
    verify_graph(delayed)
    assert ops_of(graph) == ["norm", "gate", "silu", "up", "mul"]
    assert ops_of(delayed) == ["norm", "gate", "up", "silu", "mul"]
    assert replace(delayed, nodes=()) == replace(graph, nodes=())
    assert cut_behind_products(delayed, frontier_profile(delayed), ()) == (2,)
    assert cut_behind_products(graph, frontier_profile(graph), ()) == (1,)


def test_what_saves_a_copy_of_what_it_reads_moves_too() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    graph = gated(build, x, lambda t: build.copying("softmax", t))
    assert ops_of(delay_ops(graph, may_move_parameters=True)) == ["norm", "gate", "up", "softmax", "mul"]


@pytest.mark.parametrize("share", ["nothing", "statistics", "parameter"])
def test_a_norm_moves_past_the_convolution_of_the_other_branch(share: str) -> None:
    """It writes running statistics and reads parameters; where another op does with the same ones, it stays."""
    build = GraphBuilder()
    statistics = [build.input(1, StorageKind.BUFFER) for _ in range(2)]
    parameters = [build.parameter() for _ in range(2)]
    x = build.reading("relu", build.input(10))
    main = batch_norm(build, build.reading("conv", x, flops=MANY), statistics[0], parameters[0])
    shortcut = build.reading("conv", x, flops=MANY)
    second = 0 if share == "statistics" else 1, 0 if share == "parameter" else 1
    shortcut = batch_norm(build, shortcut, statistics[second[0]], parameters[second[1]])
    graph = build.build(build.write("iadd", main, [shortcut]))
    delayed = delay_ops(graph, may_move_parameters=True)
    verify_graph(delayed)
    before = ["relu", "conv", "batch_norm", "conv", "batch_norm", "iadd"]
    assert ops_of(graph) == before
    assert ops_of(delayed) == (["relu", "conv", "conv", *before[4:5], *before[4:]] if share == "nothing" else before)
    if share == "nothing":
        first, second_norm = delayed.nodes[3:5]
        assert (first.makes, second_norm.makes) == ((shortcut,), (main,))


def test_an_op_that_passes_no_product_stays() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    gate = build.reading("silu", x)
    up = build.reading("tanh", x)
    graph = build.build(build.reading("mul", gate, up))
    assert delay_ops(graph, may_move_parameters=True) == graph


def test_an_op_whose_result_is_read_far_away_stays() -> None:
    build = GraphBuilder()
    gate = build.reading("silu", build.reading("gate", build.input(10), flops=MANY))
    x = build.reading("up", build.input(10), flops=MANY)
    for _ in range(20):
        x = build.reading("tanh", x)
    graph = build.build(build.reading("mul", gate, x))
    assert delay_ops(graph, may_move_parameters=True) == graph


def test_an_op_that_reads_a_parameter_moves_only_where_nobody_waits_for_gradients() -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))
    parameter = build.parameter()
    graph = gated(build, x, lambda t: build.reading("layer_norm", t, parameter))
    assert delay_ops(graph, may_move_parameters=False) == graph
    assert ops_of(delay_ops(graph, may_move_parameters=True)) == ["norm", "gate", "up", "layer_norm", "mul"]


def test_an_op_of_which_nothing_is_known_stays() -> None:
    build = GraphBuilder()
    graph = gated(build, build.input(10), lambda t: build.reading("autograd_function_apply", t))
    assert delay_ops(graph, may_move_parameters=True) == graph


@pytest.mark.parametrize("why", ["unsaved", "random", "in-place", "flops", "shared", "region", "write"])
def test_an_op_stays_where_its_move_would_cost_or_change_something(why: str) -> None:
    build = GraphBuilder()
    x = build.reading("norm", build.input(10))

    def act(gate: ValueId) -> ValueId:
        match why:
            case "unsaved":  # `gate` would live longer for it
                return build.op("silu", [gate], 10)
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
                build.write("add_", gate)
                return made
            case _:
                return build.reading("silu", gate)

    graph = gated(build, x, act)
    if why == "random":
        nodes = tuple(replace(node, is_random=node.op == "silu") for node in graph.nodes)
        graph = replace(graph, nodes=nodes)
    assert delay_ops(graph, may_move_parameters=True) == graph
