"""How does plan and bound against budget look? One picture; matplotlib is loaded when it is drawn, and not before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinybp_lightning.errors import MissingPackageError
from tinybp_lightning.schedule.pareto_front import Pareto

__all__ = ["plot_pareto"]

_GIB, _MIB = 2**30, 2**20
_MARKERS = ("s", "^", "D")
"""One for each of `Pareto.references`."""


def plot_pareto(curve: Pareto, path: Path) -> Path:
    """Write `curve` as a PNG to `path` and return it: the plan as a line, the bound as a shaded one below.

    **Raises:** `MissingPackageError` if matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingPackageError(
            "`Pareto.plot` draws with matplotlib, which is not installed: `pip install tinybp-lightning[recipes]`."
        ) from error
    figure: Any = Figure(figsize=(8.5, 5), layout="constrained")
    panel = figure.subplots()
    unit_bytes, unit = (_GIB, "GiB") if curve.plain_peak_bytes >= _GIB else (_MIB, "MiB")
    _draw(panel, curve, unit_bytes)
    panel.set_xlabel(f"budget ({unit})")
    how = ", estimated" if curve.is_estimated else ""
    panel.set_ylabel(f"time of a step (plain training = 1{how})")
    panel.set_title(
        f"smallest budget {curve.smallest_bytes / unit_bytes:.3g} {unit}, plain training "
        f"{curve.plain_peak_bytes / unit_bytes:.3g} {unit}, largest gap {max(p.gap for p in curve.points):.1%}",
        fontsize=10,
    )
    panel.grid(visible=True, alpha=0.25)
    panel.legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw(panel: Any, curve: Pareto, unit_bytes: int) -> None:
    budgets = [p.budget_bytes / unit_bytes for p in curve.points]
    plans, bounds = _relative([p.total_s for p in curve.points], curve), _relative(_bounds(curve), curve)
    # Between two budgets the plan is that of the smaller one, and the bound that of the larger one: both are steps.
    panel.plot(budgets, plans, "o-", color="tab:blue", drawstyle="steps-post", markersize=4, label="plan")
    panel.plot(budgets, bounds, color="tab:red", drawstyle="steps-pre", linewidth=1, label="lower bound")
    floor = min([*bounds, 1.0]) - 0.05
    panel.fill_between(budgets, bounds, floor, step="pre", color="tab:red", alpha=0.12, linewidth=0)
    for reference, marker in zip(curve.references, _MARKERS, strict=True):
        at = reference.peak_bytes / unit_bytes, reference.total_s / curve.plain_s if curve.plain_s else 1.0
        panel.plot(*at, marker, color="0.25", markersize=7, linestyle="none", label=reference.name)
    panel.axvline(curve.smallest_bytes / unit_bytes, color="0.6", linestyle=":", linewidth=1)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=floor)


def _bounds(curve: Pareto) -> list[float]:
    return [p.lower_bound_s for p in curve.points]


def _relative(seconds: Sequence[float], curve: Pareto) -> list[float]:
    return [s / curve.plain_s if curve.plain_s else 1.0 for s in seconds]
