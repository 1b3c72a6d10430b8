"""Train one mode in this process and write its measurement: `python -m recipes.run_one`.

`recipes.compare` starts one such process for each mode. By hand, pass the `config.yaml` of a comparison's folder. The
process prints one line a step. An error ends it with a traceback and without a result file.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from recipes.config import CompareConfig, load_config
from recipes.data import batches_sha256, make_batches
from recipes.measure import measure
from recipes.models import build_workload, make_optimizer
from recipes.modes import Mode
from recipes.outcome import Finished, write_outcome
from recipes.peers import apply_mode
from tinybp_lightning.errors import ConfigError

__all__ = ["main", "pick_device", "run_one"]


def pick_device(name: str) -> torch.device:
    """Return the device that a configuration's `device` names: `auto` means CUDA if torch finds it, else the CPU.

    **Raises:** `ConfigError` when the name is unknown, or asks for CUDA and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`device={name}` is not a device: use `auto`, `cpu` or `cuda`.")
    if name == "cuda" and not has_cuda:
        raise ConfigError("`device=cuda`, but torch finds no CUDA device: use `cpu`.")
    return torch.device("cuda", 0) if has_cuda and name != "cpu" else torch.device("cpu")


def run_one(config: CompareConfig, mode: Mode, *, naive_peak_bytes: int) -> Finished:
    """Train `config`'s model in `mode` and return the measurement. Sets torch's process-wide options.

    **Arguments:** `naive_peak_bytes`: activation peak of plain training, 0 when it is not known.

    **Raises:** the mode's own errors.
    """
    begin_s = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads this when it makes its first handle, which is later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = pick_device(config.device)
    num_batches = config.size.steps + 1
    batches = make_batches(config.model.name, config.shape, num_batches=num_batches, seed=config.seed)
    workload = build_workload(config.model, config.shape, seed=config.seed, device=device)
    optimizer = make_optimizer(config.model, workload.model)
    forecast = apply_mode(mode, workload, budget=config.budget, naive_peak_bytes=naive_peak_bytes)
    setup_s = time.perf_counter() - begin_s
    measurement = measure(
        workload,
        optimizer,
        batches,
        warmup_steps=config.size.warmup_steps,
        seed=config.seed,
        on_step=lambda step: print(f"step {step + 1}/{num_batches}", flush=True),
    )
    return Finished(mode, measurement, forecast(), workload.source, batches_sha256(batches), setup_s)


def main(
    config: Annotated[Path, typer.Option(help="config.yaml of a comparison's folder.")],
    mode: Annotated[Mode, typer.Option(help="The mode to train in.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    naive_peak_bytes: Annotated[int, typer.Option(help="Activation peak of plain training; 0 if it is not known.")] = 0,
) -> None:
    """Train one mode and write its measurement."""
    write_outcome(run_one(load_config(config), mode, naive_peak_bytes=naive_peak_bytes), output)


if __name__ == "__main__":
    # Plain tracebacks: the caller looks for the line that names the error.
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
