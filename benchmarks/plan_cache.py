"""Measure what a warm plan cache saves in the first steps: `python -m benchmarks.plan_cache --help`.

Each training runs in a process of its own, first with an empty cache, then with the cache that the first one filled.
The times include tracing, which no cache saves, but not the imports and the building of the network.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

import tinybp_lightning as tbp
from recipes.config import compose_config
from recipes.data import make_batches
from recipes.models import build_workload
from recipes.run_one import pick_device
from tinybp_lightning.runtime.torch import targets

__all__ = ["FirstSteps", "main"]

NUM_STEPS = 6


@dataclass(frozen=True, slots=True)
class FirstSteps:
    """The first steps of one training: the seconds of each, and how many plans came from the cache."""

    model: str
    num_cached: int
    steps_s: tuple[float, ...]


def first_steps(model: str, size: str, budget: str) -> FirstSteps:
    """Train in this process and time the first steps."""
    config = compose_config([f"model={model}", f"size={size}"])
    device = pick_device("auto")
    workload = build_workload(config.model, config.shape, seed=config.seed, device=device)
    (batch,) = (b.to(device) for b in make_batches(config.model.name, config.shape, num_batches=1, seed=config.seed))
    tbp.hcb(workload.model, activation_budget=budget)
    steps_s: list[float] = []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        workload.loss(batch).backward()
        workload.model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps_s.append(time.perf_counter() - started)
    num_cached = sum(target.counts.num_cached for target in targets(workload.model))
    return FirstSteps(model, num_cached, tuple(steps_s))


def main(
    models: Annotated[str, typer.Option(help="Recipe models, separated by commas.")] = "transformer,resnet",
    size: Annotated[str, typer.Option(help="Recipe size.")] = "small",
    budget: Annotated[str, typer.Option(help="Activation budget.")] = "40%",
    alone: Annotated[bool, typer.Option(help="Train one model in this process, and print JSON.")] = False,
) -> None:
    """Print the seconds of the first steps without and with a warm cache."""
    if alone:
        print(json.dumps(asdict(first_steps(models, size, budget))))
        return
    command = [sys.executable, "-m", "benchmarks.plan_cache", "--alone", "--size", size, "--budget", budget]
    for model in models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "warm"):
                run = subprocess.run(
                    [*command, "--models", model],
                    env={**os.environ, "TINYBP_CACHE": folder},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                found = json.loads(run.stdout.splitlines()[-1])
                seconds = " ".join(f"{s:7.2f}" for s in found["steps_s"])
                print(f"{model:12} {cache:6} cached={found['num_cached']} steps (s): {seconds}", flush=True)


if __name__ == "__main__":
    typer.run(main)
