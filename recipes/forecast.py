"""Record what `tinybp_lightning` predicts for a step: the last plan's peak and memory timeline."""

from dataclasses import dataclass, field

from recipes.timeline import Timeline, downsample
from tinybp_lightning.runtime.profile import PlanReport, StepProfile
from tinybp_lightning.schedule import simulate

__all__ = ["PlanRecorder", "Prediction", "predict"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a mode predicts for the memory of its step. `timeline` spans the step time that the mode predicts."""

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
        """Do nothing: `recipes.measure` measures the steps."""

    @property
    def plan(self) -> PlanReport | None:
        """The last plan of the target that needs the most memory; `None` when there is no plan."""
        return max(self.plans.values(), key=lambda plan: plan.plain_peak_bytes, default=None)

    def prediction(self) -> Prediction | None:
        """Return the prediction of that plan; `None` when there is no plan."""
        return None if self.plan is None else predict(self.plan)


def predict(plan: PlanReport) -> Prediction:
    """Return the peak and the memory timeline of `plan`: for each action, its peak from its start to its end."""
    simulated = simulate(plan.chain, plan.schedule)
    times_s: list[float] = []
    live: list[int] = []
    for index, moment in enumerate(simulated.moments):
        moments = (moment, simulated.tail) if index == simulated.tail_after else (moment,)
        for each in moments:
            times_s += (each.start_s, each.start_s, each.end_s, each.end_s)
            live += (each.before_bytes, each.peak_bytes, each.peak_bytes, each.after_bytes)
    return Prediction(plan.predicted_peak_bytes, downsample(Timeline(tuple(times_s), tuple(live))), plan.summary)
