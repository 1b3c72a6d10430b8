"""Check that no step is lost when memory runs out: `python -m benchmarks.oom_session --help`.

The same network trains twice from the same start: undisturbed, and with memory running out in every n-th step. On CUDA
the allocator is capped for that step (`torch.cuda.set_per_process_memory_fraction`), lower each time, so that the
active plan cannot fit. On the CPU an error is injected, alternately into a block's first run and into a replay. Losses,
parameters, buffers, optimizer state and random generators are compared bit for bit.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tinybp_lightning as tbp
from benchmarks.conformance_training import differences
from benchmarks.faults import Faults, Place
from recipes.run_one import pick_device
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.profile import PlanReport, StepProfile

__all__ = ["Outcome", "main"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the two runs.

    `num_failures` counts the runs that ran out of memory, over all steps. `first_difference` names what first differed
    from undisturbed training; it is empty if nothing did.
    """

    device: str
    num_steps: int
    num_struck: int
    num_failures: int
    num_lost: int
    first_difference: str
    first_peak_bytes: int
    last_peak_bytes: int
    wall_s: float


class _Recorder:
    """An observer that keeps the plans that were made because memory ran out."""

    def __init__(self) -> None:
        self.answers: list[PlanReport] = []

    def on_plan(self, plan: PlanReport) -> None:
        if plan.reason == "out of memory":
            self.answers.append(plan)

    def on_replay(self, profile: StepProfile) -> None:
        """Do nothing."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class _Cap:
    """Limits the allocator's headroom, less with every use: from 95 % to 45 % of a plain step's own peak."""

    def __init__(self, device: torch.device, plain_peak_bytes: int, num_uses: int) -> None:
        self._device = device
        self._plain_peak_bytes = plain_peak_bytes
        self._shares = [0.95 - 0.5 * i / max(1, num_uses - 1) for i in range(num_uses)]
        self._total_bytes = torch.cuda.get_device_properties(device).total_memory

    def press(self) -> None:
        """Cap the allocator at what it holds now plus the next share of a plain step's peak."""
        torch.cuda.empty_cache()
        there_bytes = torch.cuda.memory_reserved(self._device)
        limit_bytes = there_bytes + int(self._shares.pop(0) * self._plain_peak_bytes)
        cuda: Any = torch.cuda  # the function is not annotated
        cuda.set_per_process_memory_fraction(limit_bytes / self._total_bytes, self._device)

    def release(self) -> None:
        """Remove the cap."""
        cuda: Any = torch.cuda
        cuda.set_per_process_memory_fraction(1.0, self._device)


def _train(
    model: nn.Module,
    batches: list[torch.Tensor],
    step: Callable[[torch.Tensor], torch.Tensor],
    before: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Return what every step and the whole training left: losses, gradients, buffers, parameters, random numbers."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    left: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        before(index)
        left[f"step {index}: loss"] = step(batch).detach()
        for name, tensor in (*_gradients(model), *model.named_buffers()):
            left[f"step {index}: {name}"] = tensor.double().sum()
        optimizer.step()
    for name, parameter in model.named_parameters():
        left |= {f"{name}: {key}": value for key, value in optimizer.state[parameter].items()}
    drawn = {"device's random numbers": torch.rand(8, device=batches[0].device), "random numbers": torch.rand(8)}
    return left | model.state_dict() | drawn


def _gradients(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(f"gradient of {n}", p.grad) for n, p in model.named_parameters() if p.grad is not None]


def _plain_peak_bytes(model: nn.Module, batch: torch.Tensor) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()  # this process is ours, so nobody else reads these counters
    before_bytes = torch.cuda.memory_allocated()
    model(batch).square().mean().backward()
    model.zero_grad()
    return torch.cuda.max_memory_allocated() - before_bytes


def _strike(faults: Faults, cap: _Cap | None, every: int) -> Callable[[int], None]:
    places = (Place.FORWARD, Place.REPLAY)

    def before(index: int) -> None:
        faults.disarm()
        struck = index % every == every - 1
        if cap is not None:
            cap.release()
            if struck:
                cap.press()
        elif struck:
            faults.arm(places[(index // every) % 2], after=1)

    return before


def _session(device: torch.device, num_steps: int, every: int, depth: int, width: int, rows: int) -> Outcome:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(*(_Block(width) for _ in range(depth))).to(device)

    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(rows, width, generator=generator).to(device) for _ in range(num_steps)]
    plain, ours, recorder = make(), make(), _Recorder()

    def plain_step(batch: torch.Tensor) -> torch.Tensor:
        loss = plain(batch).square().mean()
        loss.backward()
        return loss

    num_struck = num_steps // every
    # Of another copy, because a forward changes the buffers that are compared.
    cap = _Cap(device, _plain_peak_bytes(make(), batches[0]), num_struck) if device.type == "cuda" else None
    want = _train(plain, batches, plain_step, lambda _: None)
    tbp.hcb(ours, activation_budget="100%", observers=(recorder,))
    began = time.perf_counter()
    with Faults() as faults:
        before = _strike(faults, cap, every)
        num_done = 0

        def compute_loss(batch: torch.Tensor) -> torch.Tensor:
            return ours(batch).square().mean()

        def step(batch: torch.Tensor) -> torch.Tensor:
            nonlocal num_done
            loss = tbp.run_step(ours, compute_loss, batch)
            num_done += 1
            return loss

        got = _train(ours, batches, step, before)
    if cap is not None:
        cap.release()
    plans = tbp.explain(ours).plans
    return Outcome(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        num_steps=num_steps,
        num_struck=num_struck,
        num_failures=faults.num_raised if cap is None else len(recorder.answers),
        num_lost=num_steps - num_done,
        first_difference=next(iter(differences(want, got)), ""),
        first_peak_bytes=plans[0].plain_peak_bytes,
        last_peak_bytes=plans[0].predicted_peak_bytes,
        wall_s=time.perf_counter() - began,
    )


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=1)] = 200,
    every: Annotated[int, typer.Option(help="Memory runs out in every n-th step.", min=2)] = 10,
    depth: Annotated[int, typer.Option(help="Number of residual blocks.", min=2)] = 8,
    width: Annotated[int, typer.Option(help="Number of features.", min=1)] = 64,
    rows: Annotated[int, typer.Option(help="Rows of a batch.", min=2)] = 64,
    export: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/oom_session.json"),
) -> None:
    """Train while memory runs out again and again, and compare with undisturbed training."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("ignore", message=".*ran out of device memory", category=HCBWarning)
    outcome = _session(pick_device(device), steps, every, depth, width, rows)
    export.parent.mkdir(parents=True, exist_ok=True)
    export.write_text(json.dumps(asdict(outcome), indent=2))
    print(json.dumps(asdict(outcome), indent=2))
    print(f"Written: {export}")
    if outcome.num_lost or outcome.first_difference:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
