"""Record plans and steps for the checks that benchmarks make afterwards."""

from dataclasses import dataclass, field

from tinybp_lightning.runtime.profile import Observer, PlanReport, StepProfile

__all__ = ["Listener"]


@dataclass(slots=True)
class Listener(Observer):
    """An observer that keeps the reports of plans and of steps, in order."""

    plans: list[PlanReport] = field(default_factory=list[PlanReport])
    profiles: list[StepProfile] = field(default_factory=list[StepProfile])

    def on_plan(self, plan: PlanReport) -> None:
        self.plans.append(plan)

    def on_replay(self, profile: StepProfile) -> None:
        self.profiles.append(profile)
