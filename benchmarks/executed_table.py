"""Judge executed plans by their predictions: the rows of `benchmarks.executed`, their verdict and their table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from recipes.markdown import markdown_rows

__all__ = [
    "PEAK_TOLERANCE",
    "SECONDS_TOLERANCE",
    "Executed",
    "Row",
    "Stopped",
    "TooSmall",
    "cells_of",
    "is_good",
    "markdown_table",
]

PEAK_TOLERANCE = 0.03
"""The largest accepted relative difference of a measured peak from its prediction."""
SECONDS_TOLERANCE = 0.15
"""The largest expected relative difference of replays' seconds from their prediction, on a quiet machine."""


_MEBIBYTE = 2**20
_HEADER = (
    "model",
    "budget",
    "budget, MiB",
    "feasible",
    "predicted peak, MiB",
    "measured peak, MiB",
    "measured / predicted",
    "measured / budget",
    "predicted recompute, s",
    "measured replay, s",
    "ratio",
    "bits equal",
)


@dataclass(frozen=True, slots=True)
class Executed:
    """One recipe trained under one budget. `result` is an `Execution` as a JSON object."""

    model: str
    budget: str
    result: dict[str, Any]

    @property
    def of_prediction(self) -> float:
        """The measured peak as a share of the predicted one."""
        return self.result["measured_peak_bytes"] / self.result["predicted_peak_bytes"]

    @property
    def of_budget(self) -> float:
        """The measured peak as a share of the budget."""
        return self.result["measured_peak_bytes"] / self.result["budget_bytes"]

    @property
    def is_as_predicted(self) -> bool:
        """Whether the measured peak is within `PEAK_TOLERANCE` of the predicted one."""
        return abs(self.of_prediction - 1) <= PEAK_TOLERANCE

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak is at or under the budget."""
        return self.result["measured_peak_bytes"] <= self.result["budget_bytes"]

    @property
    def is_equal(self) -> bool:
        """Whether the losses and gradients of every step had the bits of plain training."""
        return not self.result["first_difference"]

    @property
    def replay_s(self) -> float:
        """The median time of the replays in a settled step."""
        return statistics.median(self.result["replays_s"])

    @property
    def seconds_ratio(self) -> float | None:
        """`replay_s` relative to the predicted time; `None` where no replay was predicted."""
        predicted_s = self.result["predicted_recompute_s"]
        return self.replay_s / predicted_s if predicted_s > 0 else None


@dataclass(frozen=True, slots=True)
class TooSmall:
    """One recipe whose budget no plan can meet. `result` is a `BelowMinimum` as a JSON object."""

    model: str
    budget: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stopped:
    """One recipe under one budget whose process ended in an error, a signal or a timeout."""

    model: str
    budget: str
    error: str


Row = Executed | TooSmall | Stopped


def is_good(row: Row) -> bool:
    """Whether bytes and bits are as predicted, or the budget was refused beforehand. Seconds do not count."""
    match row:
        case Executed():
            return row.is_as_predicted and row.is_within_budget and row.is_equal
        case TooSmall():
            return True
        case Stopped():
            return False
        case _:
            assert_never(row)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table of `rows` as Markdown, below a line that counts the failures."""
    executed = [row for row in rows if isinstance(row, Executed)]
    num_stopped = sum(isinstance(row, Stopped) for row in rows)
    counts = (
        f"{len(rows)} runs: {sum(not row.is_equal for row in executed)} with other bits, "
        f"{sum(not row.is_within_budget for row in executed)} over budget, "
        f"{sum(not row.is_as_predicted for row in executed)} more than {PEAK_TOLERANCE:.0%} from the predicted peak, "
        f"{len(rows) - len(executed) - num_stopped} below the minimum, {num_stopped} not finished."
    )
    alignment = ["---", "---", "---:", "---", *["---:"] * 7, ":---:"]
    table = markdown_rows(_HEADER, alignment, map(cells_of, rows))
    return f"{counts}\n\n{table}\n\n{_note(executed)}\n"


def _note(executed: Sequence[Executed]) -> str:
    note = (
        "Budgets are shares of plain training's measured activation peak; `min` is the smallest budget that the "
        "package reports. The plan makes its predictions before its first step; measured peaks are from allocator "
        "events. Replay seconds are the median of the settled steps. Bits: losses and gradients of every step. `!` "
        "marks a failure."
    )
    if not executed:
        return note
    loads = [row.result["load"] for row in executed]
    ratios = [ratio for row in executed if (ratio := row.seconds_ratio) is not None]
    num_near = sum(abs(ratio - 1) <= SECONDS_TOLERANCE for ratio in ratios)
    cores = executed[0].result["num_cores"]
    quiet = max(loads) <= cores
    return (
        f"{note}\n\nReplay seconds were within {SECONDS_TOLERANCE:.0%} of the predicted ones in {num_near} of "
        f"{len(ratios)} runs. The machine of {cores} cores had a load of {min(loads):.1f} to {max(loads):.1f}"
        + ("." if quiet else ": it was busy, so the seconds of two runs cannot be compared.")
    )


def cells_of(row: Row) -> list[str]:
    """Return the cells of `row`, one for each column of the header."""
    head = [row.model, row.budget]
    match row:
        case Stopped():
            error = row.error.replace("|", "\\|")
            return [*head, "", f"failed: {error}", *[""] * (len(_HEADER) - 4)]
        case TooSmall(result=result):
            smallest = f"below the minimum: smallest is {result['smallest_bytes'] / _MEBIBYTE:.2f} MiB"
            return [*head, f"{result['budget_bytes'] / _MEBIBYTE:.2f}", smallest, *[""] * (len(_HEADER) - 4)]
        case Executed(result=result):
            ratio = row.seconds_ratio
            return [
                *head,
                f"{result['budget_bytes'] / _MEBIBYTE:.2f}",
                "yes",
                f"{result['predicted_peak_bytes'] / _MEBIBYTE:.2f}",
                f"{result['measured_peak_bytes'] / _MEBIBYTE:.2f}",
                f"{row.of_prediction:.4f}" + ("" if row.is_as_predicted else " !"),
                f"{row.of_budget:.4f}" + ("" if row.is_within_budget else " !"),
                f"{result['predicted_recompute_s']:.4f}",
                f"{row.replay_s:.4f}",
                "" if ratio is None else f"{ratio:.2f}",
                "yes" if row.is_equal else f"no: {result['first_difference']}",
            ]
        case _:
            assert_never(row)
