"""Frozen records of limits, plans and steps, for the controller, users and loggers. This file imports no framework."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from tinybp_lightning.analysis import format_bytes
from tinybp_lightning.config import Costs
from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Schedule

__all__ = ["Limit", "Observer", "PlanCounts", "PlanReport", "StepMeasurement", "StepProfile", "check_observers"]


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes plans may use above what is alive when a step begins, as read just before an observation.

    `size_bytes`, or `fraction` of the largest peak of plain training that any plan of the target has had so far
    (`largest_plain_bytes`). `cap_bytes`: no plan may use more since one ran out of memory. `optimizer_bytes`: the
    optimizer state that is set aside.
    """

    size_bytes: int | None
    fraction: float | None = None
    largest_plain_bytes: int = 0
    cap_bytes: int | None = None
    optimizer_bytes: int = 0

    def bytes_for(self, plain_bytes: int) -> int:
        """Return the limit, caps aside, for a chain whose plain training peaks at `plain_bytes`."""
        if self.fraction is not None:
            return int(max(self.largest_plain_bytes, plain_bytes) * self.fraction)
        return self.size_bytes or 0


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan in force for one target.

    Sizes are bytes above what was alive when the step began. `plain_peak_bytes` is the predicted peak of plain
    training, `budget_bytes` what the plan may use. `reason`: why the plan was made (`calibration`, `budget`,
    `measured`, `optimizer state`, `out of memory`), or where it came from (`cached`, `larger shape`; the predicted peak
    is then the larger shape's until a step is measured). `costs`: what the seconds stand for; operations are counted at
    `tinybp_lightning.analysis.OPERATIONS_PER_S`. A plan that uses estimated options is reported too, and is made again
    with measured ones before a step runs it.
    """

    target: str
    chain: Chain
    schedule: Schedule
    budget_bytes: int
    predicted_peak_bytes: int
    plain_peak_bytes: int
    predicted_recompute_s: float
    predicted_step_s: float
    num_kept: int
    reason: str
    costs: Costs = Costs.SECONDS

    @property
    def summary(self) -> str:
        """One line for logs."""
        share = self.predicted_recompute_s / self.predicted_step_s if self.predicted_step_s > 0 else 0.0
        return (
            f"{self.target}: {len(self.chain.blocks)} blocks, {self.num_kept} kept, peak "
            f"{format_bytes(self.predicted_peak_bytes)} of {format_bytes(self.budget_bytes)} "
            f"(plain {format_bytes(self.plain_peak_bytes)}), recompute {share:.0%} of the step ({self.reason})"
        )


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """A traced step, in bytes above what was alive when it began; parameter gradients that it made are left out.

    `tail_peak_bytes` is the most between the forward's end and backward's first block, whose levels stand beside it.
    `replay_peak_bytes`: of module steps, by the number of each replayed call: the most from its replay to the next one.
    `keeps_graph`: another backward may follow, so that what autograd has saved stays.
    """

    peak_bytes: int
    forward_end_bytes: int
    tail_peak_bytes: int
    backward_start_bytes: int
    replay_peak_bytes: Mapping[int, int] = field(default_factory=dict[int, int])
    keeps_graph: bool = False


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One finished training step of one target.

    `measured_peak_bytes` is `None` in steps that were not traced: only the first steps are, until the plan is settled.
    Peaks are bytes above what was alive when the step began; parameters' gradients count only under `memory_budget`.
    """

    target: str
    step: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    replayed_blocks: int
    advanced_blocks: int
    out_of_order_blocks: int
    replay_s: float
    step_s: float
    plan_summary: str

    @property
    def recompute_share(self) -> float:
        """The share of the step's forward and backward time that replays took."""
        return self.replay_s / self.step_s if self.step_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PlanCounts:
    """How many graphs one target was traced into, and where their plans came from.

    `num_live` graphs hold plans and pieces now; `num_evicted` times one was evicted for another. `num_measured` plans
    were made from costs measured here, `num_cached` come from an earlier plan for the same program, and `num_larger`
    from that of a larger shape. `num_compiled`: how often a graph's pieces were compiled.
    """

    target: str
    num_graphs: int
    num_live: int
    num_evicted: int
    num_measured: int
    num_cached: int
    num_larger: int
    num_compiled: int

    @property
    def summary(self) -> str:
        """One line for logs."""
        return (
            f"{self.target}: {self.num_graphs} graphs ({self.num_live} live, {self.num_evicted} evicted), plans "
            f"{self.num_measured} measured, {self.num_cached} cached, {self.num_larger} from a larger shape, "
            f"{self.num_compiled} compiled"
        )


class Observer(Protocol):
    """Called by the runtime. An exception that it raises reaches the user."""

    def on_plan(self, plan: PlanReport) -> None:
        """Hear of a plan that was made or repaired."""

    def on_replay(self, profile: StepProfile) -> None:
        """Hear of a step whose backward has ended."""


def check_observers(observers: object) -> None:
    """Raise `ConfigError` if `observers` is not a sequence of observers."""
    if isinstance(observers, (str, bytes)) or not isinstance(observers, Sequence):
        raise ConfigError(f"`observers={observers!r}` is not a sequence: write `observers=[observer]`.")
    for observer in cast("Sequence[Any]", observers):
        missing = [name for name in ("on_plan", "on_replay") if not callable(getattr(observer, name, None))]
        if missing or isinstance(observer, type):
            what = f"a method `{missing[0]}`" if missing else "an instance: it is a class"
            raise ConfigError(
                f"`observers` has a `{type(observer).__name__}` without {what}: an observer has "
                "`on_plan(plan)` and `on_replay(profile)`."
            )
