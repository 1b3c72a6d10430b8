"""Run each mode in a process of its own, one after the other.

Compilers, allocators and random generators have process-wide state, which one mode must not pass on to the next. A mode
that crashes, runs out of memory or hangs gives an outcome like any other.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from recipes.config import CompareConfig, save_config
from recipes.modes import Mode
from recipes.outcome import Failed, Finished, Outcome, read_outcome, write_outcome

__all__ = ["error_line", "run_modes"]

MEBIBYTE = 2**20


def run_modes(config: CompareConfig, modes: Sequence[Mode], folder: Path, *, console: Console) -> tuple[Outcome, ...]:
    """Train `config`'s model in each of `modes`; plain training always runs, as the first.

    **Arguments:** `folder`: receives `config.yaml`, and a JSON file and a log for each mode; it is made when absent.
    `console`: shows the progress.

    **Returns:** the outcomes, failures included, that of `naive` first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    ordered = (Mode.naive, *(mode for mode in modes if mode is not Mode.naive))
    outcomes: list[Outcome] = []
    naive_peak_bytes = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for position, mode in enumerate(ordered):
            title = f"{mode.value} ({position + 1} of {len(ordered)})"
            task = progress.add_task(title, total=None)
            outcome = _run_mode(
                config,
                mode,
                folder,
                naive_peak_bytes=naive_peak_bytes,
                on_line=lambda line, task=task, title=title: progress.update(task, description=f"{title}: {line}"),
            )
            write_outcome(outcome, folder / f"{mode.value}.json")
            progress.remove_task(task)
            console.print(_summary(outcome), soft_wrap=True)
            outcomes.append(outcome)
            if mode is Mode.naive and isinstance(outcome, Finished):
                naive_peak_bytes = outcome.measurement.activation_peak_bytes
    return tuple(outcomes)


def _summary(outcome: Outcome) -> str:
    match outcome:
        case Finished():
            measured = outcome.measurement
            peak_mib = measured.activation_peak_bytes / MEBIBYTE
            return f"{outcome.mode.value:<30}{measured.wall_s * 1e3:10.1f} ms a step{peak_mib:12.2f} MiB of activations"
        case Failed():
            return f"[red]{outcome.mode.value:<30}[/red]{escape(outcome.error)}"


def _run_mode(
    config: CompareConfig, mode: Mode, folder: Path, *, naive_peak_bytes: int, on_line: Callable[[str], None]
) -> Outcome:
    result, log = folder / f"{mode.value}.json", folder / f"{mode.value}.log"
    arguments = ["--config", folder / "config.yaml", "--mode", mode.value, "--output", result]
    command = [sys.executable, "-m", "recipes.run_one", *map(str, arguments)]
    command += ["--naive-peak-bytes", str(naive_peak_bytes)]
    result.unlink(missing_ok=True)
    with log.open("w") as log_file:
        # In a process group of its own, so that a timeout also ends the compiler's worker processes.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_forward_lines, args=(process.stdout, on_line), daemon=True)
        reader.start()
        try:
            exit_code = process.wait(timeout=config.size.timeout_s)
        except subprocess.TimeoutExpired:
            return Failed(mode, f"timed out after {config.size.timeout_s:g} s (size.timeout_s)", str(log))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            reader.join()
            process.stdout.close()
    if exit_code == 0:
        return read_outcome(result)
    if exit_code < 0:
        return Failed(mode, f"killed by {signal.Signals(-exit_code).name}", str(log))
    return Failed(mode, error_line(log.read_text()) or f"ended with exit code {exit_code}", str(log))


def _forward_lines(stream: IO[str], on_line: Callable[[str], None]) -> None:
    for line in stream:
        if line.startswith("step "):
            on_line(line.strip())


def _environment() -> dict[str, str]:
    """Return this process's environment, changed so that a child finds `recipes` from any working directory."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}


def error_line(log: str) -> str:
    """Return the line of `log` that names the exception of its last traceback; empty if `log` has no traceback."""
    _, found, tail = log.rpartition("Traceback (most recent call last):\n")
    lines = tail.splitlines() if found else []
    return next((line for line in lines if line and not line[0].isspace()), "")
