"""Check that architectures train bit for bit as plainly, within budgets: `python -m benchmarks.conformance --help`.

Each architecture of the zoo is checked in a process of its own, under every budget; a process that crashes or hangs
gives a row like any other. `benchmarks/conformance_check.py` is the check, which the tests run too.
"""

import json
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.apart import run_apart
from recipes.markdown import markdown_rows

__all__ = ["Checked", "Row", "Stopped", "app", "markdown_table"]

_MEBIBYTE = 2**20
_HEADER = (
    "architecture",
    "executor",
    "budget",
    "bits equal",
    "peak / budget",
    "budget, MiB",
    "plain, MiB",
    "recompute",
    "blocks",
    "kept",
    "steps of",
)
_FIELDS = ("losses", "gradients", "buffers", "parameters", "random_state")


@dataclass(frozen=True, slots=True)
class Checked:
    """One architecture, checked under one budget. `result` is a `Conformity` as a JSON object."""

    architecture: str
    executor: str
    budget: str
    result: dict[str, Any]

    @property
    def is_equal(self) -> bool:
        """Whether everything was equal to plain training."""
        return not self.result["sameness"]["first_difference"]

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak is at or under the budget."""
        return self.result["measured_peak_bytes"] <= self.result["budget_bytes"]


@dataclass(frozen=True, slots=True)
class Stopped:
    """One architecture under one budget whose check ended in an error, a signal or a timeout."""

    architecture: str
    executor: str
    budget: str
    error: str


Row = Checked | Stopped


@dataclass(frozen=True, slots=True)
class _Way:
    """How every architecture is trained: the executor, the device, the budgets, the time limit and the precision."""

    executor: str
    device: str
    budgets: tuple[str, ...]
    timeout_s: float
    autocast: bool

    @property
    def name(self) -> str:
        """The executor, and the precision under autocast."""
        return f"{self.executor}, bf16" if self.autocast else self.executor


def _check_here(name: str, way: _Way, output: Path) -> None:
    """Check one architecture in this process; write the results after each budget."""
    import torch  # noqa: PLC0415 - not in the process that only starts others

    from benchmarks.conformance_check import Executor, check  # noqa: PLC0415
    from benchmarks.zoo import architecture_named  # noqa: PLC0415

    torch.set_num_threads(1)  # so that sums have one order
    if way.device == "cuda":
        # With `warn_only`, attention would keep its nondeterministic kernels. An op without another kernel raises.
        torch.use_deterministic_algorithms(True)
    found: dict[str, Any] = {}
    for budget in way.budgets:
        device = torch.device(way.device)
        checked = check(architecture_named(name), Executor(way.executor), budget, device, autocast=way.autocast)
        found[budget] = asdict(checked)
        output.write_text(json.dumps(found, default=_value))


def _value(member: Any) -> Any:
    assert isinstance(member, Enum), f"{type(member).__name__} is not JSON"
    return member.value


def _check_apart(name: str, way: _Way, folder: Path) -> list[Row]:
    """Check one architecture in a process of its own, and in a new one after each budget that ends the process."""
    rows: list[Row] = []
    while len(rows) < len(way.budgets):
        left = replace(way, budgets=way.budgets[len(rows) :])
        found, error = _run_apart(name, left, folder)
        rows += [Checked(name, way.name, budget, found[budget]) for budget in left.budgets if budget in found]
        if len(rows) < len(way.budgets):
            rows.append(Stopped(name, way.name, way.budgets[len(rows)], error))
    return rows


def _run_apart(name: str, way: _Way, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the results of one process by budget, and the error that ended it, if any."""
    output, log = folder / f"{name}.{way.executor}.json", folder / f"{name}.{way.executor}.log"
    output.unlink(missing_ok=True)
    arguments = ["--alone", name, "--executor", way.executor, "--device", way.device, "--export", str(output)]
    arguments += ["--autocast"] if way.autocast else []
    arguments += [part for budget in way.budgets for part in ("--budget", budget)]
    error = run_apart("benchmarks.conformance", arguments, log, timeout_s=way.timeout_s)
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    return found, error


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table of `rows` as Markdown, below a line that counts the failures."""
    checked = [row for row in rows if isinstance(row, Checked)]
    num_wrong = sum(not row.is_equal for row in checked)
    num_over = sum(not row.is_within_budget for row in checked)
    counts = f"{len(rows)} checks: {num_wrong} wrong, {num_over} over budget, {len(rows) - len(checked)} not finished."
    alignment = ["---"] * 3 + [":---:"] + ["---:"] * 6 + ["---"]
    table = markdown_rows(_HEADER, alignment, map(_cells, rows))
    note = (
        "Budgets are shares of plain training's measured activation peak; `*` marks a budget that no plan meets, where "
        "the smallest that can be met is checked instead. Bits: losses, gradients, buffers, parameters and generators "
        "after every optimizer step. Recompute: the share of a step's forward and backward that goes to replays."
    )
    return f"{counts}\n\n{table}\n\n{note}\n"


def _cells(row: Row) -> list[str]:
    head = [row.architecture, row.executor]
    match row:
        case Stopped():
            error = row.error.replace("|", "\\|")
            return [*head, row.budget, f"failed: {error}", *[""] * (len(_HEADER) - 4)]
        case Checked(result=result):
            return [
                *head,
                row.budget + (" *" if result["is_smallest"] else ""),
                "yes" if row.is_equal else "no: " + ", ".join(f for f in _FIELDS if not result["sameness"][f]),
                f"{result['measured_peak_bytes'] / result['budget_bytes']:.3f}"
                + ("" if row.is_within_budget else " !"),
                f"{result['budget_bytes'] / _MEBIBYTE:.2f}",
                f"{result['plain_peak_bytes'] / _MEBIBYTE:.2f}",
                f"{result['recompute_share']:.0%}",
                str(result["num_blocks"]),
                str(result["num_kept"]),
                result["blocks"] or "none",
            ]


def _export(rows: Sequence[Row], path: Path, device: str) -> None:
    from recipes.measure import package_version  # noqa: PLC0415 - `--help` does without torch

    where = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{package: package_version(package) for package in ("torch", "transformers", "diffusers", "tinybp-lightning")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"device": device, "versions": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    path.with_suffix(".md").write_text("# Conformance\n\n" + markdown_table(rows))


def _say(row: Row, console: Console) -> None:
    cells = _cells(row)
    is_good = isinstance(row, Checked) and row.is_equal and row.is_within_budget
    colour = "green" if is_good else "red"
    line = f"{cells[0]:<16}{cells[2]:<7}{cells[3]:<6} peak/budget {cells[4]:<8}recompute {cells[7]:<5}{cells[10]}"
    console.print(f"[{colour}]{escape(line)}[/{colour}]", soft_wrap=True)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    filter_: Annotated[str, typer.Option("--filter", help="Only architectures whose name contains this text.")] = "",
    executor: Annotated[str, typer.Option(help="The executor to check: eager or inductor.")] = "eager",
    budget: Annotated[
        list[str] | None, typer.Option(help="A share of plain training's peak, such as 60%; repeatable.")
    ] = None,
    export: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it as Markdown.")] = Path(
        "results/conformance.json"
    ),
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    autocast: Annotated[bool, typer.Option("--autocast", help="Train under bfloat16 autocast.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Number of architectures to check at once.")] = 1,
    timeout_s: Annotated[float, typer.Option(min=1, help="Time limit of one architecture.")] = 300,
    alone: Annotated[str, typer.Option(hidden=True, help="Check this architecture in this process.")] = "",
) -> None:
    """Train every architecture of the zoo under small budgets and compare it with plain training, bit for bit.

    The exit code is 1 when something differs, exceeds its budget or does not finish.
    """
    from benchmarks.conformance_check import BUDGETS  # noqa: PLC0415 - `--help` does without torch
    from benchmarks.zoo import ZOO  # noqa: PLC0415

    way = _Way(executor, device, tuple(budget or BUDGETS), timeout_s, autocast)
    if alone:
        _check_here(alone, way, export)
        return
    names = [architecture.name for architecture in ZOO if filter_ in architecture.name]
    if not names:
        raise typer.BadParameter(f"no name contains `{filter_}`: the names are {', '.join(a.name for a in ZOO)}.")
    folder = export.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {}
    rows: list[Row] = []
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("conformance", total=len(names))
        checks = {pool.submit(_check_apart, name, way, folder): name for name in names}
        for done in as_completed(checks):
            name = checks[done]
            found[name] = done.result()
            for row in found[name]:
                _say(row, console)
            rows = [row for n in names for row in found.get(n, [])]
            _export(rows, export, device)
            progress.update(task, description=name, advance=1)
    console.print(markdown_table(rows).splitlines()[0])
    console.print(f"Exported to {export} and {export.with_suffix('.md')}", soft_wrap=True)
    if not all(isinstance(row, Checked) and row.is_equal and row.is_within_budget for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
