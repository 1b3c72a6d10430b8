"""What a controller learns from measured steps: plans seen to exceed the budget, and steps that lack blocks."""

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.runtime.controllers import controller_of, middle_bytes
from tests.unit.schedule.chains_by_hand import transformer_chain
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch.controller import Controller
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMeasurement
from tinybp_lightning.runtime.torch.replay.engine import RunStats
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.baselines import keep_all
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import simulate


class Flown:
    """A step that has ended, and needed `peak_bytes`."""

    is_disturbed = is_lost = False
    step_s = 1.0

    def __init__(self, controller: Controller, peak_bytes: int) -> None:
        tail = simulate(controller.chain, controller.report.schedule).tail
        measured = StepMeasurement(peak_bytes, tail.after_bytes, tail.after_bytes, tail.after_bytes)
        self.measured = measured if controller.is_measuring else None


def fly(controller: Controller, peak_bytes: int, *, is_whole: bool = True) -> Schedule:
    """Let a step end that needed so much; return what it flew."""
    flown = controller.report.schedule
    watch: Any = Flown(controller, peak_bytes)
    controller.end_step(watch, RunStats(), is_whole=is_whole)
    return flown


def as_predicted(controller: Controller) -> int:
    return simulate(controller.chain, controller.report.schedule).peak_bytes


@pytest.fixture
def chain() -> Chain:
    return transformer_chain(6)


def test_a_plan_that_was_seen_to_exceed_the_budget_is_not_flown_again(chain: Chain) -> None:
    """It alone needs more than the model says: others need less than it taught, so that it seems to fit again."""
    budget_bytes = middle_bytes(chain)
    controller = controller_of(chain, budget_bytes)
    fly(controller, as_predicted(controller))
    greedy = fly(controller, int(1.3 * budget_bytes))
    flown = [controller.report.schedule]
    for _ in range(8):
        peak_bytes = int(1.3 * budget_bytes) if controller.report.schedule == greedy else budget_bytes // 2
        fly(controller, peak_bytes)
        flown.append(controller.report.schedule)
    assert greedy not in flown
    assert greedy != keep_all(chain)


def test_where_every_plan_so_far_exceeded_the_budget_the_next_is_another(chain: Chain) -> None:
    budget_bytes = middle_bytes(chain)
    controller = controller_of(chain, budget_bytes)
    fly(controller, as_predicted(controller))
    first = fly(controller, budget_bytes + 10)
    second = fly(controller, budget_bytes + 1)
    third = controller.report.schedule
    assert len({first, second, third}) == 3


def test_a_step_that_lacks_blocks_makes_no_room(chain: Chain) -> None:
    """It needed half the budget, and has not shown what a whole one needs."""
    budget_bytes = middle_bytes(chain)
    controller = controller_of(chain, budget_bytes)
    fly(controller, as_predicted(controller) + budget_bytes // 10)
    planned = fly(controller, budget_bytes // 2, is_whole=False)
    assert controller.report.schedule == planned
    for _ in range(10):
        fly(controller, budget_bytes // 2, is_whole=False)
    assert controller.report.schedule == planned
    assert controller.is_measuring, "no whole step has been seen"
    for _ in range(50):
        fly(controller, budget_bytes // 2, is_whole=False)
    assert not controller.is_measuring, "none may ever come"
    assert controller.report.predicted_peak_bytes > budget_bytes // 2


def test_a_whole_step_after_one_that_lacks_blocks_is_learned_from(chain: Chain) -> None:
    budget_bytes = middle_bytes(chain)
    controller = controller_of(chain, budget_bytes)
    fly(controller, as_predicted(controller))
    planned = fly(controller, budget_bytes // 2, is_whole=False)
    fly(controller, budget_bytes + 10)
    assert controller.report.schedule != planned


@pytest.mark.parametrize("block", [0, 3, 5])
def test_where_not_even_the_smallest_plan_fits_estimated_options_are_measured(chain: Chain, block: int) -> None:
    """One that nobody would take, as far as is known."""
    first = chain.blocks[block].options[0]
    estimate = replace(first, saved_bytes=3 * first.saved_bytes, backward_s=3 * first.backward_s, is_estimated=True)
    larger = replace(estimate, save_peak_bytes=3 * first.save_peak_bytes, replay_peak_bytes=3 * first.replay_peak_bytes)
    blocks = [replace(b, options=(*b.options, larger)) if k == block else b for k, b in enumerate(chain.blocks)]
    chain = replace(chain, blocks=tuple(blocks))
    budget_bytes = int(1.04 * Planner(chain).smallest_bytes)
    controller = controller_of(chain, budget_bytes)
    fly(controller, as_predicted(controller))
    for _ in range(3):
        fly(controller, int(1.2 * budget_bytes))
    assert controller.wants_all_options
    assert controller.is_measuring
