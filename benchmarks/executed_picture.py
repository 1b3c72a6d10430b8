"""Draw how near executed plans came to their predictions: a picture of peaks, and one of seconds."""

# matplotlib annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.executed_table import PEAK_TOLERANCE, SECONDS_TOLERANCE, Executed

__all__ = ["draw"]

mpl.use("Agg")


def draw(executed: Sequence[Executed], path: Path) -> None:
    """Draw measured peaks against the predicted ones and the budgets, and measured replay seconds likewise."""
    from matplotlib import pyplot as plt  # noqa: PLC0415  after the backend is chosen

    figure, (peaks, seconds) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", width_ratios=(3, 2))
    _draw_peaks(peaks, executed)
    _draw_seconds(seconds, executed)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_peaks(axis: Any, executed: Sequence[Executed]) -> None:
    places = range(len(executed))
    axis.axhspan(
        100 * (1 - PEAK_TOLERANCE),
        100 * (1 + PEAK_TOLERANCE),
        color="tab:blue",
        alpha=0.12,
        label=f"prediction ± {PEAK_TOLERANCE:.0%}",
    )
    axis.axhline(100, color="tab:red", linewidth=1, label="budget")
    axis.plot(places, [100 * row.of_prediction for row in executed], "o", color="tab:blue", label="of the prediction")
    axis.plot(places, [100 * row.of_budget for row in executed], "x", color="tab:red", label="of the budget")
    axis.set_xticks(places, [f"{row.model}\n{row.budget}" for row in executed], rotation=60, fontsize=8)
    axis.set_ylabel("measured peak, percent")
    axis.grid(visible=True, axis="y", alpha=0.3)
    axis.legend(fontsize=8)


def _draw_seconds(axis: Any, executed: Sequence[Executed]) -> None:
    shown = [row for row in executed if row.seconds_ratio is not None]
    ends = sorted(s for row in shown for s in (row.replay_s, row.result["predicted_recompute_s"]))
    if ends:
        line = [ends[0] / 1.5, ends[-1] * 1.5]
        axis.plot(line, line, color="gray", linewidth=1)
        axis.fill_between(
            line,
            [(1 - SECONDS_TOLERANCE) * s for s in line],
            [(1 + SECONDS_TOLERANCE) * s for s in line],
            color="gray",
            alpha=0.2,
            label=f"prediction ± {SECONDS_TOLERANCE:.0%}",
        )
    for name in dict.fromkeys(row.model for row in shown):
        own = [row for row in shown if row.model == name]
        predicted = [row.result["predicted_recompute_s"] for row in own]
        axis.plot(predicted, [row.replay_s for row in own], "o", label=name)
        for row, across in zip(own, predicted, strict=True):
            axis.annotate(row.budget, (across, row.replay_s), textcoords="offset points", xytext=(5, -9), fontsize=7)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("predicted recompute, seconds a step")
    axis.set_ylabel("measured replay, seconds a step (median)")
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=8)
