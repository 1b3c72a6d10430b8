"""Hold a plan that a training step has measured, and the chain with its measured costs."""

from dataclasses import dataclass, replace

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.baselines import keep_all
from tinybp_lightning.schedule.planner.planner import Plan
from tinybp_lightning.schedule.simulator import simulate

__all__ = ["MeasuredPlan", "measured_plan", "plain_peak_bytes"]

_MUCH = 0.02
"""With this share more headroom, another plan may be faster."""


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """A plan that was measured to fit, and the chain as it was known then, tail and unmodelled bytes included.

    `plan.budget_bytes` is the budget it ran under.
    """

    chain: Chain
    plan: Plan

    def suits(self, headroom_bytes: int) -> bool:
        """Whether the plan fits into `headroom_bytes`, and was made for about as much."""
        return self.plan.peak_bytes <= headroom_bytes <= self.plan.budget_bytes * (1 + _MUCH)


def plain_peak_bytes(chain: Chain) -> int:
    """Return the predicted peak of plain training, which needs nothing of the engine's."""
    return simulate(replace(chain, unmodelled_bytes=0), keep_all(chain)).peak_bytes


def measured_plan(chain: Chain, schedule: Schedule, *, headroom_bytes: int) -> MeasuredPlan:
    """Return `schedule` as a plan that was measured to fit into `headroom_bytes`.

    **Arguments:** `chain`: with the costs that were measured.
    """
    timeline = simulate(chain, schedule)
    found = Plan(schedule, headroom_bytes, timeline.peak_bytes, timeline.total_s, timeline.recompute_s)
    return MeasuredPlan(chain, found)
