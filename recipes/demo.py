"""Show that `strategy="hcb"` trains a real model in less memory with the same losses: `python -m recipes.demo`.

It trains a small Llama on CPython's own documentation, byte by byte, in two Lightning runs: with the plain strategy,
then with `hcb` at a share of the activations. It compares every logged loss bit for bit, measures one late step of each
run from the allocator's events, and writes a table and a picture. The exit code is 1 if a check fails.
"""

# torch and Lightning annotate their members in part only, so the rules would report them and not us.
# pyright: reportUnknownMemberType=false

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
import typer
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

import tinybp_lightning as tbp
from recipes.config import CompareConfig, compose_config
from recipes.data import Batch, make_batches
from recipes.demo_picture import draw_demo
from recipes.forecast import PlanRecorder
from recipes.measure import cpu_memory
from recipes.models import Workload, build_workload, make_optimizer
from recipes.timeline import StepMemory

__all__ = ["Fit", "TextModel", "main"]

_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Fit:
    """One finished run: the logged loss of every step, the memory of the measured step, and the time of all steps."""

    name: str
    losses: tuple[torch.Tensor, ...]
    memory: StepMemory
    wall_s: float


class TextModel(pl.LightningModule):
    """A language model as a user would write it, without any code about memory."""

    def __init__(self, workload: Workload, config: CompareConfig) -> None:
        super().__init__()
        self.model = workload.model
        self._workload = workload
        self._config = config
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        """Return the loss of one batch, and log it."""
        loss = self._workload.loss(batch)
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the recipe's optimizer."""
        return make_optimizer(self._config.model, self.model)


class _MeasuredStep(pl.Callback):
    """Profiles the forward and the backward of one step with torch's profiler."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._profiler: profile | None = None
        self.memory: StepMemory | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start before the forward."""
        if batch_idx == self._step:
            trainer.optimizers[0].zero_grad(set_to_none=True)
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.start()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Stop when the backward has made the gradients."""
        if self._profiler is not None:
            self._profiler.stop()
            self.memory, self._profiler = cpu_memory(self._profiler, pl_module), None


def main(
    budget: Annotated[
        str, typer.Option(help="Activation budget: a share of plain training's (30%), or a size.")
    ] = "30%",
    steps: Annotated[int, typer.Option(min=8, help="Training steps of each run.")] = 40,
    output: Annotated[Path, typer.Option(help="Folder for demo.md and demo.png.")] = Path("outputs/demo"),
) -> None:
    """Train a small Llama on real text, plainly and under a memory budget, and compare the two runs."""
    console = Console()
    config = compose_config(["model=transformer", "size=small", f"size.steps={steps}", "device=cpu"])
    recorder = PlanRecorder()
    strategy = tbp.HCBStrategy(activation_budget=budget, observers=[recorder])
    plain = _fit("plain", "auto", config)
    ours = _fit(f"hcb {budget}", strategy, config)
    plan = recorder.plan
    if plan is None:
        raise SystemExit("demo: the strategy made no plan, so it did not see the model train.")
    checks = {
        "every logged loss is bit-identical": _same(plain.losses, ours.losses),
        "the loss has fallen": bool(ours.losses[-1] < ours.losses[0]),
        "the measured peak is within the budget": ours.memory.activation_peak_bytes <= plan.budget_bytes,
    }
    output.mkdir(parents=True, exist_ok=True)
    _write_table(plain, ours, plan.budget_bytes, plan.predicted_peak_bytes, checks, output / "demo.md", console)
    draw_demo(plain, ours, plan, output / "demo.png")
    console.print(plan.summary)
    console.print(f"Written: {output / 'demo.md'}, {output / 'demo.png'}")
    if not all(checks.values()):
        raise SystemExit(1)


def _fit(name: str, strategy: Any, config: CompareConfig) -> Fit:
    torch.manual_seed(config.seed)
    workload = build_workload(config.model, config.shape, seed=config.seed, device=torch.device("cpu"))
    batches = make_batches(config.model.name, config.shape, num_batches=config.size.steps, seed=config.seed)
    model = TextModel(workload, config)
    measured = _MeasuredStep(config.size.steps - 2)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[measured, TQDMProgressBar(refresh_rate=1)],
    )
    loader = DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType] - a tuple is a data set
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the batches are in memory
        trainer.fit(model, loader)
    wall_s = time.perf_counter() - started
    if measured.memory is None:
        raise SystemExit(f"demo: the measured step of `{name}` did not run.")
    return Fit(name, tuple(model.losses), measured.memory, wall_s)


def _same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _write_table(
    plain: Fit,
    ours: Fit,
    budget_bytes: int,
    predicted_bytes: int,
    checks: dict[str, bool],
    path: Path,
    console: Console,
) -> None:
    base = plain.memory.activation_peak_bytes
    rows = [
        (
            fit.name,
            f"{fit.losses[0].item():.6f}",
            f"{fit.losses[-1].item():.6f}",
            f"{fit.memory.activation_peak_bytes / _MIB:.2f}",
            f"{fit.memory.activation_peak_bytes / base:.1%}",
            f"{fit.wall_s:.1f}",
        )
        for fit in (plain, ours)
    ]
    heads = ("run", "first loss", "last loss", "activation peak (MiB)", "of plain", "all steps (s)")
    notes = [
        f"budget {budget_bytes / _MIB:.2f} MiB, predicted peak {predicted_bytes / _MIB:.2f} MiB",
        *(f"{'yes' if ok else 'NO'}: {what}" for what, ok in checks.items()),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows] + ["", *(f"- {note}" for note in notes)]
    path.write_text("\n".join(lines) + "\n")
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note)


if __name__ == "__main__":
    typer.run(main)
