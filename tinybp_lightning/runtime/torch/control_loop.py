"""Carry out what the controller decides for one chain: read the limit, follow steps, tell observers, note plans."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from tinybp_lightning.config import Costs, HCBConfig
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.profile import Observer, PlanReport, StepProfile
from tinybp_lightning.runtime.torch.cache.memory import PlanCache
from tinybp_lightning.runtime.torch.controller import (
    Observation,
    OptimizerStateSeen,
    Phase,
    StepEnded,
    Task,
    calibrate,
    start,
)
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom, TargetMemory
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMonitor
from tinybp_lightning.runtime.torch.messages import WarnOnce
from tinybp_lightning.runtime.torch.replay.engine import RunStats
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram
from tinybp_lightning.schedule.measured import MeasuredPlan
from tinybp_lightning.schedule.planner.planner import Planner

__all__ = ["ControlLoop", "TargetContext"]


@dataclass(frozen=True, slots=True)
class TargetContext:
    """What all graphs and module steps of one target share."""

    name: str
    config: HCBConfig
    observers: tuple[Observer, ...]
    memory: TargetMemory
    plans: PlanCache
    warn: WarnOnce = field(default_factory=WarnOnce)


class ControlLoop:
    """Runs the steps of one chain under the controller's plans.

    **Arguments:** `found`: the chain as it was measured, or a cached plan with its chain; `cached_from`: where that
    plan is from, for reports. `note_plan`: called with a plan worth caching, and whether it was measured to fit.
    """

    def __init__(
        self,
        context: TargetContext,
        found: Chain | MeasuredPlan,
        *,
        headroom: Headroom,
        device: torch.device,
        costs: Costs = Costs.SECONDS,
        cached_from: str = "cached",
        note_plan: Callable[[MeasuredPlan, bool], None] | None = None,
    ) -> None:
        self.headroom = headroom
        self.device = device
        self._observers = context.observers
        self._note_plan = note_plan
        self._num_steps = 0
        self._refused: BudgetTooSmallError | None = None
        # Of the last two chains, all options and the measured ones: a planner's tables serve every budget.
        self._planner_of = lru_cache(maxsize=2)(Planner)
        task = Task(context.name, context.config.budget, costs)
        self.state = start(task, found, headroom.read(), self._planner_of, cached_from=cached_from)
        headroom.share(self.state.limit)

    @property
    def program(self) -> ReplayProgram:
        """What the next step replays."""
        return self.state.active.program

    @property
    def report(self) -> PlanReport:
        """The plan in force."""
        return self.state.active.report

    @property
    def smallest_bytes(self) -> int:
        """The peak of the smallest plan, as far as is known now."""
        return self._planner_of(self.state.chain).smallest_bytes

    def refresh(self) -> None:
        """Plan again if the optimizer's state has been seen since."""
        if self.headroom.optimizer_bytes != self.state.active.optimizer_bytes:
            self.observe(OptimizerStateSeen())

    def begin_step(self, parameters: Sequence[torch.Tensor]) -> StepMonitor:
        """Start to follow a step. Raises `BudgetTooSmallError` if the last one has shown that no plan fits."""
        if (refused := self._refused) is not None:
            self._refused = None
            raise refused
        self.refresh()
        wants_trace = self.state.phase is not Phase.STEADY
        return StepMonitor(self.device, parameters, self.state.task.budget, wants_trace=wants_trace)

    def end_step(self, monitor: StepMonitor, stats: RunStats, *, is_whole: bool = True) -> StepProfile:
        """Learn from a step that has ended (`is_whole`: it ran all blocks), and tell the observers about it."""
        self._num_steps += 1
        ran, measured = self.report, monitor.measured
        profile = StepProfile(
            target=self.state.task.target,
            step=self._num_steps,
            predicted_peak_bytes=ran.predicted_peak_bytes,
            measured_peak_bytes=None if measured is None else measured.peak_bytes,
            replayed_blocks=stats.replayed_blocks,
            advanced_blocks=stats.advanced_blocks,
            out_of_order_blocks=stats.out_of_order_blocks,
            replay_s=stats.replay_s,
            step_s=monitor.step_s,
            plan_summary=ran.summary,
        )
        try:
            if measured is not None and not monitor.is_disturbed:
                self.observe(StepEnded(measured, is_whole))
            elif self.state.phase is not Phase.STEADY and not monitor.is_lost:
                self.observe(StepEnded(None))  # if its trace was lost, the next step is measured instead
        except BudgetTooSmallError as error:
            self._refused = error  # we may be inside `optimizer.step()`: the next forward is the place to refuse
        for observer in self._observers:
            observer.on_replay(profile)
        return profile

    def observe(self, seen: Observation) -> bool:
        """Let the controller decide, and act on it. Returns whether it chose a plan; if not, the one in force stays."""
        state = replace(self.state, limit=self.headroom.read())
        self.state, decision = calibrate(state, seen, self._planner_of)
        self.headroom.share(self.state.limit)
        if decision is None:
            return False
        for observer in self._observers:
            observer.on_plan(self.report)
        if decision.noted is not None and self._note_plan is not None:
            self._note_plan(decision.noted, decision.is_measured)
        return True
