"""Measure memory against time for one model in every mode: what the three programs `mem_vs_time_*` share.

A trial is one comparison of `python -m recipes.compare`. Seconds and bytes are medians over the trials.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from recipes.compare import write_report
from recipes.config import CompareConfig, ModelName, compose_config
from recipes.launch import run_modes
from recipes.modes import Mode, parse_modes
from recipes.outcome import Failed, Finished, Outcome, median_outcome
from recipes.table import comparison_rows

__all__ = ["export_json", "make_app", "run_trials"]


def make_app(model: ModelName) -> typer.Typer:
    """Return the command line of the benchmark for `model`."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @app.command(help=f"Measure loss, time and peak of the {model.value} recipe in every mode, as medians over trials.")
    def main(
        trials: Annotated[
            int, typer.Option(min=1, help="Number of trials; seconds and bytes are medians over them.")
        ] = 3,
        export: Annotated[
            Path, typer.Option(help="JSON file to write; the table and the picture go beside it.")
        ] = Path(f"results/{model.value}.json"),
        size: Annotated[str, typer.Option(help="tiny, small, medium or large.")] = "small",
        budget: Annotated[
            str, typer.Option(help="Activation budget: a share of plain training (30%), or bytes (2GiB).")
        ] = "30%",
        mode: Annotated[list[Mode] | None, typer.Option(help="A mode; repeatable. Default: all modes.")] = None,
        override: Annotated[
            list[str] | None, typer.Option(help="A Hydra override, such as shape.batch_size=4; repeatable.")
        ] = None,
    ) -> None:
        overrides = [f"model={model.value}", f"size={size}", f"budget={budget}", *(override or [])]
        config = compose_config(overrides)
        modes = tuple(mode) if mode else parse_modes(config.mode)
        console = Console()
        outcomes = run_trials(config, modes, export.with_suffix(""), num_trials=trials, console=console)
        export_json(config, outcomes, export, num_trials=trials)
        write_report(config, [median_outcome(of_mode) for of_mode in outcomes], export.with_suffix(""), console=console)
        for name in ("table.md", "compare.png"):
            written = export.with_suffix("") / name
            if written.exists():
                shutil.copyfile(written, export.with_suffix(written.suffix))
        console.print(f"Exported to {export}", soft_wrap=True)

    return app


def run_trials(
    config: CompareConfig, modes: Sequence[Mode], folder: Path, *, num_trials: int, console: Console
) -> tuple[tuple[Outcome, ...], ...]:
    """Run `num_trials` comparisons, one after the other, each in a folder of its own below `folder`.

    **Returns:** the outcomes of each mode, one per trial; `naive` is the first mode.
    """
    trials: list[tuple[Outcome, ...]] = []
    for trial in range(num_trials):
        console.print(f"[bold]trial {trial + 1} of {num_trials}[/bold]")
        trials.append(run_modes(config, modes, folder / f"trial_{trial + 1}", console=console))
    return tuple(zip(*trials, strict=True))


def export_json(config: CompareConfig, outcomes: Sequence[Sequence[Outcome]], path: Path, *, num_trials: int) -> None:
    """Write the medians of every mode, and the seconds and bytes of each trial, to `path`."""
    rows = comparison_rows([median_outcome(of_mode) for of_mode in outcomes])
    modes = [
        asdict(row) | {"mode": row.mode.value, "trials": [_trial(outcome) for outcome in of_mode]}
        for row, of_mode in zip(rows, outcomes, strict=True)
    ]
    measured = next((o.measurement for of_mode in outcomes for o in of_mode if isinstance(o, Finished)), None)
    where = {} if measured is None else {"device": measured.device, "versions": asdict(measured.versions)}
    exported = {"config": asdict(config), "num_trials": num_trials, **where, "modes": modes}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Enums are written as their values.
    path.write_text(json.dumps(exported, indent=1, default=lambda member: member.value) + "\n")


def _trial(outcome: Outcome) -> dict[str, float | int | str | None]:
    match outcome:
        case Failed():
            return {"error": outcome.error}
        case Finished():
            measured = outcome.measurement
            return {
                "loss": measured.losses[-1],
                "wall_s": measured.wall_s,
                "first_step_s": measured.first_step_s,
                "activation_peak_bytes": measured.activation_peak_bytes,
                "peak_bytes": measured.peak_bytes,
                "reserved_peak_bytes": measured.reserved_peak_bytes,
            }
