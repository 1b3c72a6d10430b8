"""The search over all schedules of a very short chain: it finds what no tree reaches, and nothing where nothing is."""

import random

import pytest

from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import random_chain, uniform_chain, with_heavy_skips
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import Planner, simulate
from tinybp_lightning.schedule.milp import checkmate
from tinybp_lightning.schedule.planner.exact import faster_schedule, is_searchable


def _heavy(seed: int, num_blocks: int) -> Chain:
    return with_heavy_skips(random_chain(random.Random(seed), num_blocks), random.Random(seed))


@pytest.mark.parametrize(("num_blocks", "seed"), [(6, 45), (6, 110), (8, 59)])
def test_plan_holds_a_saved_set_sooner_than_its_backward_is_due(num_blocks: int, seed: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks)
    planner = Planner(chain)
    solution = checkmate(chain, budget_bytes=planner.smallest_bytes)
    assert solution is not None
    plan = planner.plan(budget_bytes=planner.smallest_bytes)
    # Interval trees and helpers alone take 41, 41 and 60 seconds on these.
    assert plan.total_s == pytest.approx(solution.total_s)
    assert plan.gap == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_blocks", [7, 8])
def test_plans_of_seven_and_eight_blocks_equal_the_integer_program(num_blocks: int, seed: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks)
    planner = Planner(chain)
    budget_bytes = planner.smallest_bytes + (planner.largest_bytes - planner.smallest_bytes) // 4
    solution = checkmate(chain, budget_bytes=budget_bytes)
    assert solution is not None
    assert planner.plan(budget_bytes=budget_bytes).total_s == pytest.approx(solution.total_s)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed: int, heavy: bool) -> None:
    chain = _heavy(seed, 4) if heavy else random_chain(random.Random(seed), 4)
    planner = Planner(chain)
    for percent in (0, 20, 60):
        budget_bytes = planner.smallest_bytes + (planner.largest_bytes - planner.smallest_bytes) * percent // 100
        best = fastest(chain, budget_bytes)
        assert best is not None
        found = faster_schedule(chain, budget_bytes=budget_bytes, known_s=best[0] * 1.5)
        assert found is not None
        timeline = simulate(chain, found)
        assert timeline.total_s == pytest.approx(best[0])
        assert timeline.peak_bytes <= budget_bytes
        assert faster_schedule(chain, budget_bytes=budget_bytes, known_s=best[0]) is None
    assert faster_schedule(chain, budget_bytes=planner.smallest_bytes - 1, known_s=1e9) is None


@pytest.mark.parametrize("seed", [45, 110])
def test_time_never_rises_with_the_budget(seed: int) -> None:
    planner = Planner(random_chain(random.Random(seed), 6))
    times = [
        simulate(planner.chain, planner.schedule(budget_bytes=budget_bytes)).total_s
        for budget_bytes in range(planner.smallest_bytes, planner.largest_bytes + 1)
    ]
    assert times == sorted(times, reverse=True)


def test_only_very_short_chains_are_searched() -> None:
    assert is_searchable(uniform_chain(8))
    assert not is_searchable(uniform_chain(9))
    assert not is_searchable(random_chain(random.Random(4), 6, max_options=9))
