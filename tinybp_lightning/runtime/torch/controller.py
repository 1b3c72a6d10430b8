"""Which schedule is flown, and does it keep its promise? One `Controller` per chain: plan, measure, repair, settle.

Note [Calibration]
    The first step is traced: it shows what no block measurement can, the code after the last block (the loss). It flies
    a known method whose predicted peak leaves most of the budget to that code, or else the smallest plan, which can
    only exceed a budget that no plan meets. The smallest plan of a long chain takes seconds to make, and several times
    plain training's to fly. The second step flies the plan for the budget and is traced too. What measurement shows
    beyond the model is learned as `workspace_bytes`, and the plan is repaired until a traced step is at or under the
    budget. After that nothing is traced.

    A plan may be made with estimates of options that are not compiled. Before it is flown these are compiled and
    measured (`unmeasured`, `learn_options`), and the plan is made again, until it goes by measured options alone. Each
    turn measures one more at least, so there are as many as there are options at most.

    A plan that is known beforehand (from disk, or from a larger shape) has been through this: it is flown at once. Its
    first step is traced all the same, and where that exceeds the budget, the plan is repaired like any other.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum

import torch

from tinybp_lightning.config import Budget, Costs
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.profile import Observer, PlanReport, StepProfile
from tinybp_lightning.runtime.torch.active_plan import ActivePlan, active_plan_of, in_users_words, small_schedule
from tinybp_lightning.runtime.torch.calibration import with_residual, with_tail
from tinybp_lightning.runtime.torch.executors.options import (
    estimated_options,
    measured_part,
    options_to_measure,
    prefer_measured,
    with_measured,
)
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMeasurement, StepMonitor
from tinybp_lightning.runtime.torch.replay.engine import RunStats
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.baselines import keep_all
from tinybp_lightning.schedule.measured import MeasuredPlan, plain_peak_bytes
from tinybp_lightning.schedule.planner.planner import Plan, Planner
from tinybp_lightning.schedule.simulator import simulate

__all__ = ["Controller"]

# Until a step has been measured, this share of the smallest plan's peak is left free for what the model does not see.
_MARGIN = 0.03
# A prediction this far under the measurement is worth a new plan that uses the room.
_SLACK = 0.02
_MAX_TRACES = 5
# Where the largest step that may come is rare, or never comes: branches of which each takes one.
_MAX_PARTIAL = 50


class _Phase(Enum):
    CALIBRATE = "calibration"
    SETTLE = "budget"
    STEADY = "measured"


class Controller:
    """Decides what one chain flies, step by step.

    **Arguments:** `room`: the bytes the plan may use above what is alive when a step begins; asked before each
    planning, and again when the optimizer's state has been seen. `known`: what to fly at once where it suits the room,
    and `known_from` its reason in reports. `on_learned`: told the plan for the budget once the tail is known, with
    `False`, and what was measured to fit once nothing more will change, with `True`. `costs`: what the chain's seconds
    stand for.

    **Raises:** `BudgetTooSmallError` where no plan fits; by the costs of `known`, if there is one.
    """

    def __init__(
        self,
        target: str,
        chain: Chain,
        *,
        budget: Budget,
        room: Headroom,
        device: torch.device,
        observers: Sequence[Observer],
        known: MeasuredPlan | None = None,
        known_from: str = "cached",
        on_learned: Callable[[MeasuredPlan, bool], None] | None = None,
        costs: Costs = Costs.SECONDS,
    ) -> None:
        self._target = target
        self._chain = chain
        self._budget = budget
        self._room = room
        self._device = device
        self._observers = observers
        self._costs = costs
        self._optimizer_bytes = room.optimizer_bytes  # what the plan in force takes it to be
        self._phase = _Phase.CALIBRATE
        self._traces = 0
        self._num_partial = 0
        self._steps = 0
        self._good: ActivePlan | None = None
        self._plain_fits = True  # until it is seen not to
        self._refuted: dict[Schedule, int] = {}  # what was seen to exceed its budget, and by which peak
        self._seen_plain_bytes = 0  # the largest measured peak of a step that kept everything
        self._base_bytes = chain.workspace_bytes
        self._last_planner: tuple[Chain, Planner] | None = None
        self.wants_all_options = False  # no plan is known to fit: one may, once they are measured
        self._on_learned = on_learned
        self._known = known
        if known is not None:
            self._phase = _Phase.SETTLE
            self._chain = known.chain
            self._flight = self._known_flight(known, known_from)
            return
        self._flight = self._first()

    @property
    def script(self) -> ReplayProgram:
        """What the next step plays."""
        return self._flight.script

    @property
    def report(self) -> PlanReport:
        """The plan in force."""
        return self._flight.report

    @property
    def chain(self) -> Chain:
        """The chain with everything learned so far."""
        return self._chain

    @property
    def smallest_bytes(self) -> int:
        """The peak of the smallest plan, as far as is known now."""
        return self._planner().smallest_bytes

    @property
    def is_measuring(self) -> bool:
        """Whether there is still something to learn from the next step."""
        return self._phase is not _Phase.STEADY

    @property
    def unmeasured(self) -> frozenset[tuple[int, int]]:
        """Options (block and number) to be measured before the next step, by what its plan takes and was estimated.

        All that are estimated, where no plan is known to fit; none for the first step, which measured options serve.
        """
        if self.wants_all_options:
            return estimated_options(self._chain)
        if self._phase is _Phase.CALIBRATE:
            return frozenset()
        return options_to_measure(self._chain, self._flight.report.schedule)

    def learn_options(self, measured: Chain) -> None:
        """Plan again with what was measured since: `measured` is the same chain, with fewer options estimated.

        **Raises:** `BudgetTooSmallError` where no plan fits, all options measured.
        """
        self.wants_all_options = False
        self._chain = with_measured(self._chain, measured)
        if self._phase is _Phase.CALIBRATE:
            self._flight = self._first()
        else:
            self._fly(self._for_budget(self._flight.report.reason))

    def refresh(self) -> None:
        """Plan again if the optimizer's state has been seen since."""
        if self._phase is not _Phase.CALIBRATE and self._room.optimizer_bytes != self._optimizer_bytes:
            self._good, self._traces, self._phase = None, 0, _Phase.SETTLE
            self._fly(self._for_budget("optimizer state"))

    def begin_step(self, parameters: Sequence[torch.Tensor]) -> StepMonitor:
        """Start to follow a step."""
        self.refresh()
        return StepMonitor(self._device, parameters, self._budget, wants_trace=self.is_measuring)

    def end_step(self, watch: StepMonitor, stats: RunStats, *, is_whole: bool = True) -> StepProfile:
        """Learn from a step that has ended, tell the observers, and decide what the next one flies.

        **Arguments:** `is_whole`: whether the step ran all blocks; one that did not may have needed less than another.
        """
        self._steps += 1
        flown = self._flight.report
        profile = StepProfile(
            target=self._target,
            step=self._steps,
            predicted_peak_bytes=flown.predicted_peak_bytes,
            measured_peak_bytes=watch.measured.peak_bytes if watch.measured else None,
            replayed_blocks=stats.replayed_blocks,
            advanced_blocks=stats.advanced_blocks,
            out_of_order_blocks=stats.out_of_order_blocks,
            replay_s=stats.replay_s,
            step_s=watch.step_s,
            plan_summary=flown.summary,
        )
        if watch.measured is not None and not watch.is_disturbed:
            self._learn(watch.measured, is_whole=is_whole)
        elif watch.is_lost:
            pass  # the next step is measured
        elif self._known is not None:
            self._phase = _Phase.STEADY  # it was measured when it was made
            self._fly(self._flight)
        elif self._phase is _Phase.CALIBRATE:
            # Several targets in one step: what each one alone needs cannot be told apart, so the model is trusted.
            self._phase = _Phase.STEADY
            self._fly(self._for_budget("budget"))
        for observer in self._observers:
            observer.on_replay(profile)
        return profile

    def tighten(self, share: float) -> bool:
        """Fly a plan whose peak is lower by `share` (1.0: the smallest), and none that needs more from now on.

        **Returns:** whether there was one; if not, the plan in force stays.
        """
        planner = self._planner()
        peak_bytes = simulate(self._chain, self._flight.report.schedule).peak_bytes
        if planner.smallest_bytes >= peak_bytes:
            return False
        self._room.cap_bytes = cap_bytes = max(planner.smallest_bytes, int(peak_bytes * (1 - share)))
        found = planner.plan(budget_bytes=cap_bytes)
        self._good = None
        self._fly(self._flight_of(found.schedule, cap_bytes, "out of memory"))
        return True

    # ---- learning ----------------------------------------------------------------------------------------------

    def _learn(self, measured: StepMeasurement, *, is_whole: bool) -> None:
        if self._flies_plain():
            self._seen_plain_bytes = max(self._seen_plain_bytes, measured.peak_bytes)
        match self._phase:
            case _Phase.CALIBRATE:
                self._learn_tail(measured)
                self._phase = _Phase.SETTLE
                self._fly(self._for_budget("budget"))
                self._tell(self._flight.learned(), is_measured=False)
            case _Phase.SETTLE:
                self._settle(measured, is_whole=is_whole)
            case _Phase.STEADY:
                raise AssertionError("steady steps are not traced")

    def _flies_plain(self) -> bool:
        return self._flight.report.schedule == keep_all(self._chain)

    def _learn_tail(self, measured: StepMeasurement) -> None:
        schedule = self._flight.report.schedule
        self._chain = with_tail(replace(self._chain, workspace_bytes=self._base_bytes), schedule, measured)
        self._learn_residual(schedule, measured.peak_bytes, may_shrink=False)

    def _learn_residual(self, schedule: Schedule, peak_bytes: int, *, may_shrink: bool) -> None:
        before = self._chain.workspace_bytes
        self._chain = with_residual(self._chain, schedule, peak_bytes=peak_bytes, may_shrink=may_shrink)
        if self._room.cap_bytes is not None:  # the same plans are meant: what they need is known better now
            self._room.cap_bytes += self._chain.workspace_bytes - before

    def _settle(self, measured: StepMeasurement, *, is_whole: bool) -> None:
        flown, is_plain = self._flight.report, self._flies_plain()
        if is_plain:  # a share of plain training is one of what was just seen
            budget_bytes = self._capped(self._room(self._plain_peak()))
            flown = replace(flown, budget_bytes=budget_bytes, plain_peak_bytes=self._plain_peak())
        fits = measured.peak_bytes <= flown.budget_bytes
        if not fits:
            self._refuted[flown.schedule] = measured.peak_bytes
        if fits and not is_whole and self._num_partial < _MAX_PARTIAL:
            self._num_partial += 1
            return  # a whole step is still to be measured
        self._traces += 1
        known, self._known = self._known, None
        if known is not None and fits:
            self._phase = _Phase.STEADY
            self._fly(replace(self._flight, report=replace(flown, predicted_peak_bytes=measured.peak_bytes)))
            self._tell(known, is_measured=True)
            return
        self._plain_fits = self._plain_fits and (fits or not is_plain)
        before = self._chain.workspace_bytes
        self._learn_residual(flown.schedule, measured.peak_bytes, may_shrink=fits and is_whole)
        seen_bytes = measured.peak_bytes if is_whole else max(measured.peak_bytes, flown.predicted_peak_bytes)
        shown = replace(flown, chain=self._chain, predicted_peak_bytes=seen_bytes, reason="measured")
        flight = replace(self._flight, report=shown)
        if fits and (self._good is None or flown.predicted_step_s <= self._good.report.predicted_step_s):
            self._good = flight
        slack = before - self._chain.workspace_bytes
        if self._traces < _MAX_TRACES and (not fits or slack > _SLACK * flown.budget_bytes):
            better = self._for_budget("measured")
            while self._is_refuted(better) and self._good is None and not self.wants_all_options:
                self._learn_residual(better.report.schedule, self._refuted[better.report.schedule], may_shrink=False)
                better = self._for_budget("measured")
            if self.wants_all_options:
                self._fly(better)  # not before they are measured, and another plan is made
                return
            is_other = better.report.schedule != flown.schedule and not self._is_refuted(better)
            if is_other and (not fits or better.report.predicted_step_s < flown.predicted_step_s):
                self._fly(better)
                return
        self._phase = _Phase.STEADY
        self._fly(self._good or flight)
        if self._good is not None:
            self._tell(self._good.learned(), is_measured=True)

    def _is_refuted(self, flight: ActivePlan) -> bool:
        return self._refuted.get(flight.report.schedule, 0) > flight.report.budget_bytes

    def _tell(self, known: MeasuredPlan, *, is_measured: bool) -> None:
        if self._on_learned is not None:
            self._on_learned(known, is_measured)

    # ---- planning ----------------------------------------------------------------------------------------------

    def _fly(self, flight: ActivePlan) -> None:
        self._flight, self._known = flight, None
        for observer in self._observers:
            observer.on_plan(flight.report)

    def _first(self) -> ActivePlan:
        """What calibration flies, a margin for what the model does not see included; see Note [Calibration].

        Of the schedules that take measured options alone: it is flown once, and is small enough where it fits.
        """
        part = measured_part(replace(self._chain, workspace_bytes=self._base_bytes))
        plain_peak_bytes = self._plain_peak()
        budget_bytes = self._room(plain_peak_bytes)
        small = small_schedule(part.chain, budget_bytes=budget_bytes)
        schedule = part.renumbered(small)
        margin_bytes = int(_MARGIN * simulate(part.chain, small).peak_bytes)
        self._chain = replace(self._chain, workspace_bytes=self._base_bytes + margin_bytes)
        if simulate(self._chain, schedule).peak_bytes > budget_bytes:
            if plain_peak_bytes <= budget_bytes:  # small models: the engine's own bookkeeping is what does not fit
                return self._flight_of(keep_all(self._chain), budget_bytes, "calibration")
            if estimated_options(self._chain):
                self.wants_all_options = True
            else:
                self._plan(budget_bytes)
        return self._flight_of(schedule, budget_bytes, "calibration")

    def _known_flight(self, known: MeasuredPlan, reason: str) -> ActivePlan:
        """The known plan where the room is about what it was made for, else another one by what was learned."""
        plain_peak_bytes = self._plain_peak()
        budget_bytes = self._capped(self._room(plain_peak_bytes))
        # Where plain training seemed to fit and was not chosen, it was seen not to fit.
        keeps_all = known.plan.schedule == keep_all(self._chain)
        self._plain_fits = keeps_all or plain_peak_bytes > known.plan.budget_bytes
        if known.suits(budget_bytes):
            return self._flight_of(known.plan.schedule, budget_bytes, reason)
        self._known = None
        return self._for_budget(reason)

    def _for_budget(self, reason: str) -> ActivePlan:
        plain_peak_bytes = self._plain_peak()
        self._optimizer_bytes = self._room.optimizer_bytes
        budget_bytes = self._capped(self._room(plain_peak_bytes))
        if self._plain_fits and plain_peak_bytes <= budget_bytes:
            return self._flight_of(keep_all(self._chain), budget_bytes, reason)
        found = self._plan(budget_bytes)
        return self._flight_of(found.schedule, budget_bytes, reason)

    def _capped(self, budget_bytes: int) -> int:
        """The budget, less where a plan of the target ran out of memory; the smallest plan is always tried."""
        if self._room.cap_bytes is None:
            return budget_bytes
        return min(budget_bytes, max(self._room.cap_bytes, self._planner().smallest_bytes))

    def _planner(self) -> Planner:
        """The planner of the chain as it is known now; its tables serve every budget."""
        if self._last_planner is None or self._last_planner[0] is not self._chain:
            self._last_planner = self._chain, Planner(self._chain)
        return self._last_planner[1]

    def _plan(self, budget_bytes: int) -> Plan:
        try:
            return prefer_measured(self._planner().plan(budget_bytes=budget_bytes), self._chain)
        except BudgetTooSmallError as error:
            if estimated_options(self._chain):
                self.wants_all_options = True  # one may need less than estimated: it is not flown before that is known
                return self._planner().smallest_plan()
            raise in_users_words(error, self._budget, self._target, budget_bytes=budget_bytes) from error

    def _plain_peak(self) -> int:
        """Peak of plain training, which needs neither the engine's bookkeeping nor a margin: predicted, or seen."""
        return max(plain_peak_bytes(self._chain), self._seen_plain_bytes)

    def _flight_of(self, schedule: Schedule, budget_bytes: int, reason: str) -> ActivePlan:
        return active_plan_of(
            self._chain,
            schedule,
            target=self._target,
            budget_bytes=budget_bytes,
            plain_peak_bytes=self._plain_peak(),
            reason=reason,
            costs=self._costs,
        )
