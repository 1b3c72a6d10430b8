"""Draw a comparison: the modes' peaks against their times, and the memory in the course of a step."""

# matplotlib annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.budget import budget_bytes
from recipes.config import CompareConfig
from recipes.modes import Mode
from recipes.outcome import Finished, Outcome
from recipes.table import naive_of
from recipes.timeline import Timeline

__all__ = ["draw_comparison", "spread"]

GIBIBYTE, MEBIBYTE = 2**30, 2**20
LABEL_SPACING = 0.062
COLORS = {
    Mode.naive: "#222222",
    Mode.checkpoint: "#1f77b4",
    Mode.selective: "#17becf",
    Mode.compile: "#8c564b",
    Mode.compile_layers: "#8f9000",
    Mode.compile_layers_checkpoint: "#2ca02c",
    Mode.activation_memory_budget: "#e377c2",
    Mode.compile_layers_memory_budget: "#9467bd",
    Mode.hcb_eager: "#d62728",
    Mode.hcb_inductor: "#ff7f0e",
}
OURS = (Mode.hcb_eager, Mode.hcb_inductor)
BUDGET_COLOR = "#666666"
# Darker than the mode's own colour, for a dashed line on top of its solid one.
PREDICTED_COLORS = {Mode.hcb_eager: "#4d0a0b", Mode.hcb_inductor: "#5c3000"}
PREDICTED_STYLE: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (3, 1.5))}


@dataclass(frozen=True, slots=True)
class _Mark:
    text: str
    wall_ms: float
    peak: float
    color: str


def draw_comparison(config: CompareConfig, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture of `outcomes` to `path`, a PNG, without the modes that failed.

    **Raises:** `ValueError` when no mode finished.
    """
    finished = [outcome for outcome in outcomes if isinstance(outcome, Finished)]
    if not finished:
        raise ValueError("every mode of `outcomes` failed: there is nothing to draw.")
    unit_bytes, unit = _unit(finished)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15.0, 5.6), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
        _draw_peaks(left, config, finished, unit_bytes, unit)
        _draw_timelines(right, finished, unit_bytes, unit)
        device = finished[0].measurement.device
        figure.suptitle(f"{finished[0].source}, size {config.size.name}, {device}", fontsize=12)
        figure.savefig(path)


def _unit(finished: Sequence[Finished]) -> tuple[int, str]:
    is_large = max(outcome.measurement.activation_peak_bytes for outcome in finished) >= 2 * GIBIBYTE
    return (GIBIBYTE, "GiB") if is_large else (MEBIBYTE, "MiB")


def _draw_peaks(axes: Axes, config: CompareConfig, finished: Sequence[Finished], unit_bytes: int, unit: str) -> None:
    """Draw one point per mode, and the labels in a column beside the axes, in the order of the points."""
    walls_ms = [outcome.measurement.wall_s * 1e3 for outcome in finished]
    peaks = [outcome.measurement.activation_peak_bytes / unit_bytes for outcome in finished]
    top = 1.08 * max(peaks)
    axes.set_ylim(0.0, top)
    margin_ms = 0.08 * max(max(walls_ms) - min(walls_ms), 0.1 * max(walls_ms))
    axes.set_xlim(min(walls_ms) - margin_ms, max(walls_ms) + margin_ms)
    marks = [
        _Mark(f"{outcome.mode.value}  {wall_ms:.0f} ms, {peak:.1f} {unit}", wall_ms, peak, COLORS[outcome.mode])
        for outcome, wall_ms, peak in zip(finished, walls_ms, peaks, strict=True)
    ]
    for outcome, mark in zip(finished, marks, strict=True):
        shape, extent = ("D", 9) if outcome.mode in OURS else ("o", 7)
        axes.plot(mark.wall_ms, mark.peak, marker=shape, markersize=extent, color=mark.color, zorder=3)
    naive = naive_of(finished)
    if naive is not None:
        allowed = budget_bytes(config.budget, naive_peak_bytes=naive.activation_peak_bytes) / unit_bytes
        axes.axhline(allowed, color=BUDGET_COLOR, linestyle=":", linewidth=1.2, zorder=1)
        marks.append(_Mark(f"budget {config.budget}  {allowed:.1f} {unit}", axes.get_xlim()[1], allowed, BUDGET_COLOR))
    for mark, height in zip(marks, spread([mark.peak / top for mark in marks], spacing=LABEL_SPACING), strict=True):
        _write_beside(axes, mark, height)
    axes.set_xlabel("time of a step (ms)")
    axes.set_ylabel(f"activation peak ({unit})")
    axes.set_title("Peak against time: lower left is better")
    axes.grid(alpha=0.25)


def _write_beside(axes: Axes, mark: _Mark, height: float) -> None:
    cast(Any, axes).annotate(
        mark.text,
        xy=(mark.wall_ms, mark.peak),
        xycoords="data",
        xytext=(1.03, height),
        textcoords="axes fraction",
        va="center",
        color=mark.color,
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": mark.color, "alpha": 0.4, "linewidth": 0.8, "relpos": (0.0, 0.5)},
    )


def spread(heights: Sequence[float], *, spacing: float) -> list[float]:
    """Return `heights`, moved by one sweep up and one sweep down so that any two are at least `spacing` apart.

    **Arguments:** `heights`: shares of the axes, 0 to 1.

    **Returns:** the moved heights, in the order given. Their order by height does not change, and none exceeds 1.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = [heights[index] for index in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + spacing)
    for i in reversed(range(len(placed))):
        ceiling = 1.0 if i == len(placed) - 1 else placed[i + 1] - spacing
        placed[i] = min(placed[i], ceiling)
    moved = [0.0] * len(placed)
    for index, height in zip(order, placed, strict=True):
        moved[index] = height
    return moved


def _draw_timelines(axes: Axes, finished: Sequence[Finished], unit_bytes: int, unit: str) -> None:
    """Draw the measured activations of every mode and, over those of our modes, the predicted ones."""
    for outcome in finished:
        color, measured = COLORS[outcome.mode], outcome.measurement
        is_front = outcome.mode in OURS or outcome.mode is Mode.naive
        width, opacity = (1.4, 1.0) if is_front else (0.9, 0.55)
        times_ms, live = _points(measured.timeline, measured.wall_s, unit_bytes)
        axes.plot(times_ms, live, color=color, linewidth=width, alpha=opacity, zorder=3 if is_front else 2)
        if outcome.prediction is not None:
            times_ms, live = _points(outcome.prediction.timeline, measured.wall_s, unit_bytes)
            axes.plot(times_ms, live, color=PREDICTED_COLORS[outcome.mode], zorder=4, **PREDICTED_STYLE)
    axes.plot([], [], color="#666666", linewidth=1.4, label="measured (colours as on the left)")
    if any(outcome.prediction is not None for outcome in finished):
        axes.plot([], [], color="#333333", label="predicted by hcb", **PREDICTED_STYLE)
    axes.set_ylim(bottom=0.0)
    axes.set_xlim(left=0.0)
    # A step ends low, so the upper right is free.
    axes.legend(loc="upper right", framealpha=0.85, fontsize=9)
    axes.set_title("Memory in the course of a step")
    axes.set_xlabel("time in the step (ms)")
    axes.set_ylabel(f"activations alive ({unit})")
    axes.grid(alpha=0.25)


def _points(timeline: Timeline, wall_s: float, unit_bytes: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds and the sizes of a timeline, scaled to last as long as the measured step."""
    end_s = timeline.time_s[-1] if timeline.time_s else 1.0
    scale_ms = 1e3 * wall_s / end_s if end_s > 0.0 else 0.0
    return [time_s * scale_ms for time_s in timeline.time_s], [live / unit_bytes for live in timeline.live_bytes]
