"""Draw the demo's picture: the two runs' losses, and the memory of one step of each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from tinybp_lightning.runtime.profile import PlanReport

if TYPE_CHECKING:
    from recipes.demo import Fit

__all__ = ["draw_demo"]

_MIB = 1024**2


def draw_demo(plain: "Fit", ours: "Fit", plan: PlanReport, path: Path) -> None:
    """Draw losses (left) and measured memory over one step (right), and write the picture to `path`."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    _draw_losses(panels[0], plain, ours)
    _draw_memory(panels[1], plain, ours, plan)
    figure.savefig(path, dpi=120)


def _draw_losses(panel: Any, plain: "Fit", ours: "Fit") -> None:
    panel.plot([t.item() for t in plain.losses], color="0.6", linewidth=4, label=plain.name)
    panel.plot([t.item() for t in ours.losses], color="tab:blue", linewidth=1.2, label=ours.name)
    panel.set_title("loss: the two runs")
    panel.set_xlabel("step")
    panel.set_ylabel("cross-entropy (nats per byte)")
    panel.legend()


def _draw_memory(panel: Any, plain: "Fit", ours: "Fit", plan: PlanReport) -> None:
    for fit, color in ((plain, "0.6"), (ours, "tab:blue")):
        timeline = fit.memory.timeline
        sizes = [b / _MIB for b in timeline.live_bytes]
        panel.fill_between(timeline.time_s, sizes, color=color, alpha=0.3, linewidth=0)
        panel.plot(timeline.time_s, sizes, color=color, linewidth=0.8, label=f"{fit.name}, measured")
    panel.axhline(plan.budget_bytes / _MIB, color="tab:red", linestyle="--", linewidth=1, label="budget")
    panel.set_title("activations alive in one step")
    panel.set_xlabel("seconds in the step (profiled)")
    panel.set_ylabel("MiB")
    panel.set_ylim(bottom=0)
    panel.legend(loc="upper right")
