"""The reducer `calibrate`: what each observation changes in the state, and what is to be done; small whole numbers.

The chain by hand has eight blocks that save 1000 bytes each, and boundaries of one byte: a plan that keeps `k` blocks
needs about `1000 * (k + 1)` bytes.
"""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chains import load_chain
from tests.unit.runtime.controllers import control_loop_of, middle_bytes, task_of
from tests.unit.schedule.chains_by_hand import transformer_chain, uniform_chain
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.profile import Limit, StepMeasurement
from tinybp_lightning.runtime.torch import controller
from tinybp_lightning.runtime.torch.controller import (
    CalibrationState,
    Decision,
    Observation,
    OptimizerStateSeen,
    OutOfMemory,
    Phase,
    StepEnded,
    calibrate,
    small_schedule,
    start,
    unmeasured_options,
)
from tinybp_lightning.runtime.torch.executors.options import estimated_options
from tinybp_lightning.runtime.torch.replay.engine import RunStats
from tinybp_lightning.schedule.baselines import every_sqrt_n, keep_all, per_block
from tinybp_lightning.schedule.measured import MeasuredPlan, measured_plan
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import simulate

CHAIN = uniform_chain(8, saved_bytes=1000)
BUDGET = 5000


def first_state(limit: Limit | None = None, chain: Chain = CHAIN) -> CalibrationState:
    return start(task_of(BUDGET), chain, limit or Limit(BUDGET), Planner)


def predicted(state: CalibrationState) -> int:
    return simulate(state.chain, state.active.schedule).peak_bytes


def measured(state: CalibrationState, peak_bytes: int, *, is_whole: bool = True) -> StepEnded:
    """Return a step of the active plan that peaked at `peak_bytes`, with a tail as predicted."""
    tail = simulate(state.chain, state.active.schedule).tail
    after = tail.after_bytes
    return StepEnded(StepMeasurement(peak_bytes, after, after, after), is_whole)


def after(state: CalibrationState, *seen: Observation) -> CalibrationState:
    for one in seen:
        state, _ = calibrate(state, one, Planner)
    return state


def calibrated(residual_bytes: int = 0) -> CalibrationState:
    """Return the state whose plan is for the budget: the first step needed this much beyond the model."""
    state = first_state()
    peak_bytes = simulate(CHAIN, state.active.schedule).peak_bytes
    return after(state, measured(replace(state, chain=CHAIN), peak_bytes + residual_bytes))


# ---- the first step ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> Chain:
    return load_chain("gpt2_8")


def test_a_known_method_that_leaves_most_of_the_budget_runs_first_and_nothing_is_planned(gpt2: Chain) -> None:
    def refuse(_: Chain) -> Planner:
        raise AssertionError("nothing is to be planned")

    fast = min((per_block(gpt2), every_sqrt_n(gpt2)), key=lambda s: simulate(gpt2, s).total_s)
    budget_bytes = 3 * simulate(gpt2, fast).peak_bytes
    assert small_schedule(gpt2, budget_bytes=budget_bytes, planner_of=refuse)[0] == fast


def test_where_no_known_method_is_small_enough_the_smallest_plan_runs_first(gpt2: Chain) -> None:
    smallest_bytes = min(simulate(gpt2, method(gpt2)).peak_bytes for method in (per_block, every_sqrt_n))
    schedule, timeline = small_schedule(gpt2, budget_bytes=3 * smallest_bytes - 1)
    assert schedule == Planner(gpt2).smallest_plan().schedule
    assert timeline == simulate(gpt2, schedule)
    assert timeline.peak_bytes == Planner(gpt2).smallest_bytes


def test_until_a_step_is_measured_a_margin_is_left_for_what_the_model_does_not_see() -> None:
    state = first_state()
    small_bytes = simulate(CHAIN, state.active.schedule).peak_bytes
    assert state.phase is Phase.CALIBRATE
    assert state.chain.unmodelled_bytes == int(0.03 * small_bytes) > 0
    assert state.active.report.predicted_peak_bytes == small_bytes + int(0.03 * small_bytes)


def test_a_budget_that_leaves_no_margin_is_too_small() -> None:
    smallest_bytes = Planner(CHAIN).smallest_bytes
    enough_bytes = smallest_bytes + int(0.03 * smallest_bytes)
    start(task_of(enough_bytes), CHAIN, Limit(enough_bytes), Planner)
    with pytest.raises(BudgetTooSmallError, match=f"needs {enough_bytes} bytes, .* without the loss") as caught:
        start(task_of(enough_bytes - 1), CHAIN, Limit(enough_bytes - 1), Planner)
    assert caught.value.smallest_bytes == enough_bytes + 1  # the caller may hold the last boundary to the end


def test_the_first_error_names_a_budget_with_room_for_a_loss_that_is_not_known_yet() -> None:
    last = replace(CHAIN.boundaries[-1], gradient_bytes=300)
    chain = replace(CHAIN, boundaries=(*CHAIN.boundaries[:-1], last), storage_bytes=(*CHAIN.storage_bytes[:-1], 300))
    with pytest.raises(BudgetTooSmallError) as caught:
        start(task_of(10), chain, Limit(10), Planner)
    enough_bytes = caught.value.smallest_bytes
    state = start(task_of(enough_bytes), chain, Limit(enough_bytes), Planner)
    # The caller holds the result; its cross-entropy saves another, and makes two more on its way to the gradient.
    tail = simulate(state.chain, state.active.schedule).tail
    held = StepMeasurement(0, tail.before_bytes, tail.before_bytes + 900, tail.after_bytes + 300)
    peak_bytes = simulate(replace(state.chain, unmodelled_bytes=0), state.active.schedule).peak_bytes + 300
    state = after(state, StepEnded(replace(held, peak_bytes=peak_bytes)))
    assert state.active.report.predicted_peak_bytes <= enough_bytes


def test_a_plan_that_was_measured_to_fit_is_not_refused_for_what_another_needed() -> None:
    state = first_state()
    small, smallest_bytes = state.active.schedule, predicted(state)
    state = after(replace(state, limit=Limit(smallest_bytes)), measured(state, smallest_bytes))
    other = replace(state.active, report=replace(state.active.report, schedule=keep_all(CHAIN)))
    state = after(replace(state, plan=other), measured(replace(state, plan=other), 10 * smallest_bytes))
    assert state.active.schedule == small
    assert state.active.report.budget_bytes == smallest_bytes


def test_the_first_step_teaches_the_tail_and_what_it_needed_beyond_the_model() -> None:
    state = first_state()
    tail = simulate(CHAIN, state.active.schedule).tail
    small_bytes = simulate(CHAIN, state.active.schedule).peak_bytes
    seen = StepMeasurement(small_bytes + 77, tail.before_bytes, tail.before_bytes + 50, tail.after_bytes + 30)
    learned = after(state, StepEnded(seen)).chain
    assert (learned.tail_peak_bytes, learned.tail_live_bytes) == (50, 30)
    assert simulate(learned, state.active.schedule).peak_bytes == small_bytes + 77
    assert learned.unmodelled_bytes == 77 - 30


def test_gradients_that_the_tail_did_not_make_are_not_counted() -> None:
    *others, last = CHAIN.boundaries
    chain = replace(CHAIN, boundaries=(*others, replace(last, gradient_bytes=40)))
    state = first_state(chain=chain)
    level = simulate(chain, state.active.schedule).tail.after_bytes
    peak_bytes = simulate(chain, state.active.schedule).peak_bytes
    learned = after(state, StepEnded(StepMeasurement(peak_bytes, level, level, level - 15))).chain
    assert learned.boundaries[-1].gradient_bytes == 25
    assert learned.tail_live_bytes == 0


def test_after_the_first_step_the_plan_for_the_budget_runs_and_is_noted_as_a_guess() -> None:
    state, decision = calibrate(first_state(), measured(first_state(), 0), Planner)
    assert decision is not None
    assert decision.noted is not None
    assert not decision.is_measured
    assert decision.noted.plan.schedule == state.active.schedule
    assert state.phase is Phase.SETTLE
    assert state.chain.unmodelled_bytes == 0, "the margin was measured away"
    assert state.active.report.predicted_peak_bytes <= BUDGET
    assert state.active.schedule == Planner(CHAIN).plan(budget_bytes=BUDGET).schedule


def test_the_reducer_changes_nothing_that_it_is_given_and_answers_the_same_again() -> None:
    state = calibrated(100)
    seen = measured(state, BUDGET + 10)
    before = replace(state)
    first, second = calibrate(state, seen, Planner), calibrate(state, seen, Planner)
    assert state == before
    assert first == second
    assert first[0] != state


def test_the_controller_sees_no_framework_and_no_clock() -> None:
    assert controller.__file__ is not None
    tree = ast.parse(Path(controller.__file__).read_text(encoding="utf-8"))
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"collections", "dataclasses", "enum", "typing"} | {
        "tinybp_lightning"
    }
    assert not any(".measure." in name for name in names)


# ---- settling ------------------------------------------------------------------------------------------------------


def test_a_plan_that_is_measured_to_fit_as_predicted_is_noted_and_measured_no_more() -> None:
    state = calibrated()
    settled, decision = calibrate(state, measured(state, predicted(state)), Planner)
    assert settled.phase is Phase.STEADY
    assert settled.active.schedule == state.active.schedule
    assert settled.active.report.reason == "measured"
    assert decision is not None
    assert decision.noted is not None
    assert decision.is_measured
    assert decision.noted.plan.budget_bytes == BUDGET


def test_a_plan_over_the_budget_gives_way_to_one_with_fewer_kept_blocks() -> None:
    state = calibrated()
    other, decision = calibrate(state, measured(state, BUDGET + 10), Planner)
    assert other.chain.unmodelled_bytes == BUDGET + 10 - predicted(state)
    assert other.active.schedule != state.active.schedule
    assert other.active.report.num_kept < state.active.report.num_kept
    assert other.active.report.predicted_peak_bytes <= BUDGET
    assert decision == Decision(noted=None), "it is not measured yet"


def test_a_plan_that_needs_much_less_than_predicted_gives_way_to_a_faster_one() -> None:
    state = calibrated(1500)
    better, decision = calibrate(state, measured(state, predicted(state) - 1500), Planner)
    assert better.chain.unmodelled_bytes == 0
    assert better.phase is Phase.SETTLE
    assert decision is not None
    assert better.active.schedule == Planner(CHAIN).plan(budget_bytes=BUDGET).schedule
    assert better.active.report.predicted_step_s < state.active.report.predicted_step_s


def test_a_little_slack_is_not_worth_another_plan() -> None:
    state = calibrated(1500)
    settled = after(state, measured(state, predicted(state) - int(0.02 * BUDGET)))
    assert settled.phase is Phase.STEADY
    assert settled.active.schedule == state.active.schedule


def test_a_plan_that_was_seen_to_exceed_the_budget_does_not_run_again() -> None:
    """It alone needs more than the model says: others need less than it taught, so that it seems to fit again."""
    state = calibrated()
    greedy = state.active.schedule
    assert greedy != keep_all(CHAIN)
    state = after(state, measured(state, int(1.3 * BUDGET)))
    ran = [state.active.schedule]
    while state.phase is not Phase.STEADY:
        state = after(state, measured(state, BUDGET // 2))
        ran.append(state.active.schedule)
    assert greedy not in ran


def test_where_every_plan_so_far_exceeded_the_budget_the_next_is_another() -> None:
    """One byte teaches less than the next smaller plan needs, and yet the same plan must not run again."""
    states = [calibrated()]
    for peak_bytes in (BUDGET + 10, BUDGET + 1):
        states.append(after(states[-1], measured(states[-1], peak_bytes)))
    assert len({state.active.schedule for state in states}) == 3


def test_plain_training_that_exceeds_its_budget_is_not_planned_again() -> None:
    state = first_state(Limit(9000))
    state = after(state, measured(state, 0))
    assert state.active.schedule == keep_all(CHAIN)
    state = after(state, measured(state, 9100))
    assert not state.plain_fits
    assert state.active.schedule != keep_all(CHAIN)


# ---- steps that lack blocks ----------------------------------------------------------------------------------------


def test_a_step_that_lacks_blocks_teaches_nothing_until_none_other_seems_to_come() -> None:
    """It needed half the budget, and has not shown what a whole step needs."""
    state = calibrated(500)
    for _ in range(50):
        before = state
        state, decision = calibrate(state, measured(state, BUDGET // 2, is_whole=False), Planner)
        assert decision is None
        assert state == replace(before, num_partial=before.num_partial + 1)
    settled = after(state, measured(state, BUDGET // 2, is_whole=False))
    assert settled.phase is Phase.STEADY
    assert settled.active.schedule == state.active.schedule
    assert settled.active.report.predicted_peak_bytes > BUDGET // 2


def test_a_whole_step_after_one_that_lacks_blocks_is_learned_from() -> None:
    state = calibrated()
    state = after(state, measured(state, BUDGET // 2, is_whole=False))
    assert after(state, measured(state, BUDGET + 10)).active.schedule != state.active.schedule


def test_a_step_that_lacks_blocks_and_exceeds_the_budget_is_learned_from_at_once() -> None:
    state = calibrated()
    state, decision = calibrate(state, measured(state, BUDGET + 10, is_whole=False), Planner)
    assert state.num_partial == 0
    assert decision is not None


# ---- steps that cannot be measured ---------------------------------------------------------------------------------


def test_where_a_first_step_cannot_be_measured_alone_the_model_is_trusted() -> None:
    state, decision = calibrate(first_state(), StepEnded(None), Planner)
    assert state.phase is Phase.STEADY
    assert state.active.report.predicted_peak_bytes <= BUDGET
    assert state.active.schedule != first_state().active.schedule
    assert decision is not None


def test_a_later_step_that_cannot_be_measured_changes_nothing() -> None:
    state = calibrated()
    assert calibrate(state, StepEnded(None), Planner) == (state, None)


# ---- cached plans --------------------------------------------------------------------------------------------------


def cached_plan() -> MeasuredPlan:
    return measured_plan(CHAIN, Planner(CHAIN).plan(budget_bytes=BUDGET).schedule, headroom_bytes=BUDGET)


def cached_state(budget_bytes: int = BUDGET) -> CalibrationState:
    return start(task_of(budget_bytes), cached_plan(), Limit(budget_bytes), Planner, cached_from="cached")


def test_a_cached_plan_runs_at_once_and_is_accepted_where_its_first_step_fits() -> None:
    state = cached_state()
    assert state.phase is Phase.SETTLE
    assert state.active.report.reason == "cached"
    assert state.active.schedule == Planner(CHAIN).plan(budget_bytes=BUDGET).schedule
    accepted, decision = calibrate(state, measured(state, 4321), Planner)
    assert accepted.phase is Phase.STEADY
    assert accepted.active.report.predicted_peak_bytes == 4321
    assert accepted.chain == state.chain, "less than predicted teaches nothing about a plan that was measured before"
    assert decision == Decision(cached_plan(), is_measured=True)


def test_a_cached_plan_that_exceeds_the_budget_is_repaired() -> None:
    state = cached_state()
    repaired = after(state, measured(state, BUDGET + 100))
    assert repaired.cached is None
    assert repaired.phase is Phase.SETTLE
    assert repaired.active.schedule != state.active.schedule
    assert repaired.active.report.predicted_peak_bytes <= BUDGET


def test_a_cached_plan_that_cannot_be_measured_is_trusted() -> None:
    state, decision = calibrate(cached_state(), StepEnded(None), Planner)
    assert state.phase is Phase.STEADY
    assert decision == Decision()
    assert state.active.schedule == cached_state().active.schedule


@pytest.mark.parametrize("budget_bytes", [4000, 7000])
def test_for_another_budget_another_plan_is_made_by_the_cached_costs(budget_bytes: int) -> None:
    state = cached_state(budget_bytes)
    assert state.cached is None
    assert state.phase is Phase.SETTLE
    assert state.active.schedule == Planner(CHAIN).plan(budget_bytes=budget_bytes).schedule


# ---- what changes the limit ----------------------------------------------------------------------------------------


def settled_state() -> CalibrationState:
    state = calibrated()
    return after(state, measured(state, predicted(state)))


def test_optimizer_state_that_takes_more_has_another_plan_made_and_measured() -> None:
    state = replace(settled_state(), limit=Limit(BUDGET - 1000, optimizer_bytes=1000))
    smaller, decision = calibrate(state, OptimizerStateSeen(), Planner)
    assert smaller.phase is Phase.SETTLE
    assert smaller.active.report.reason == "optimizer state"
    assert smaller.active.report.predicted_peak_bytes <= BUDGET - 1000
    assert smaller.active.optimizer_bytes == 1000
    assert decision == Decision()
    assert smaller.active.schedule != state.active.schedule
    assert calibrate(smaller, OptimizerStateSeen(), Planner) == (smaller, None)


def test_during_calibration_optimizer_state_changes_nothing_yet() -> None:
    state = replace(first_state(), limit=Limit(BUDGET - 1000, optimizer_bytes=1000))
    assert calibrate(state, OptimizerStateSeen(), Planner)[1] is None


def test_after_running_out_of_memory_the_next_plan_is_smaller_and_caps_all_later_ones() -> None:
    state = settled_state()
    tighter, decision = calibrate(state, OutOfMemory(0.25), Planner)
    assert tighter.limit.cap_bytes == int(0.75 * predicted(state))
    assert tighter.active.report.predicted_peak_bytes <= tighter.limit.cap_bytes
    assert tighter.active.report.reason == "out of memory"
    assert decision == Decision()
    assert tighter.active.schedule != state.active.schedule
    more = replace(tighter, limit=replace(tighter.limit, size_bytes=2 * BUDGET, optimizer_bytes=1))
    assert after(more, OptimizerStateSeen()).active.report.predicted_peak_bytes <= tighter.limit.cap_bytes


def test_the_smallest_plan_is_the_last_answer_to_running_out_of_memory() -> None:
    smallest = after(settled_state(), OutOfMemory(1.0))
    assert predicted(smallest) == Planner(CHAIN).smallest_bytes
    assert calibrate(smallest, OutOfMemory(1.0), Planner) == (smallest, None)


def test_a_cap_goes_up_with_what_is_learned_about_the_plans_that_it_stands_for() -> None:
    state = calibrated()
    capped = replace(state, limit=replace(state.limit, cap_bytes=BUDGET))
    assert after(capped, measured(capped, predicted(capped) + 20)).limit.cap_bytes == BUDGET + 20


def test_a_share_is_one_of_the_largest_peak_of_plain_training() -> None:
    limit = Limit(None, fraction=0.5, largest_plain_bytes=20_000)
    assert (limit.bytes_for(1000), limit.bytes_for(30_000)) == (10_000, 15_000)
    state = first_state(Limit(None, fraction=1.0))
    plain_bytes = state.active.report.plain_peak_bytes
    assert state.limit.largest_plain_bytes == plain_bytes, "other plans of the target see it"
    state = after(state, measured(state, 0))
    assert state.active.schedule == keep_all(CHAIN)
    settled = after(state, measured(state, plain_bytes + 500))
    assert settled.active.report.budget_bytes == settled.limit.largest_plain_bytes == plain_bytes + 500


# ---- estimated options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 3, 5])
def test_where_not_even_the_smallest_plan_fits_estimated_options_are_measured(block: int) -> None:
    """One that nobody would take, as far as is known."""
    chain = transformer_chain(6)
    first = chain.blocks[block].options[0]
    estimate = replace(first, saved_bytes=3 * first.saved_bytes, backward_s=3 * first.backward_s, is_estimated=True)
    larger = replace(estimate, save_peak_bytes=3 * first.save_peak_bytes, replay_peak_bytes=3 * first.replay_peak_bytes)
    blocks = [replace(b, options=(*b.options, larger)) if k == block else b for k, b in enumerate(chain.blocks)]
    chain = replace(chain, blocks=tuple(blocks))
    budget_bytes = int(1.04 * Planner(chain).smallest_bytes)
    state = start(task_of(budget_bytes), chain, Limit(budget_bytes), Planner)
    state = after(state, measured(state, predicted(state)))
    for _ in range(3):
        state = after(state, measured(state, int(1.2 * budget_bytes)))
    assert state.active.needs_all_options
    assert unmeasured_options(state) == estimated_options(chain) != frozenset()
    assert state.phase is Phase.SETTLE


# ---- the control loop ----------------------------------------------------------------------------------------------


class _Ended:
    """A step that has ended."""

    is_disturbed = is_lost = False
    step_s = 1.0

    def __init__(self, measurement: StepMeasurement | None) -> None:
        self.measured = measurement


def test_the_loop_runs_what_the_reducer_decides_and_tells_what_was_measured() -> None:
    control = control_loop_of(CHAIN, BUDGET)
    state = first_state()
    for _ in range(2):
        assert control.state.phase is not Phase.STEADY
        seen = measured(state, predicted(state))
        ended: Any = _Ended(seen.measurement)
        profile = control.end_step(ended, RunStats())
        assert profile.measured_peak_bytes == seen.measurement.peak_bytes
        assert profile.predicted_peak_bytes == state.active.report.predicted_peak_bytes
        state = after(state, seen)
        assert control.report == state.active.report
    assert control.state.phase is Phase.STEADY
    assert control.observe(OutOfMemory(1.0))
    assert not control.observe(OutOfMemory(1.0))
    assert control.report.predicted_peak_bytes == control.smallest_bytes < middle_bytes(CHAIN)
