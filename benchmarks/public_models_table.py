"""Judge public models trained under budgets: rows of `benchmarks.public_models`, their table, counts and picture."""

# matplotlib annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from recipes.markdown import markdown_rows

__all__ = [
    "HALF",
    "SMALLEST",
    "Row",
    "Stopped",
    "Trained",
    "Untried",
    "cells_of",
    "draw",
    "is_good",
    "markdown_table",
    "summary",
]

HALF = "50%"
SMALLEST = "smallest"
_HEADER = (
    "architecture",
    "same bits",
    "peak / budget at 50 %",
    "at the smallest",
    "smallest / plain",
    "named budgets refused",
    "steps of",
    "why not of its graph",
    "first step, CPU s",
    "step / plain at 50 %",
    "at the smallest",
)
_WHY = re.compile(r"cannot be traced as one graph \((.*)\)\. It is trained by module steps", re.DOTALL)
_UNENFORCED = "its budget is not enforced"


@dataclass(frozen=True, slots=True)
class Trained:
    """One architecture, trained under both budgets.

    Both are a `Conformity` as a JSON object; `half` is `None` if 50 % was refused. `is_repeatable`: whether plain
    training has the same bits each time, asked only where bits differ. `cause`: the error or the line of code that the
    reason for module steps goes back to.
    """

    library: str
    name: str
    half: dict[str, Any] | None
    smallest: dict[str, Any]
    is_repeatable: bool = True
    cause: str = ""

    @property
    def results(self) -> list[dict[str, Any]]:
        """What was measured, the larger budget first."""
        return [self.smallest] if self.half is None else [self.half, self.smallest]

    @property
    def first_difference(self) -> str:
        """Where the bits first differ from plain training's; empty if they never do."""
        told = [found for result in self.results if (found := result["sameness"]["first_difference"])]
        return told[0] if told else ""

    @property
    def is_wrong(self) -> bool:
        """Whether bits differ where plain training's would not."""
        return self.is_repeatable and bool(self.first_difference)

    @property
    def is_within_budget(self) -> bool:
        """Whether each measured peak is at or under its budget."""
        return all(result["measured_peak_bytes"] <= result["budget_bytes"] for result in self.results)

    @property
    def num_refused(self) -> int:
        """How many budgets were refused that an earlier refusal had named as enough."""
        return max(0, len(self.smallest["named_bytes"]) - 1)

    @property
    def smallest_share(self) -> float:
        """The smallest budget as a share of plain training's peak."""
        return self.smallest["budget_bytes"] / self.smallest["plain_peak_bytes"]

    @property
    def blocks(self) -> str:
        """`graph`, `module`, or `none` where nothing is replayed."""
        return self.results[0]["blocks"] or "none"

    @property
    def why(self) -> str:
        """Why the forward is not recorded as one graph; empty if it is."""
        said = [text for result in self.results for text in result["warnings"]]
        found = [" ".join(match[1].split()) for text in said if (match := _WHY.search(text))]
        if not found:
            return next((text for text in said if _UNENFORCED in text), "")
        return f"{found[0]}: {self.cause}" if self.cause else found[0]


@dataclass(frozen=True, slots=True)
class Untried:
    """One architecture of which no tiny configuration trains plainly."""

    library: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """One architecture whose process ended in an error, a signal or a timeout."""

    library: str
    name: str
    error: str


Row = Trained | Untried | Stopped


def is_good(row: Row) -> bool:
    """Whether bits and bytes are as promised; an architecture that was not tried says nothing."""
    match row:
        case Trained():
            return not row.is_wrong and row.is_within_budget and not row.num_refused
        case Untried():
            return True
        case Stopped():
            return False
        case _:
            assert_never(row)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table of `rows` as Markdown, below the counts."""
    alignment = ["---", ":---:", *["---:"] * 4, "---", "---", *["---:"] * 3]
    table = markdown_rows(_HEADER, alignment, map(cells_of, rows))
    note = (
        "Plain and planned training run in lockstep for some optimizer steps; bits: losses, gradients, buffers, "
        "parameters and generators after each. 50 % is of plain training's measured activation peak; `refused` marks "
        "where no plan meets it. The smallest budget is the one that `BudgetTooSmallError` names. Peaks are from "
        "allocator events. CPU seconds are of the first step, with tracing and planning. Step seconds of models this "
        "small are mostly Python's."
    )
    return f"{summary(rows)}\n{table}\n\n{note}\n"


def summary(rows: Sequence[Row]) -> str:
    """Return the counts of `rows` as Markdown: what is wrong, how often 50 % is enough, and why by module steps."""
    trained = [row for row in rows if isinstance(row, Trained)]
    num_stopped = sum(isinstance(row, Stopped) for row in rows)
    counts = (
        f"{len(trained)} architectures: {sum(row.is_wrong for row in trained)} wrong, "
        f"{sum(not row.is_within_budget for row in trained)} over budget, "
        f"{sum(row.num_refused > 0 for row in trained)} whose named budget was refused, {num_stopped} not finished; "
        f"{len(rows) - len(trained) - num_stopped} without a tiny configuration, "
        f"{sum(not row.is_repeatable for row in trained)} whose plain training differs from itself."
    )
    lines = [counts, ""]
    for library in dict.fromkeys(row.library for row in trained):
        own = [row for row in trained if row.library == library]
        half = sum(row.half is not None for row in own)
        steps = Counter(row.blocks for row in own)
        lines.append(
            f"- {library}: {len(own)} architectures; 50 % is enough for {half / len(own):.0%}; steps of "
            + ", ".join(f"{kind}s {count / len(own):.0%}" for kind, count in sorted(steps.items()))
        )
    reasons = Counter(row.why for row in trained if row.why)
    lines += ["", "Reasons for module steps:", ""] if reasons else [""]
    lines += [f"- {count}: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def cells_of(row: Row) -> list[str]:
    """Return the cells of `row`, one for each column of the header."""
    head = f"{row.library}/{row.name}"
    match row:
        case Stopped(error=error):
            return [head, f"failed: {_escaped(error)}", *[""] * (len(_HEADER) - 2)]
        case Untried(reason=reason):
            return [head, f"no tiny config: {_escaped(reason)}", *[""] * (len(_HEADER) - 2)]
        case Trained(half=half, smallest=smallest):
            return [
                head,
                _bits(row),
                "refused" if half is None else _of_budget(half),
                _of_budget(smallest),
                f"{row.smallest_share:.2f}",
                f"{row.num_refused} !" if row.num_refused else "0",
                row.blocks,
                _escaped(row.why),
                f"{row.results[0]['first_step_cpu_s']:.1f}",
                "" if half is None else f"{half['time_ratio']:.2f}",
                f"{smallest['time_ratio']:.2f}",
            ]
        case _:
            assert_never(row)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _bits(row: Trained) -> str:
    if not row.first_difference:
        return "yes"
    return f"no: {_escaped(row.first_difference)}" + ("" if row.is_repeatable else " (plain training's differ too)")


def _of_budget(result: dict[str, Any]) -> str:
    share = result["measured_peak_bytes"] / result["budget_bytes"]
    return f"{share:.3f}" + (" !" if share > 1 else "")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the smallest budgets as shares of plain training's peak, and what a step at 50 % costs."""
    import matplotlib as mpl  # noqa: PLC0415 - `--help` does without it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    trained = [row for row in rows if isinstance(row, Trained)]
    figure, (shares, seconds) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for library in dict.fromkeys(row.library for row in trained):
        for blocks, line in (("graph", "-"), ("module", "--")):
            own = [row for row in trained if row.library == library and row.blocks == blocks]
            _draw_sorted(shares, [row.smallest_share for row in own], f"{library}, {blocks} steps", line)
            ratios = [row.half["time_ratio"] for row in own if row.half is not None]
            _draw_sorted(seconds, ratios, f"{library}, {blocks} steps", line)
    shares.axhline(0.5, color="tab:red", linewidth=1, label="50 %")
    shares.set_ylabel("smallest budget / plain training's peak")
    seconds.set_ylabel("seconds of a step at 50 % / plain")
    for axis in (shares, seconds):
        axis.set_xlabel("share of the architectures")
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_sorted(axis: Any, values: Sequence[float], label: str, line: str) -> None:
    if values:
        places = [(n + 1) / len(values) for n in range(len(values))]
        axis.plot(places, sorted(values), line, marker=".", label=f"{label} ({len(values)})")
