"""Plans against the integer program: the same optimum on small chains, by another road and another's solver."""

import random

import pytest

from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import pass_through_chain, random_chain, transformer_chain, uniform_chain
from tests.unit.schedule.milp import checkmate
from tinybp_lightning.schedule import Planner, certify, simulate


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_equals_brute_force(seed: int, num_blocks: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks, max_options=3)
    planner = Planner(chain)
    for budget_bytes in {planner.smallest_bytes, (planner.smallest_bytes + planner.largest_bytes) // 2}:
        found, best = checkmate(chain, budget_bytes=budget_bytes), fastest(chain, budget_bytes)
        assert found is not None
        assert best is not None
        assert found.total_s == pytest.approx(best[0])
        timeline = simulate(chain, found.schedule)
        assert timeline.total_s == pytest.approx(found.total_s)
        assert timeline.peak_bytes <= budget_bytes


@pytest.mark.parametrize(
    ("num_blocks", "missed"),
    [
        (6, {(4, "smallest"): (48, 56), (6, "smallest"): (32, 33)}),
        (8, {(3, "smallest"): (59, 68)}),
    ],
)
def test_plans_that_are_not_the_optimum(num_blocks: int, missed: dict[tuple[int, str], tuple[float, float]]) -> None:
    """Plans for the middle budget are optimal; at the smallest, non-persistent checkpoints would pay in these."""
    found: dict[tuple[int, str], tuple[float, float]] = {}
    for seed in range(10):
        chain = random_chain(random.Random(seed), num_blocks)
        planner = Planner(chain)
        middle_bytes = (planner.smallest_bytes + planner.largest_bytes) // 2
        for name, budget_bytes in (("smallest", planner.smallest_bytes), ("middle", middle_bytes)):
            solution = checkmate(chain, budget_bytes=budget_bytes)
            assert solution is not None
            plan = planner.plan(budget_bytes=budget_bytes)
            assert certify(chain, plan, planner=planner).lower_bound_s <= solution.total_s * (1 + 1e-6)
            if plan.total_s != pytest.approx(solution.total_s):
                found[seed, name] = (solution.total_s, plan.total_s)
    assert found == missed


@pytest.mark.parametrize("percent", [0, 45, 65])
def test_plan_of_a_small_transformer_is_the_optimum(percent: int) -> None:
    chain = transformer_chain(1)
    planner = Planner(chain)
    budget_bytes = max(planner.smallest_bytes, planner.largest_bytes * percent // 100)
    solution = checkmate(chain, budget_bytes=budget_bytes)
    assert solution is not None
    assert planner.plan(budget_bytes=budget_bytes).total_s == pytest.approx(solution.total_s)
    assert solution.lower_bound_s == pytest.approx(solution.total_s)


def test_nothing_fits() -> None:
    assert checkmate(uniform_chain(3), budget_bytes=2) is None


def test_storage_that_several_hold_counts_once() -> None:
    chain = pass_through_chain()
    planner = Planner(chain)
    solution = checkmate(chain, budget_bytes=planner.largest_bytes)
    assert solution is not None
    assert solution.total_s == 9.0
    assert checkmate(chain, budget_bytes=planner.smallest_bytes - 1) is None
