"""Compare training on a GPU under budgets with plain training: `python -m benchmarks.gpu_session --help`.

Small real networks train with deterministic kernels. At several budgets, the loss, gradients and buffers of every step
are compared bit for bit with plain training's, and the allocator's own peak with the predicted one. The benchmark also
runs on the CPU, to test itself. `recipes.compare` measures speed.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import json
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

import tinybp_lightning as tbp
from recipes.config import CompareConfig, compose_config
from recipes.data import Batch, make_batches
from recipes.measure import record_memory
from recipes.models import Workload, build_workload
from recipes.run_one import pick_device

__all__ = ["Check", "main"]

NUM_STEPS = 5
CASES = {
    "llama": ["model=transformer", "size=small"],
    "llama_bf16": ["model=transformer", "size=small", "shape.precision=bf16"],
    "gpt2_dropout": ["model=transformer", "size=small", "model.architecture=gpt2", "model.dropout=0.1"],
    "resnet": ["model=resnet", "size=small"],
}


@dataclass(frozen=True, slots=True)
class Check:
    """One case at one budget. Peaks are bytes of activations; `error` is empty if the case ran."""

    case: str
    budget: str
    is_same: bool
    measured_bytes: int
    predicted_bytes: int
    budget_bytes: int
    plain_bytes: int
    num_blocks: int
    error: str


def _steps(workload: Workload, batches: tuple[Batch, ...]) -> list[list[torch.Tensor]]:
    """Return the loss, gradients and buffers of every step; the parameters do not change."""
    torch.manual_seed(0)
    found: list[list[torch.Tensor]] = []
    for batch in batches:
        workload.model.zero_grad(set_to_none=True)
        loss = workload.loss(batch)
        loss.backward()
        gradients = [p.grad.clone() for p in workload.model.parameters() if p.grad is not None]
        found.append([loss.detach(), *gradients, *(b.clone() for b in workload.model.buffers())])
    workload.model.zero_grad(set_to_none=True)
    return found


def _peak_bytes(workload: Workload, batch: Batch) -> int:
    def step() -> None:
        workload.loss(batch).backward()

    peak = record_memory(step, workload.model).memory.activation_peak_bytes
    workload.model.zero_grad(set_to_none=True)
    return peak


def _check(case: str, config: CompareConfig, budget: str, device: torch.device) -> Check:
    batches = tuple(
        b.to(device) for b in make_batches(config.model.name, config.shape, num_batches=NUM_STEPS, seed=config.seed)
    )
    plain = build_workload(config.model, config.shape, seed=config.seed, device=device)
    expected = _steps(plain, batches)
    plain_bytes = _peak_bytes(plain, batches[0])
    del plain
    ours = build_workload(config.model, config.shape, seed=config.seed, device=device)
    tbp.hcb(ours.model, activation_budget=budget)
    found = _steps(ours, batches)
    is_same = all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(found, expected, strict=True)
    )
    measured = _peak_bytes(ours, batches[0])
    plan = tbp.explain(ours.model).plans[0]
    return Check(
        case, budget, is_same, measured, plan.predicted_peak_bytes, plan.budget_bytes, plain_bytes,
        len(plan.chain.blocks), "",
    )  # fmt: skip


def main(
    budgets: Annotated[str, typer.Option(help="Activation budgets, comma-separated.")] = "100%,50%,30%",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    export: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/gpu_session.json"),
) -> None:
    """Compare training under budgets with plain training, bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    place = pick_device(device)
    checks: list[Check] = []
    for case, overrides in CASES.items():
        config = compose_config([*overrides, f"device={place.type}"])
        for budget in budgets.split(","):
            began = time.perf_counter()
            try:
                check = _check(case, config, budget, place)
            except (RuntimeError, ValueError) as error:  # the table reports it, and the next case runs
                traceback.print_exc()
                check = Check(case, budget, False, 0, 0, 0, 0, 0, f"{type(error).__name__}: {error}"[:300])
            checks.append(check)
            print(
                f"{case:14} {budget:>5} same={check.is_same} measured={check.measured_bytes} "
                f"predicted={check.predicted_bytes} budget={check.budget_bytes} plain={check.plain_bytes} "
                f"blocks={check.num_blocks} {time.perf_counter() - began:.1f}s {check.error}",
                flush=True,
            )
    export.parent.mkdir(parents=True, exist_ok=True)
    export.write_text(json.dumps([asdict(c) for c in checks], indent=2))
    print(f"Written: {export}")
    if not all(c.is_same and c.measured_bytes <= c.budget_bytes for c in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
