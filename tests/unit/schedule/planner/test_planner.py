"""The planner: legal, within budget, monotone, deterministic, and as fast as the best of all persistent schedules."""

import random
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.graph.strategies_chain import chains
from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import pass_through_chain, random_chain, transformer_chain, uniform_chain
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph import Chain, verify_chain
from tinybp_lightning.schedule import (
    Planner,
    Schedule,
    certify,
    every_sqrt_n,
    from_text,
    keep_all,
    per_block,
    plan,
    simulate,
    smallest_budget,
    to_text,
    verify_schedule,
)


def _budgets(planner: Planner, count: int) -> list[int]:
    span = planner.largest_bytes - planner.smallest_bytes
    return sorted({planner.smallest_bytes + span * k // count for k in range(count + 1)})


def _random(seed: int, num_blocks: int) -> Chain:
    chain = random_chain(random.Random(seed), num_blocks)
    verify_chain(chain)
    return chain


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_equals_brute_force(seed: int, num_blocks: int) -> None:
    planner = Planner(_random(seed, num_blocks))
    chain = _random(seed, num_blocks)
    for budget_bytes in _budgets(planner, 4):
        best = fastest(chain, budget_bytes, is_persistent=True)
        assert best is not None
        assert planner.plan(budget_bytes=budget_bytes).total_s == best[0]
    assert fastest(chain, planner.smallest_bytes - 1) is None


@pytest.mark.parametrize("seed", range(100, 106))
def test_equals_brute_force_on_five_blocks(seed: int) -> None:
    planner = Planner(_random(seed, 5))
    budget_bytes = _budgets(planner, 4)[1]
    best = fastest(_random(seed, 5), budget_bytes, is_persistent=True)
    assert best is not None
    assert planner.plan(budget_bytes=budget_bytes).total_s == best[0]


@pytest.mark.parametrize("seed", range(8))
def test_brute_force_agrees_with_oracle_and_simulator(seed: int) -> None:
    chain = _random(seed, 4)
    budget_bytes = Planner(chain).smallest_bytes
    best = fastest(chain, budget_bytes)
    assert best is not None
    timeline = simulate(chain, from_text(best[1]))
    assert timeline.total_s == best[0]
    assert timeline.peak_bytes <= budget_bytes


@pytest.mark.parametrize(
    ("budget_bytes", "text"),
    [
        (12, "K0 K1 K2 K3 B3 B2 B1 B0"),
        (10, "K0 K1 S2 F2 K3 B3 K2 D2 B2 B1 B0"),
        (7, "F0 F1 K2 K3 B3 B2 K0 K1 B1 B0"),
        (6, "F0 S1 F1 S2 F2 K3 B3 K2 D2 B2 K1 D1 B1 K0 B0"),
        (5, "F0 S1 F1 F2 K3 B3 F1 K2 B2 K1 D1 B1 K0 B0"),
        (4, "F0 F1 F2 K3 B3 F0 F1 K2 B2 F0 K1 B1 K0 B0"),
    ],
)
def test_order_literally(budget_bytes: int, text: str) -> None:
    chain = uniform_chain(4)
    verify_schedule(chain, from_text(text))
    found = plan(chain, budget_bytes=budget_bytes)
    assert (to_text(found.schedule), found.total_s) == (text, simulate(chain, from_text(text)).total_s)


@settings(deadline=None, max_examples=60)
@given(chains(max_blocks=7), st.data())
def test_any_chain_any_budget(chain: Chain, data: st.DataObject) -> None:
    planner = Planner(chain)
    low, high = sorted(data.draw(st.tuples(*[st.integers(planner.smallest_bytes, planner.largest_bytes)] * 2)))
    slow, fast = planner.plan(budget_bytes=low), planner.plan(budget_bytes=high)
    for found, budget_bytes in ((slow, low), (fast, high)):
        timeline = simulate(chain, found.schedule)
        assert (timeline.peak_bytes, timeline.total_s) == (found.peak_bytes, found.total_s)
        assert found.peak_bytes <= budget_bytes
    assert fast.total_s <= slow.total_s
    assert plan(chain, budget_bytes=low) == slow


@pytest.mark.parametrize("chain", [transformer_chain(6), _random(5, 24), uniform_chain(30)], ids=["t6", "r24", "u30"])
def test_time_never_rises_with_the_budget(chain: Chain) -> None:
    planner = Planner(chain)
    budgets = _budgets(planner, 25)
    times = [planner.plan(budget_bytes=budget_bytes).total_s for budget_bytes in budgets]
    assert times == sorted(times, reverse=True)
    assert all(Planner(chain).plan(budget_bytes=b).total_s == t for b, t in list(zip(budgets, times, strict=True))[::8])


@pytest.mark.parametrize("num_layers", [2, 8])
@pytest.mark.parametrize("baseline", [keep_all, per_block, every_sqrt_n])
def test_never_slower_than_a_baseline_at_its_peak(num_layers: int, baseline: Callable[[Chain], Schedule]) -> None:
    chain = transformer_chain(num_layers)
    timeline = simulate(chain, baseline(chain))
    found = plan(chain, budget_bytes=timeline.peak_bytes)
    assert found.total_s <= timeline.total_s
    assert found.peak_bytes <= timeline.peak_bytes


def test_budget_for_everything_recomputes_nothing() -> None:
    chain = transformer_chain(3)
    found = plan(chain, budget_bytes=simulate(chain, keep_all(chain)).peak_bytes)
    assert found.recompute_s == 0.0
    assert certify(chain, found).gap == 0.0


def test_smallest_budget_is_met_and_one_byte_less_is_not() -> None:
    chain = transformer_chain(5)
    budget_bytes, found = smallest_budget(chain)
    assert found.peak_bytes == budget_bytes
    assert budget_bytes < simulate(chain, per_block(chain)).peak_bytes
    with pytest.raises(
        BudgetTooSmallError, match=rf"`budget_bytes={budget_bytes - 1}`.*needs {budget_bytes} bytes"
    ) as e:
        plan(chain, budget_bytes=budget_bytes - 1)
    assert (e.value.smallest_bytes, e.value.budget_bytes) == (budget_bytes, budget_bytes - 1)
    assert e.value.bottleneck in {block.name for block in chain.blocks}


def test_error_says_when_the_loss_sets_the_smallest_budget() -> None:
    chain = pass_through_chain()
    loss = Chain(chain.storage_bytes, chain.blocks, chain.boundaries, tail_peak_bytes=500)
    with pytest.raises(BudgetTooSmallError, match=r"needs 504 bytes \(the code after the last block, tail\)"):
        plan(loss, budget_bytes=1)


def test_long_chain_of_unlike_blocks_in_time() -> None:
    chain = _random(1, 200)
    planner = Planner(chain)
    found = planner.plan(budget_bytes=planner.largest_bytes // 3)
    assert found.peak_bytes <= planner.largest_bytes // 3


def test_schedule_loads_no_framework() -> None:
    code = (
        "import sys, tinybp_lightning.schedule; print([m for m in ('torch', 'jax', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
