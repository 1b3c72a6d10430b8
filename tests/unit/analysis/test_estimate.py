"""Is an estimated chain legal for any graph, and what one counts by hand for a small one?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.graph.graphs_by_hand import GraphBuilder, chain_graph, transformer_graph
from tests.unit.graph.strategies_graph import graphs
from tinybp_lightning.analysis import OPERATIONS_PER_S, count_operations, estimate_chain
from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph import Granularity, Graph, choose_cuts, verify_chain
from tinybp_lightning.schedule import Planner, keep_all, simulate


@given(graphs(max_nodes=14), st.sampled_from(Granularity))
def test_any_graph_has_a_chain_that_can_be_planned(graph: Graph, granularity: Granularity) -> None:
    chain = estimate_chain(graph, granularity=granularity)
    verify_chain(chain)
    assert len(chain.blocks) == len(choose_cuts(graph, granularity=granularity)) + 1
    assert Planner(chain).smallest_bytes <= simulate(chain, keep_all(chain)).peak_bytes


def one_block() -> Graph:
    """`y = f(x w)` with a mask of 5 bytes that `f` saves, and a view of `x w` (7 bytes); the result has 3."""
    build = GraphBuilder("block")
    x, w = build.input(100), build.parameter(50)
    product = build.op("linear", [x, w], 7)
    flat = build.view("view", product, 7)
    mask = build.storage(5)
    y = build.op("dropout", [flat], 3, saved=[mask, build.storage_of(product)])
    return build.build(y)


def test_bytes_and_seconds_of_one_block_by_hand() -> None:
    chain = estimate_chain(one_block(), bytes_per_s=1.0)
    (block,) = chain.blocks
    (option,) = block.options
    assert chain.storage_bytes == (3,)
    # The product moves 100 + 50 + 7 bytes, the view none, the last op 7 + 5 + 3.
    assert block.forward_s == 157 + 15
    assert option.backward_s == 2 * block.forward_s
    assert (block.forward_peak_bytes, option.save_peak_bytes) == (7 + 5 + 3, 7 + 5 + 3)
    assert option.saved_bytes == 7 + 5
    assert (option.replay_s, option.replay_peak_bytes) == (block.forward_s, 7 + 5 + 3)
    # The product's gradient comes while the result's, which is not counted here, is there; parameters' are left out.
    assert option.backward_peak_bytes == 7
    assert chain.boundaries[-1].gradient_bytes == 3


def test_operations_of_a_block_by_hand() -> None:
    """Two products whose results are read behind the block: its replay makes what the second one reads, and no more."""
    build = GraphBuilder()
    x = build.input(100)
    a = build.reading("first", build.reading("norm", x, size=100), size=100, flops=5000)
    b = build.reading("second", build.reading("norm", x, size=200), size=100, flops=7000)
    graph = build.build(build.op("add", [a, b], 100))
    (count,) = count_operations(graph, [(0, 4)])
    moved = [(100 + 100) / 100, 0, (100 + 200) / 100, 0]  # by norms; products have far more operations than they move
    assert count.forward_s * OPERATIONS_PER_S == pytest.approx(5000 + 7000 + sum(moved))
    assert count.replay_s * OPERATIONS_PER_S == pytest.approx(sum(moved))
    assert count.backward_s == 2 * count.forward_s


def test_operations_decide_where_they_take_longer() -> None:
    graph = one_block()
    slow = estimate_chain(graph, flops_per_s=1.0, bytes_per_s=1.0)
    assert slow == estimate_chain(graph, bytes_per_s=1.0)  # it has none
    assert estimate_chain(graph, bytes_per_s=2.0).blocks[0].forward_s == slow.blocks[0].forward_s / 2


def test_plain_training_keeps_what_is_saved() -> None:
    chain = estimate_chain(chain_graph(12, size=100))
    # Twelve outputs are saved; at the last op's backward its input's gradient is there beside its output's.
    assert simulate(chain, keep_all(chain)).peak_bytes == 12 * 100 + 2 * 100


def test_more_memory_makes_an_estimated_model_faster() -> None:
    planner = Planner(estimate_chain(transformer_graph(6)))
    assert planner.smallest_bytes < planner.largest_bytes
    assert planner.smallest_plan().total_s > planner.plan(budget_bytes=planner.largest_bytes).total_s


def test_a_graph_without_nodes_is_named() -> None:
    with pytest.raises(GraphError, match=r"graph `empty` has `nodes=\(\)`"):
        estimate_chain(GraphBuilder("empty").build())


def test_a_replay_holds_the_copy_that_a_skippable_op_saves() -> None:
    build = GraphBuilder()
    (block,) = estimate_chain(build.build(build.copying("linear", build.input(10), size=3, flops=1000))).blocks
    (option,) = block.options
    assert option.replay_s == 0
    assert option.replay_peak_bytes == option.saved_bytes == 3
