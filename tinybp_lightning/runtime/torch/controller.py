"""Choose the plan for the next step of one chain, and recalibrate it from what measured steps have shown.

A reducer over frozen data: it reads no clock, allocator or device; `control_loop.py` observes and acts.

Note [Calibration]
    The first step is traced, because only a whole step shows the code after the last block (the loss). It runs a known
    method whose predicted peak leaves most of the budget to that code, or else the smallest plan, which exceeds a
    budget only if every plan does. We prefer the known method because the smallest plan of a long chain takes seconds
    to make, and its step takes several times as long as plain training's. The second step runs the plan for the budget.
    What it needs beyond the model is learned as `unmodelled_bytes`, and the plan is repaired until a traced step is at
    or under the budget. After that no step is traced.

    A plan may use options that are estimated because they are not compiled yet. They are compiled and measured before
    it runs, and the plan is made again, until it uses measured options only. Each round measures at least one more
    option, so the rounds end.

    A plan from the cache has been through all this and runs at once. Its first step is traced, and repaired if needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never

from tinybp_lightning.config import Budget, Costs
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.profile import Limit, PlanReport, StepMeasurement
from tinybp_lightning.runtime.torch.executors.options import (
    estimated_options,
    measured_part,
    options_to_measure,
    prefer_measured,
    with_measured,
)
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, replay_program_of
from tinybp_lightning.schedule.actions import ForwardSave, Schedule
from tinybp_lightning.schedule.baselines import every_sqrt_n, keep_all, per_block
from tinybp_lightning.schedule.measured import MeasuredPlan, measured_plan, plain_peak_bytes
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import Timeline, simulate

__all__ = [
    "ActivePlan",
    "CalibrationState",
    "Decision",
    "Observation",
    "OptimizerStateSeen",
    "OptionsMeasured",
    "OutOfMemory",
    "Phase",
    "StepEnded",
    "Task",
    "calibrate",
    "small_schedule",
    "start",
    "unmeasured_options",
]

# Until a step has been measured, this share of the smallest plan's peak is left free for what the model does not see.
_MARGIN = 0.03
# If the prediction exceeds the measurement by this share of the budget, we make a plan that uses the difference.
_SLACK = 0.02
_MAX_TRACES = 5
# After this many measured steps that lacked blocks we stop waiting for a whole one, which may be rare or never come.
_MAX_PARTIAL = 50
# Results of fewer bytes are losses.
_LOSS_BYTES = 64
# A known method may take this share of the budget in the first step; the rest is for what is not measured, the loss.
_SMALL_SHARE = 1 / 3

PlannerOf = Callable[[Chain], Planner]
"""Returns the planner of a chain; the caller keeps it, because its tables serve every budget."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a chain's plans are for: the target's name, the user's budget, and what the chain's seconds stand for."""

    target: str
    budget: Budget
    costs: Costs = Costs.SECONDS


@dataclass(frozen=True, slots=True)
class ActivePlan:
    """The plan that the next step runs. `optimizer_bytes`: the optimizer state that was set aside for it.

    `needs_all_options`: it exceeds the budget by estimated costs, so all options must be measured to be certain.
    """

    report: PlanReport
    program: ReplayProgram
    optimizer_bytes: int
    needs_all_options: bool = False

    @property
    def schedule(self) -> Schedule:
        """What it runs, as the planner wrote it."""
        return self.report.schedule


class Phase(Enum):
    """What the next measured step will show: the code after the last block, whether the plan fits, or nothing new."""

    CALIBRATE = "calibrate"
    SETTLE = "settle"
    STEADY = "steady"


@dataclass(frozen=True, slots=True)
class CalibrationState:
    """Everything that is known about one chain.

    `chain` includes what was learned; `base_bytes` are the unmodelled bytes that it had before. `plan`: the active one.
    `fitting`: the fastest plan that was measured to fit. `small`: the first step's, with its measured peak, to fall
    back on. `plain_fits`: plain training has not been seen to exceed the budget. `exceeded`: the peak of each schedule
    that was. `plain_bytes`: the largest measured peak of a step that kept everything. `cached`: the cached plan that
    runs now, until a step has been measured.
    """

    task: Task
    limit: Limit
    chain: Chain
    base_bytes: int
    plan: ActivePlan | None = None
    phase: Phase = Phase.CALIBRATE
    num_traces: int = 0
    num_partial: int = 0
    fitting: ActivePlan | None = None
    small: ActivePlan | None = None
    plain_fits: bool = True
    exceeded: Mapping[Schedule, int] = field(default_factory=dict[Schedule, int])
    plain_bytes: int = 0
    cached: MeasuredPlan | None = None

    @property
    def active(self) -> ActivePlan:
        """The plan that the next step runs."""
        assert self.plan is not None, "`start` chooses the first plan"
        return self.plan


@dataclass(frozen=True, slots=True)
class StepEnded:
    """A step ended. `measurement` is `None` if it could not be measured alone: several targets took part in it, say.

    `is_whole`: it ran all blocks; one that did not may have needed less than another will.
    """

    measurement: StepMeasurement | None
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class OptionsMeasured:
    """More options were measured: `chain` is the same chain with fewer estimates, as measured, nothing learned."""

    chain: Chain


@dataclass(frozen=True, slots=True)
class OptimizerStateSeen:
    """The limit sets another size of optimizer state aside than the active plan was made for."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A step ran out of memory: the next plan's peak is to be lower by `share`; 1.0 asks for the smallest plan."""

    share: float


Observation = StepEnded | OptionsMeasured | OptimizerStateSeen | OutOfMemory


@dataclass(frozen=True, slots=True)
class Decision:
    """Run the state's plan from the next step on, tell the observers, and note `noted` in the cache if there is one.

    `is_measured`: `noted` was measured to fit; if not, it is the best guess after the first step.
    """

    noted: MeasuredPlan | None = None
    is_measured: bool = False


_Next = tuple[CalibrationState, Decision | None]


def start(
    task: Task, found: Chain | MeasuredPlan, limit: Limit, planner_of: PlannerOf, *, cached_from: str = "cached"
) -> CalibrationState:
    """Return the state before the first step: of a chain that was just measured, or of a cached plan with its chain.

    **Raises:** `BudgetTooSmallError` where no plan fits by the costs of `found`.
    """
    if isinstance(found, Chain):
        state = CalibrationState(task, limit, found, found.unmodelled_bytes)
        return _with_plain_peak(_with_first_plan(state, planner_of))
    chain, schedule = found.chain, found.plan.schedule
    state = CalibrationState(task, limit, chain, chain.unmodelled_bytes, phase=Phase.SETTLE)
    # If plain training seemed to fit and was not chosen, a step had shown that it does not.
    state = replace(state, plain_fits=schedule == keep_all(chain) or _plain_peak(state) > found.plan.budget_bytes)
    budget_bytes = _budget(state, planner_of)
    if found.suits(budget_bytes):
        state = replace(state, plan=_active_plan(state, schedule, budget_bytes, cached_from), cached=found)
    else:
        state = replace(state, plan=_for_budget(state, cached_from, planner_of))
    return _with_plain_peak(state)


def calibrate(state: CalibrationState, seen: Observation, planner_of: PlannerOf) -> _Next:
    """Return the state after an observation, and the decision to run its plan; `None` where the active plan stays.

    **Arguments:** `state`: with the `limit` as it is at this moment. The returned limit may have another cap and
    another largest plain peak, which hold for all plans of the target.

    **Raises:** `BudgetTooSmallError` where no plan fits any more.
    """
    decision: Decision | None
    match seen:
        case StepEnded(measurement=StepMeasurement() as measured, is_whole=is_whole):
            state, decision = _after_measured_step(state, measured, is_whole, planner_of)
        case StepEnded():
            state, decision = _after_unmeasured_step(state, planner_of)
        case OptionsMeasured(chain=chain):
            state = replace(state, chain=with_measured(state.chain, chain))
            if state.phase is Phase.CALIBRATE:
                state, decision = _with_first_plan(state, planner_of), None
            else:
                state, decision = _run(state, _for_budget(state, state.active.report.reason, planner_of))
        case OptimizerStateSeen():
            state, decision = _after_optimizer_state(state, planner_of)
        case OutOfMemory(share=share):
            state, decision = _tightened(state, share, planner_of)
        case _:
            assert_never(seen)
    return _with_plain_peak(state), decision


def unmeasured_options(state: CalibrationState) -> frozenset[tuple[int, int]]:
    """Return the options (block and number) that must be measured before the active plan runs."""
    if state.active.needs_all_options:
        return estimated_options(state.chain)
    if state.phase is Phase.CALIBRATE:  # the first step's plan uses measured options only
        return frozenset()
    return options_to_measure(state.chain, state.active.schedule)


def _after_measured_step(
    state: CalibrationState, measured: StepMeasurement, is_whole: bool, planner_of: PlannerOf
) -> _Next:
    assert state.phase is not Phase.STEADY, "steady steps are not traced"
    schedule = state.active.schedule
    if schedule == keep_all(state.chain):
        state = replace(state, plain_bytes=max(state.plain_bytes, measured.peak_bytes))
    if state.phase is Phase.CALIBRATE and not is_whole:  # what follows the last block is not what follows a whole step
        if state.num_partial < _MAX_PARTIAL:
            return replace(state, num_partial=state.num_partial + 1), None
        return _after_unmeasured_step(state, planner_of)
    if state.phase is Phase.SETTLE:
        return _settled(state, measured.peak_bytes, is_whole, planner_of)
    chain = _with_tail(replace(state.chain, unmodelled_bytes=state.base_bytes), schedule, measured)
    state = _with_residual(replace(state, chain=chain), schedule, measured.peak_bytes, may_shrink=False)
    small = replace(state.active.report, chain=state.chain, predicted_peak_bytes=measured.peak_bytes, reason="measured")
    state = replace(state, small=replace(state.active, report=small))
    plan = _for_budget(state, "budget", planner_of)
    return _run(replace(state, phase=Phase.SETTLE), plan, Decision(_as_measured(plan)))


def _after_unmeasured_step(state: CalibrationState, planner_of: PlannerOf) -> _Next:
    if state.cached is not None:  # it was measured when it was made
        return _run(replace(state, phase=Phase.STEADY), state.active)
    if state.phase is not Phase.CALIBRATE:
        return state, None
    # What each of several targets needs alone cannot be told apart, so the model is trusted.
    return _run(replace(state, phase=Phase.STEADY), _for_budget(state, "budget", planner_of))


def _after_optimizer_state(state: CalibrationState, planner_of: PlannerOf) -> _Next:
    if state.phase is Phase.CALIBRATE or state.limit.optimizer_bytes == state.active.optimizer_bytes:
        return state, None
    plan = _for_budget(state, "optimizer state", planner_of)
    return _run(replace(state, fitting=None, num_traces=0, phase=Phase.SETTLE), plan)


def _tightened(state: CalibrationState, share: float, planner_of: PlannerOf) -> _Next:
    planner = planner_of(state.chain)
    peak_bytes = simulate(state.chain, state.active.schedule).peak_bytes
    if planner.smallest_bytes >= peak_bytes:
        return state, None
    cap_bytes = max(planner.smallest_bytes, int(peak_bytes * (1 - share)))
    state = replace(state, limit=replace(state.limit, cap_bytes=cap_bytes), fitting=None)
    schedule = planner.plan(budget_bytes=cap_bytes).schedule
    plan = _active_plan(state, schedule, cap_bytes, "out of memory")
    return _run(state, replace(plan, optimizer_bytes=state.active.optimizer_bytes))


def _settled(state: CalibrationState, peak_bytes: int, is_whole: bool, planner_of: PlannerOf) -> _Next:
    """Accept the plan that ran, or repair it, by the step's measured peak."""
    ran = state.active.report
    is_plain = ran.schedule == keep_all(state.chain)
    if is_plain:  # a budget that is a share of plain training is a share of what was just measured
        ran = replace(ran, budget_bytes=_budget(state, planner_of), plain_peak_bytes=_plain_peak(state))
    fits = peak_bytes <= ran.budget_bytes
    if not fits:
        state = replace(state, exceeded={**state.exceeded, ran.schedule: peak_bytes})
    if fits and not is_whole and state.num_partial < _MAX_PARTIAL:
        return replace(state, num_partial=state.num_partial + 1), None  # a whole step is still to be measured
    cached, before_bytes = state.cached, state.chain.unmodelled_bytes
    state = replace(state, num_traces=state.num_traces + 1, cached=None)
    if cached is not None and fits:
        plan = replace(state.active, report=replace(ran, predicted_peak_bytes=peak_bytes))
        return _run(replace(state, phase=Phase.STEADY), plan, Decision(cached, is_measured=True))
    state = replace(state, plain_fits=state.plain_fits and (fits or not is_plain))
    state = _with_residual(state, ran.schedule, peak_bytes, may_shrink=fits and is_whole)
    shown_bytes = peak_bytes if is_whole else max(peak_bytes, ran.predicted_peak_bytes)
    shown = replace(ran, chain=state.chain, predicted_peak_bytes=shown_bytes, reason="measured")
    plan = replace(state.active, report=shown)
    if fits and (state.fitting is None or ran.predicted_step_s <= state.fitting.report.predicted_step_s):
        state = replace(state, fitting=plan)
    slack_bytes = before_bytes - state.chain.unmodelled_bytes
    if state.num_traces < _MAX_TRACES and (not fits or slack_bytes > _SLACK * ran.budget_bytes):
        state, better = _better_plan(state, ran, fits=fits, planner_of=planner_of)
        if better is not None:
            return _run(state, better)
    state = replace(state, phase=Phase.STEADY)
    if state.fitting is None:
        return _run(state, plan)
    return _run(state, state.fitting, Decision(_as_measured(state.fitting), is_measured=True))


def _better_plan(
    state: CalibrationState, ran: PlanReport, *, fits: bool, planner_of: PlannerOf
) -> tuple[CalibrationState, ActivePlan | None]:
    """Return another plan than the one that `ran`: one that may fit, or a faster one if that one fits."""
    better = _for_budget(state, "measured", planner_of)
    while _was_exceeded(state, better) and state.fitting is None and not better.needs_all_options:
        state = _with_residual(state, better.schedule, state.exceeded[better.schedule], may_shrink=False)
        better = _for_budget(state, "measured", planner_of)
    if better.needs_all_options:
        return state, better  # it does not run before they are measured, and another plan is made
    is_other = better.schedule != ran.schedule and not _was_exceeded(state, better)
    is_better = not fits or better.report.predicted_step_s < ran.predicted_step_s
    return state, better if is_other and is_better else None


def _was_exceeded(state: CalibrationState, plan: ActivePlan) -> bool:
    return state.exceeded.get(plan.schedule, 0) > plan.report.budget_bytes


def _run(state: CalibrationState, plan: ActivePlan, decision: Decision | None = None) -> _Next:
    return replace(state, plan=plan, cached=None), decision or Decision()


def _as_measured(plan: ActivePlan) -> MeasuredPlan:
    report = plan.report
    return measured_plan(report.chain, report.schedule, headroom_bytes=report.budget_bytes)


def _with_plain_peak(state: CalibrationState) -> CalibrationState:
    """Let the limit's share be one of the largest plain peak, this chain's included."""
    largest_bytes = max(state.limit.largest_plain_bytes, state.active.report.plain_peak_bytes, state.plain_bytes)
    return replace(state, limit=replace(state.limit, largest_plain_bytes=largest_bytes))


def _with_tail(chain: Chain, schedule: Schedule, measured: StepMeasurement) -> Chain:
    """Return `chain` with the code after its last block as it was `measured` in a step that ran `schedule`."""
    missing_bytes = simulate(chain, schedule).tail.after_bytes - measured.backward_start_bytes
    if missing_bytes > 0:  # that code made fewer gradients of the last block's results than the chain presumes
        *others, last = chain.boundaries
        last = replace(last, gradient_bytes=last.gradient_bytes - min(missing_bytes, last.gradient_bytes))
        chain = replace(chain, boundaries=(*others, last))
    live_bytes = max(0, measured.backward_start_bytes - simulate(chain, schedule).tail.after_bytes)
    peak_bytes = max(0, measured.tail_peak_bytes - measured.forward_end_bytes)
    return replace(chain, tail_peak_bytes=max(peak_bytes, live_bytes), tail_live_bytes=live_bytes)


def _with_assumed_tail(chain: Chain) -> Chain:
    """Return `chain` with code after its last block that needs more than a loss does, as far as one can tell.

    The caller holds all results to the end, and if they are not the loss itself, a loss like the cross-entropy has four
    tensors of their size at once before the blocks' backward begins.
    """
    first, last = chain.boundaries[0], chain.boundaries[-1]
    held_bytes = sum(chain.storage_bytes[s] for s in last.storages if s not in first.storages)
    made_bytes = 4 * last.gradient_bytes if last.gradient_bytes > _LOSS_BYTES else 0
    return replace(chain, tail_peak_bytes=held_bytes + made_bytes, tail_live_bytes=held_bytes)


def _with_residual(
    state: CalibrationState, schedule: Schedule, peak_bytes: int, *, may_shrink: bool
) -> CalibrationState:
    """Learn the unmodelled bytes with which `schedule` is predicted to peak at `peak_bytes`; fewer if `may_shrink`."""
    residual_bytes = peak_bytes - simulate(state.chain, schedule).peak_bytes
    if residual_bytes <= 0 and not may_shrink:
        return state
    before_bytes = state.chain.unmodelled_bytes
    chain = replace(state.chain, unmodelled_bytes=max(0, before_bytes + residual_bytes))
    limit = state.limit
    if limit.cap_bytes is not None:  # the cap stands for the same plans: only their prediction has changed
        limit = replace(limit, cap_bytes=limit.cap_bytes + chain.unmodelled_bytes - before_bytes)
    return replace(state, chain=chain, limit=limit)


def _plain_peak(state: CalibrationState) -> int:
    """Return the peak of plain training, without the engine's bookkeeping and the margin: predicted, or measured."""
    return max(plain_peak_bytes(state.chain), state.plain_bytes)


def _with_first_plan(state: CalibrationState, planner_of: PlannerOf) -> CalibrationState:
    """Choose the plan of the first step (Note [Calibration]), by measured options only: it runs once."""
    part = measured_part(replace(state.chain, unmodelled_bytes=state.base_bytes))
    plain_bytes = _plain_peak(state)
    budget_bytes = state.limit.bytes_for(plain_bytes)
    small, timeline = small_schedule(part.chain, budget_bytes=budget_bytes, planner_of=planner_of)
    schedule, needs_all_options = part.renumbered(small), False
    margin_bytes = int(_MARGIN * timeline.peak_bytes)
    state = replace(state, chain=replace(state.chain, unmodelled_bytes=state.base_bytes + margin_bytes))
    if timeline.peak_bytes + margin_bytes > budget_bytes:
        if plain_bytes <= budget_bytes:  # of a small model: it is the engine's bookkeeping that does not fit
            schedule = keep_all(state.chain)
        elif estimated_options(state.chain):
            needs_all_options = True
        else:
            _fastest(state, budget_bytes, planner_of)  # raises where no other schedule fits either
    plan = _active_plan(state, schedule, budget_bytes, "calibration", needs_all_options=needs_all_options)
    return replace(state, plan=plan)


def small_schedule(chain: Chain, *, budget_bytes: int, planner_of: PlannerOf = Planner) -> tuple[Schedule, Timeline]:
    """Return the fastest known method whose peak is far below the budget, or else the smallest plan."""
    found = [(schedule, simulate(chain, schedule)) for schedule in (per_block(chain), every_sqrt_n(chain))]
    small = [(schedule, t) for schedule, t in found if t.peak_bytes <= _SMALL_SHARE * budget_bytes]
    if small:
        return min(small, key=lambda pair: pair[1].total_s)
    schedule = planner_of(chain).smallest_plan().schedule
    return schedule, simulate(chain, schedule)


def _for_budget(state: CalibrationState, reason: str, planner_of: PlannerOf) -> ActivePlan:
    """Return the fastest plan within the limit, by everything that is known."""
    budget_bytes = _budget(state, planner_of)
    if state.plain_fits and _plain_peak(state) <= budget_bytes:
        return _active_plan(state, keep_all(state.chain), budget_bytes, reason)
    try:
        schedule, needs_all = _fastest(state, budget_bytes, planner_of)
    except BudgetTooSmallError:
        # What other plans showed may be more than the smallest needs: what was measured to fit is never refused.
        if state.small is None or state.small.report.predicted_peak_bytes > budget_bytes:
            raise
        return replace(state.small, report=replace(state.small.report, budget_bytes=budget_bytes))
    return _active_plan(state, schedule, budget_bytes, reason, needs_all_options=needs_all)


def _budget(state: CalibrationState, planner_of: PlannerOf) -> int:
    """Return the limit, or the cap that an out-of-memory error has set; the smallest plan may always be tried."""
    budget_bytes, cap_bytes = state.limit.bytes_for(_plain_peak(state)), state.limit.cap_bytes
    if cap_bytes is None:
        return budget_bytes
    return min(budget_bytes, max(cap_bytes, planner_of(state.chain).smallest_bytes))


def _fastest(state: CalibrationState, budget_bytes: int, planner_of: PlannerOf) -> tuple[Schedule, bool]:
    """Return the fastest schedule within the budget, and whether all options must be measured to know if any fits."""
    planner = planner_of(state.chain)
    try:
        return prefer_measured(planner.plan(budget_bytes=budget_bytes), state.chain, planner_of).schedule, False
    except BudgetTooSmallError as error:
        if estimated_options(state.chain):  # one of them may need less than its estimate
            return planner.smallest_plan().schedule, True
        # In terms of the user's budget, of which `budget_bytes` were left to plan with.
        budget = state.task.budget
        user_bytes = budget_bytes if budget.size_bytes is None else max(budget_bytes, budget.size_bytes)
        needed_bytes = smallest_bytes = error.smallest_bytes + user_bytes - budget_bytes
        needs = f"the smallest plan for this step needs {needed_bytes} bytes, set by {error.bottleneck}"
        if state.phase is Phase.CALIBRATE and state.small is None:
            smallest_bytes = planner_of(_with_assumed_tail(state.chain)).smallest_bytes + user_bytes - budget_bytes
            if smallest_bytes > needed_bytes:
                needs += f", without the loss, which is not known before a step has run: {smallest_bytes} are enough"
        raise BudgetTooSmallError(
            f"`{budget.kind.value}={budget.text!r}` ({user_bytes} bytes) cannot be met by `{state.task.target}`: "
            f"{needs}. Raise the budget or lower the batch size.",
            budget_bytes=user_bytes,
            smallest_bytes=smallest_bytes,
            bottleneck=error.bottleneck,
        ) from error


def _active_plan(
    state: CalibrationState, schedule: Schedule, budget_bytes: int, reason: str, *, needs_all_options: bool = False
) -> ActivePlan:
    timeline = simulate(state.chain, schedule)
    report = PlanReport(
        target=state.task.target,
        chain=state.chain,
        schedule=schedule,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=timeline.peak_bytes,
        plain_peak_bytes=_plain_peak(state),
        predicted_recompute_s=timeline.recompute_s,
        predicted_step_s=timeline.total_s,
        num_kept=sum(isinstance(a, ForwardSave) for a in schedule.actions[: timeline.tail_after + 1]),
        reason=reason,
        costs=state.task.costs,
    )
    return ActivePlan(report, replay_program_of(schedule), state.limit.optimizer_bytes, needs_all_options)
