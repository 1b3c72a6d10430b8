"""What is flown: a schedule with its report and its script, and how a first one is chosen."""

from dataclasses import dataclass

from tinybp_lightning.config import Budget, Costs
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.profile import PlanReport
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, replay_program_of
from tinybp_lightning.schedule.actions import ForwardSave, Schedule
from tinybp_lightning.schedule.baselines import every_sqrt_n, per_block
from tinybp_lightning.schedule.measured import MeasuredPlan, measured_plan
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import simulate

__all__ = ["ActivePlan", "active_plan_of", "in_users_words", "small_schedule"]

# A known method that needs this share of the budget leaves the rest to what has not been measured yet, the loss.
_SMALL_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class ActivePlan:
    """A schedule in force, ready to play."""

    report: PlanReport
    script: ReplayProgram

    def learned(self) -> MeasuredPlan:
        """What is known of this flight, measured or about to be."""
        report = self.report
        return measured_plan(report.chain, report.schedule, headroom_bytes=report.budget_bytes)


def active_plan_of(
    chain: Chain,
    schedule: Schedule,
    *,
    target: str,
    budget_bytes: int,
    plain_peak_bytes: int,
    reason: str,
    costs: Costs,
) -> ActivePlan:
    """Return the flight of `schedule`."""
    timeline = simulate(chain, schedule)
    report = PlanReport(
        target=target,
        chain=chain,
        schedule=schedule,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=timeline.peak_bytes,
        plain_peak_bytes=plain_peak_bytes,
        predicted_recompute_s=timeline.recompute_s,
        predicted_step_s=timeline.total_s,
        num_kept=sum(isinstance(a, ForwardSave) for a in schedule.actions[: timeline.tail_after + 1]),
        reason=reason,
        costs=costs,
    )
    return ActivePlan(report, replay_program_of(schedule))


def small_schedule(chain: Chain, *, budget_bytes: int) -> Schedule:
    """Return the fastest known method whose peak is far below the budget; the smallest plan where none is."""
    found = [(simulate(chain, schedule), schedule) for schedule in (per_block(chain), every_sqrt_n(chain))]
    small = [(t.total_s, schedule) for t, schedule in found if t.peak_bytes <= _SMALL_SHARE * budget_bytes]
    if small:
        return min(small, key=lambda pair: pair[0])[1]
    return Planner(chain).smallest_plan().schedule


def in_users_words(
    error: BudgetTooSmallError, budget: Budget, target: str, *, budget_bytes: int
) -> BudgetTooSmallError:
    """Return the planner's error in terms of the user's `budget`, of which `budget_bytes` were left to plan with."""
    taken = 0 if budget.size_bytes is None else max(0, budget.size_bytes - budget_bytes)
    smallest_bytes = error.smallest_bytes + taken
    return BudgetTooSmallError(
        f"`{budget.kind.value}={budget.text!r}` ({budget_bytes + taken} bytes) cannot be met by "
        f"`{target}`: the smallest plan for this step needs {smallest_bytes} bytes, set by "
        f"{error.bottleneck}. Raise the budget or lower the batch size.",
        budget_bytes=budget_bytes + taken,
        smallest_bytes=smallest_bytes,
        bottleneck=error.bottleneck,
    )
