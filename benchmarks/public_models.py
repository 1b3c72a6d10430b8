"""Train the public architectures under budgets: `python -m benchmarks.public_models --help`.

The lists are transformers' and timm's as installed, and diffusers' main classes, all with tiny configurations. Each
architecture trains in a process of its own, plainly and planned, at 50 % and at the smallest budget that the refusal of
a smaller one names; a process that crashes or hangs gives a row like any other. `benchmarks/conformance_check.py` is
the check, `benchmarks/public_models_list.py` builds the models, and `benchmarks/public_models_table.py` judges.
"""

import fnmatch
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from datetime import datetime
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.apart import fork_server, run_forked
from benchmarks.public_models_table import (
    HALF,
    SMALLEST,
    Row,
    Stopped,
    Trained,
    Untried,
    cells_of,
    draw,
    is_good,
    markdown_table,
    summary,
)

__all__ = ["THIS_WEEK", "app", "tenth_of"]

_NOW = datetime.now().astimezone()
_TODAY = _NOW.date().isoformat()
THIS_WEEK = f"{_NOW:%G-W%V}"
"""The week that --tenth chooses by, as ISO counts it."""
_LIBRARIES = ("transformers", "timm", "diffusers")
_NUM_PARTS = 10


def tenth_of(names: Sequence[str], week: str) -> list[str]:
    """Return the tenth of `names` (rounded up) that `week`, such as `2026-W49`, chooses: another one each week."""
    chosen = sorted(names, key=lambda name: _digest(f"{week} {name}"))[: math.ceil(len(names) / _NUM_PARTS)]
    return [name for name in names if name in chosen]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _train_here(key: str, output: Path) -> None:
    os.environ["TINYBP_CACHE"] = str(output.with_suffix(".plans"))  # so that the first step plans

    import torch  # noqa: PLC0415 - not in the process that only starts others

    from benchmarks.public_models_check import train  # noqa: PLC0415

    torch.set_num_threads(1)  # so that sums have one order
    for found in train(key):
        output.write_text(json.dumps(found, default=lambda member: member.value))


def _train_apart(key: str, folder: Path, timeout_s: float, processes: ForkServerContext) -> Row:
    stem = key.replace("/", ".")
    output, log = folder / f"{stem}.json", folder / f"{stem}.log"
    output.unlink(missing_ok=True)
    error = run_forked(processes, _train_here, (key, output), log, timeout_s=timeout_s)
    shutil.rmtree(output.with_suffix(".plans"), ignore_errors=True)
    library, name = key.split("/", 1)
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if error:
        where = f" at {SMALLEST if HALF in found else HALF}" if "built" in found else ""
        return Stopped(library, name, error + where)
    if "reason" in found:
        return Untried(library, name, found["reason"])
    return Trained(library, name, found[HALF], found[SMALLEST], found["is_repeatable"], found["cause"])


def _export(rows: Sequence[Row], path: Path, left_out: Sequence[str]) -> None:
    from recipes.measure import package_version  # noqa: PLC0415 - `--help` does without torch

    packages = ("torch", "transformers", "timm", "diffusers", "tinybp-lightning")
    versions = {package: package_version(package) for package in packages if _is_installed(package)}
    where = {
        "date": _TODAY,
        "device": f"CPU ({platform.machine()}, 1 thread of {os.cpu_count()} cores)",
        "versions": {"python": platform.python_version(), **versions},
        "left_out": list(left_out),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(where | {"rows": [_as_json(row) for row in rows]}, indent=1) + "\n")
    head = f"# Public models, {_TODAY}\n\n{', '.join(f'{p} {v}' for p, v in versions.items())}, {where['device']}.\n\n"
    head += "".join(f"{library} is not installed here: its rows are left out.\n\n" for library in left_out)
    path.with_suffix(".md").write_text(head + markdown_table(rows))
    draw(rows, path.with_suffix(".png"))


def _as_json(row: Row) -> dict[str, Any]:
    return {"kind": type(row).__name__} | asdict(row)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("tinybp-lightning", "tinybp_lightning")) is not None


def _say(row: Row, console: Console) -> None:
    cells = cells_of(row)
    colour = "red" if not is_good(row) else "green" if isinstance(row, Trained) else "yellow"
    line = f"{cells[0]:<48}{cells[1]}"
    if isinstance(row, Trained):
        line += f"  50 % {cells[2]:<8}smallest {cells[3]:<7}= {cells[4]} of plain  {cells[6]:<7}{cells[8]} CPU s"
    console.print(f"[{colour}]{escape(line)}[/{colour}]", soft_wrap=True)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    select: Annotated[
        list[str] | None,
        typer.Option(help="Only architectures whose `library/class` fits this pattern, such as '*/Bert*'; repeatable."),
    ] = None,
    library: Annotated[list[str] | None, typer.Option(help="transformers, timm or diffusers; repeatable.")] = None,
    tenth: Annotated[bool, typer.Option("--tenth", help="Only the tenth that the week chooses.")] = False,
    week: Annotated[str, typer.Option(help="The week of --tenth, as YYYY-Www.")] = THIS_WEEK,
    jobs: Annotated[int, typer.Option(min=1, help="Number of architectures to train at once.")] = 1,
    timeout_s: Annotated[float, typer.Option(min=1, help="Time limit of one architecture.")] = 180,
    export: Annotated[Path, typer.Option(help="JSON file to write; the table and the picture go beside it.")] = Path(
        f"results/{_TODAY}_public_models.json"
    ),
    list_: Annotated[bool, typer.Option("--list", help="Only print the names.")] = False,
) -> None:
    """Train public architectures with tiny configurations under budgets, and compare them with plain training.

    The exit code is 1 when bits differ, a peak exceeds its budget, a named budget is refused or a process fails.
    """
    _check_options(library or [], week)
    wanted = list(dict.fromkeys(library or _LIBRARIES))
    left_out = [one for one in wanted if not _is_installed(one)]
    console = Console()
    for one in left_out:
        console.print(f"{one} is not installed here: its rows are left out.")
    keys = _selected(select or ["*"], [one for one in wanted if one not in left_out], week if tenth else None)
    if list_:
        console.print("\n".join(keys), soft_wrap=True)
        return
    rows = _train_all(keys, export, jobs, timeout_s, left_out, console)
    console.print(summary(rows), soft_wrap=True, highlight=False)
    for suffix in (".json", ".md", ".png"):
        console.print(f"wrote {export.with_suffix(suffix)}", soft_wrap=True)
    if not all(map(is_good, rows)):
        raise typer.Exit(1)


def _check_options(library: Sequence[str], week: str) -> None:
    for one in library:
        if one not in _LIBRARIES:
            raise typer.BadParameter(f"`{one}`: expected {', '.join(_LIBRARIES)}.", param_hint="--library")
    if re.fullmatch(r"\d{4}-W(0[1-9]|[1-4]\d|5[0-3])", week) is None:
        raise typer.BadParameter(f"`{week}`: expected a year and a week, such as {THIS_WEEK}.", param_hint="--week")


def _selected(patterns: Sequence[str], libraries: Sequence[str], week: str | None) -> list[str]:
    from benchmarks.public_models_list import listed  # noqa: PLC0415 - seconds to import

    names = [model.key for model in listed() if model.library.value in libraries]
    keys = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if week is not None:
        keys = tenth_of(keys, week)
    if not keys:
        raise typer.BadParameter(
            f"nothing of {len(names)} names fits {', '.join(patterns)}: --list prints them.", param_hint="--select"
        )
    return keys


def _train_all(
    keys: Sequence[str], export: Path, jobs: int, timeout_s: float, left_out: Sequence[str], console: Console
) -> list[Row]:
    folder = export.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Row] = {}
    processes = fork_server(["benchmarks.public_models_check", "transformers.models.auto.modeling_auto"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:
            task = progress.add_task("public models", total=len(keys))
            runs = {pool.submit(_train_apart, key, folder, timeout_s, processes): key for key in keys}
            try:
                for done in as_completed(runs):
                    key = runs[done]
                    found[key] = done.result()
                    _say(found[key], console)
                    # After every run, so that an interrupted benchmark leaves what it measured.
                    _export([found[k] for k in keys if k in found], export, left_out)
                    progress.update(task, description=key, advance=1)
            except KeyboardInterrupt:
                progress.stop()
                console.print(f"stopped: {len(found)} of {len(keys)} are in {export}", soft_wrap=True)
                # The threads wait for their processes, which end themselves as soon as this one is gone.
                sys.stdout.flush()
                os._exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return [found[key] for key in keys]


if __name__ == "__main__":
    app()
