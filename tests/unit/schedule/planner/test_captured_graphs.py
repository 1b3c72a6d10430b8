"""From random graphs to schedules: every one legal, within its budget, monotone in it, and never below the bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.graph.graphs_by_hand import GraphBuilder, transformer_graph, unet_graph
from tests.unit.graph.strategies_graph import graphs
from tests.unit.schedule.chains_of_graphs import chain_of_graph
from tinybp_lightning.graph import (
    Chain,
    Granularity,
    Graph,
    choose_cuts,
    cut_blocks,
    frontier_profile,
    verify_chain,
    verify_graph,
)
from tinybp_lightning.schedule import Planner, certify, simulate, verify_schedule


@st.composite
def dags(draw: st.DrawFn, *, max_nodes: int) -> Graph:
    """Draw a graph in which ops read recent results, and older ones at times, and most results are saved."""
    build = GraphBuilder("dag")
    made = [build.input(4), build.op("op", [], 4)]
    for _ in range(draw(st.integers(5, max_nodes - 1))):
        recent = draw(st.lists(st.sampled_from(made[-3:]), min_size=1, max_size=2, unique=True))
        older = draw(st.lists(st.sampled_from(made), max_size=1))
        is_saved = draw(st.sampled_from([True, True, False]))
        made.append(build.op("op", [*recent, *older], draw(st.integers(1, 9)), save_output=is_saved))
    return build.build(made[-1])


def _judge(chain: Chain, *, num_budgets: int) -> list[float]:
    """Plan for budgets from the smallest up and check each plan, the second one's bound too; return the times."""
    verify_chain(chain)
    planner = Planner(chain)
    low, high = planner.smallest_bytes, planner.largest_bytes
    times = list[float]()
    for budget_bytes in sorted({low + (high - low) * k // num_budgets for k in range(num_budgets + 1)}):
        plan = planner.plan(budget_bytes=budget_bytes)
        verify_schedule(chain, plan.schedule)
        timeline = simulate(chain, plan.schedule)
        assert timeline.peak_bytes == plan.peak_bytes <= budget_bytes
        assert timeline.total_s == plan.total_s
        if len(times) == 1:
            # The bounds themselves, which the property `lower_bound_s` would cut off at the plan's time.
            certificate = certify(chain, plan, planner=planner)
            assert max(certificate.lagrangian_bound_s, certificate.dp_bound_s) <= plan.total_s * (1 + 1e-9)
        times.append(plan.total_s)
    assert times == sorted(times, reverse=True)
    return times


def _cut(graph: Graph, data: st.DataObject) -> tuple[int, ...]:
    """Draw cuts: those that the package would choose, all that are allowed, or some of these."""
    how = data.draw(st.sampled_from(["all", "some", *Granularity]))
    if isinstance(how, Granularity):
        return choose_cuts(graph, granularity=how)
    profile = frontier_profile(graph)
    allowed = [p for p in range(len(graph.nodes) - 1) if profile.is_allowed(p)]
    return tuple(p for p in allowed if how == "all" or data.draw(st.booleans()))


@settings(deadline=None, max_examples=60)
@given(st.one_of(dags(max_nodes=14), graphs(max_nodes=14)), st.data())
def test_any_graph_any_cuts(graph: Graph, data: st.DataObject) -> None:
    verify_graph(graph)
    _judge(chain_of_graph(graph, cut_blocks(graph, _cut(graph, data))), num_budgets=3)


@pytest.mark.slow
@pytest.mark.parametrize("max_nodes", [8, 11, 14, 16])
@settings(deadline=None, max_examples=250)
@given(st.data())
def test_a_thousand_graphs(max_nodes: int, data: st.DataObject) -> None:
    graph = data.draw(st.one_of(dags(max_nodes=max_nodes), graphs(max_nodes=max_nodes)))
    _judge(chain_of_graph(graph, cut_blocks(graph, _cut(graph, data))), num_budgets=4)


@pytest.mark.parametrize("graph", [transformer_graph(3), unet_graph(3)], ids=["transformer", "unet"])
def test_more_memory_makes_a_model_faster(graph: Graph) -> None:
    chain = chain_of_graph(graph, cut_blocks(graph, choose_cuts(graph, granularity=Granularity.FINE)))
    times = _judge(chain, num_budgets=4)
    assert times[-1] < times[0]
