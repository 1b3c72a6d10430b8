"""Train recipes under plans and compare the measurements with the predictions: `python -m benchmarks.executed --help`.

`benchmarks.planner_scaling` judges the planner on simulated chains; this benchmark trains recipes under its plans, on
the CPU. A plan predicts its peak before its first step; the peak is measured from allocator events, independently of
the package. Bytes and bits decide the exit code. Seconds are shown only, because they are unreliable on a busy machine.
Each recipe runs under each budget in a process of its own; a process that crashes or hangs gives a row like any other.
`benchmarks/executed_check.py` measures, `benchmarks/executed_table.py` judges.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.apart import run_apart
from benchmarks.executed_table import Executed, Row, Stopped, TooSmall, cells_of, is_good, markdown_table
from benchmarks.recipe_options import Models, Size
from recipes.config import ModelName

__all__ = ["BUDGETS", "app"]

BUDGETS = ("70%", "50%", "30%", "15%", "min")
_TODAY = datetime.now().astimezone().date().isoformat()


def _execute_here(model: str, size: str, budget: str, output: Path) -> None:
    """Train one recipe under one budget in this process, and write the result."""
    import torch  # noqa: PLC0415 - not in the process that only starts others

    from benchmarks.executed_check import execute  # noqa: PLC0415

    torch.set_num_threads(1)  # so that sums have one order
    output.write_text(json.dumps(asdict(execute(model, size, budget))))


def _execute_apart(model: str, size: str, budget: str, folder: Path, timeout_s: float) -> Row:
    stem = f"{model}.{budget.replace('%', '_percent')}"
    output, log = folder / f"{stem}.json", folder / f"{stem}.log"
    output.unlink(missing_ok=True)
    arguments = ["--alone", model, "--size", size, "--budget", budget, "--export", str(output)]
    error = run_apart("benchmarks.executed", arguments, log, timeout_s=timeout_s)
    if error:
        return Stopped(model, budget, error)
    result: dict[str, Any] = json.loads(output.read_text())
    return TooSmall(model, budget, result) if "smallest_bytes" in result else Executed(model, budget, result)


def _export(rows: Sequence[Row], path: Path, size: str) -> None:
    from benchmarks.executed_picture import draw  # noqa: PLC0415 - `--help` does without matplotlib
    from recipes.measure import package_version  # noqa: PLC0415 - and without torch

    packages = ("torch", "transformers", "diffusers", "tinybp-lightning")
    where = {
        "date": _TODAY,
        "device": f"CPU ({platform.machine()}, 1 thread of {os.cpu_count()} cores)",
        "versions": {
            "python": platform.python_version(),
            **{package: package_version(package) for package in packages},
        },
        "size": size,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(where | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    head = f"# Executed plans, {_TODAY}\n\n"
    head += f"Recipes at size `{size}`, torch {package_version('torch')}, {where['device']}.\n\n"
    path.with_suffix(".md").write_text(head + markdown_table(rows))
    draw([row for row in rows if isinstance(row, Executed)], path.with_suffix(".png"))


def _say(row: Row, console: Console) -> None:
    cells = cells_of(row)
    measured = f" measured/predicted {cells[6]} measured/budget {cells[7]} seconds {cells[10]} bits {cells[11]}"
    line = f"{cells[0]:<13}{cells[1]:<5}{cells[3]}" + (measured if isinstance(row, Executed) else "")
    colour = "green" if is_good(row) else "red"
    console.print(f"[{colour}]{escape(line)}[/{colour}]", soft_wrap=True)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    model: Models = None,
    size: Size = "small",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="A share of plain training's peak (60%), or min; repeatable. Default: 70, 50, 30, 15% and min."
        ),
    ] = None,
    export: Annotated[Path, typer.Option(help="JSON file to write; the table and the picture go beside it.")] = Path(
        f"results/{_TODAY}_executed.json"
    ),
    timeout_s: Annotated[float, typer.Option(min=1, help="Time limit of one recipe under one budget.")] = 900,
    alone: Annotated[str, typer.Option(hidden=True, help="Train this model in this process.")] = "",
) -> None:
    """Train recipes under plans and compare peaks and seconds with the predictions, and bits with plain training.

    The exit code is 1 when a peak is over its budget or farther than 3 % from the prediction, when a loss or a gradient
    differs from plain training's, or when a run does not finish. Seconds do not count.
    """
    budgets = tuple(budget or BUDGETS)
    if alone:
        _execute_here(alone, size, budgets[0], export)
        return
    runs = [(name.value, one) for name in model or list(ModelName) for one in budgets]
    folder = export.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("executed", total=len(runs))
        for name, one in runs:
            progress.update(task, description=f"{name} {one}")
            rows.append(_execute_apart(name, size, one, folder, timeout_s))
            _say(rows[-1], console)
            # After every run, so that an interrupted benchmark leaves what it measured.
            _export(rows, export, size)
            progress.advance(task)
    console.print(markdown_table(rows).splitlines()[0])
    for suffix in (".json", ".md", ".png"):
        console.print(f"wrote {export.with_suffix(suffix)}", soft_wrap=True)
    if not all(map(is_good, rows)):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
