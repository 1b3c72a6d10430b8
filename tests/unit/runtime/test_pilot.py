"""What a pilot learns from measured steps: plans that were seen to exceed the budget, and steps that lack blocks."""

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.runtime.pilots import middle_bytes, pilot_of
from tests.unit.schedule.chains_by_hand import transformer_chain
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch.engine import RunStats
from tinybp_lightning.runtime.torch.pilot import Pilot
from tinybp_lightning.runtime.torch.watch import Measured
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.baselines import keep_all
from tinybp_lightning.schedule.plan import Planner
from tinybp_lightning.schedule.simulate import simulate


class Flown:
    """A step that has ended, and needed `peak_bytes`."""

    is_disturbed = is_lost = False
    step_s = 1.0

    def __init__(self, pilot: Pilot, peak_bytes: int) -> None:
        tail = simulate(pilot.chain, pilot.report.schedule).tail
        measured = Measured(peak_bytes, tail.after_bytes, tail.after_bytes, tail.after_bytes)
        self.measured = measured if pilot.is_measuring else None


def fly(pilot: Pilot, peak_bytes: int, *, is_whole: bool = True) -> Schedule:
    """Let a step end that needed so much; return what it flew."""
    flown = pilot.report.schedule
    watch: Any = Flown(pilot, peak_bytes)
    pilot.end_step(watch, RunStats(), is_whole=is_whole)
    return flown


def as_predicted(pilot: Pilot) -> int:
    return simulate(pilot.chain, pilot.report.schedule).peak_bytes


@pytest.fixture
def chain() -> Chain:
    return transformer_chain(6)


def test_a_plan_that_was_seen_to_exceed_the_budget_is_not_flown_again(chain: Chain) -> None:
    """It alone needs more than the model says: others need less than it taught, so that it seems to fit again."""
    budget_bytes = middle_bytes(chain)
    pilot = pilot_of(chain, budget_bytes)
    fly(pilot, as_predicted(pilot))
    greedy = fly(pilot, int(1.3 * budget_bytes))
    flown = [pilot.report.schedule]
    for _ in range(8):
        peak_bytes = int(1.3 * budget_bytes) if pilot.report.schedule == greedy else budget_bytes // 2
        fly(pilot, peak_bytes)
        flown.append(pilot.report.schedule)
    assert greedy not in flown
    assert greedy != keep_all(chain)


def test_where_every_plan_so_far_exceeded_the_budget_the_next_is_another(chain: Chain) -> None:
    budget_bytes = middle_bytes(chain)
    pilot = pilot_of(chain, budget_bytes)
    fly(pilot, as_predicted(pilot))
    first = fly(pilot, budget_bytes + 10)
    second = fly(pilot, budget_bytes + 1)
    third = pilot.report.schedule
    assert len({first, second, third}) == 3


def test_a_step_that_lacks_blocks_makes_no_room(chain: Chain) -> None:
    """It needed half the budget, and has not shown what a whole one needs."""
    budget_bytes = middle_bytes(chain)
    pilot = pilot_of(chain, budget_bytes)
    fly(pilot, as_predicted(pilot) + budget_bytes // 10)
    planned = fly(pilot, budget_bytes // 2, is_whole=False)
    assert pilot.report.schedule == planned
    for _ in range(10):
        fly(pilot, budget_bytes // 2, is_whole=False)
    assert pilot.report.schedule == planned
    assert pilot.is_measuring, "no whole step has been seen"
    for _ in range(50):
        fly(pilot, budget_bytes // 2, is_whole=False)
    assert not pilot.is_measuring, "none may ever come"
    assert pilot.report.predicted_peak_bytes > budget_bytes // 2


def test_a_whole_step_after_one_that_lacks_blocks_is_learned_from(chain: Chain) -> None:
    budget_bytes = middle_bytes(chain)
    pilot = pilot_of(chain, budget_bytes)
    fly(pilot, as_predicted(pilot))
    planned = fly(pilot, budget_bytes // 2, is_whole=False)
    fly(pilot, budget_bytes + 10)
    assert pilot.report.schedule != planned


@pytest.mark.parametrize("block", [0, 3, 5])
def test_where_not_even_the_smallest_plan_fits_estimated_options_are_measured(chain: Chain, block: int) -> None:
    """One that nobody would take, as far as is known."""
    first = chain.blocks[block].options[0]
    estimate = replace(first, saved_bytes=3 * first.saved_bytes, backward_s=3 * first.backward_s, is_estimated=True)
    larger = replace(estimate, save_peak_bytes=3 * first.save_peak_bytes, replay_peak_bytes=3 * first.replay_peak_bytes)
    blocks = [replace(b, options=(*b.options, larger)) if k == block else b for k, b in enumerate(chain.blocks)]
    chain = replace(chain, blocks=tuple(blocks))
    budget_bytes = int(1.04 * Planner(chain).smallest_bytes)
    pilot = pilot_of(chain, budget_bytes)
    fly(pilot, as_predicted(pilot))
    for _ in range(3):
        fly(pilot, int(1.2 * budget_bytes))
    assert pilot.wants_all_options
    assert pilot.is_measuring
