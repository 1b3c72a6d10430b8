"""What did `tinybp_lightning` say about the step before it ran? The last plan, as a peak and a timeline."""

from dataclasses import dataclass, field

from recipes.timeline import Timeline, downsample
from tinybp_lightning.runtime.profile import PlanReport, StepProfile
from tinybp_lightning.schedule import simulate

__all__ = ["PlanRecorder", "Prediction", "predict"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a mode said about the memory of its own step; `timeline` lasts as long as the mode thinks the step does."""

    peak_bytes: int
    timeline: Timeline
    summary: str


@dataclass(slots=True)
class PlanRecorder:
    """An observer that keeps each target's last plan."""

    plans: dict[str, PlanReport] = field(default_factory=dict[str, PlanReport])

    def on_plan(self, plan: PlanReport) -> None:
        """Keep `plan`, which replaces the target's earlier one."""
        self.plans[plan.target] = plan

    def on_replay(self, profile: StepProfile) -> None:
        """The referee measures steps itself."""

    @property
    def plan(self) -> PlanReport | None:
        """The last plan of the target that needs most memory; `None` when nothing was planned."""
        return max(self.plans.values(), key=lambda plan: plan.plain_peak_bytes, default=None)

    def prediction(self) -> Prediction | None:
        """Return what that plan predicted; `None` when nothing was planned."""
        return None if self.plan is None else predict(self.plan)


def predict(plan: PlanReport) -> Prediction:
    """Return the peak and the memory timeline of `plan`: at each action, its peak from its start to its end."""
    simulated = simulate(plan.chain, plan.schedule)
    times_s: list[float] = []
    live: list[int] = []
    for index, moment in enumerate(simulated.moments):
        moments = (moment, simulated.tail) if index == simulated.tail_after else (moment,)
        for each in moments:
            times_s += (each.start_s, each.start_s, each.end_s, each.end_s)
            live += (each.before_bytes, each.peak_bytes, each.peak_bytes, each.after_bytes)
    return Prediction(plan.predicted_peak_bytes, downsample(Timeline(tuple(times_s), tuple(live))), plan.summary)
