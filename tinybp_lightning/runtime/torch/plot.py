"""How does a plan's memory look over one step? A picture, drawn from the simulator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinybp_lightning.runtime.profile import PlanReport
from tinybp_lightning.schedule import Schedule, keep_all, simulate

__all__ = ["plot_plans"]

_MIB = 1024**2


def plot_plans(plans: Sequence[PlanReport], path: Path) -> Path:
    """Draw one panel per plan: predicted bytes over the step, plain training behind it, the budget as a line."""
    figure = Figure(figsize=(9, 3.2 * len(plans)), layout="constrained")
    panels: Any = figure.subplots(len(plans), 1, squeeze=False)
    for panel, plan in zip(panels[:, 0], plans, strict=True):
        _draw(panel, plan, keep_all(plan.chain), "plain training", "0.7")
        _draw(panel, plan, plan.schedule, "this plan", "tab:blue")
        panel.axhline(plan.budget_bytes / _MIB, color="tab:red", linestyle="--", linewidth=1, label="budget")
        panel.set_title(plan.summary, fontsize=9)
        panel.set_xlabel("time in the step, predicted (ms)")
        panel.set_ylabel("activations (MiB)")
        panel.set_ylim(bottom=0)
        panel.legend(loc="upper right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _draw(panel: Any, plan: PlanReport, schedule: Schedule, label: str, color: str) -> None:
    moments = simulate(plan.chain, schedule).moments
    times = [t * 1e3 for m in moments for t in (m.start_s, m.end_s)]
    sizes = [s / _MIB for m in moments for s in (m.peak_bytes, m.peak_bytes)]
    panel.fill_between(times, sizes, step=None, alpha=0.35, color=color, linewidth=0)
    panel.plot(times, sizes, color=color, linewidth=1, label=label)
