"""Compare the FLOPs that peers and plans recompute at equal peaks: `python -m benchmarks.recomputed_flops --help`.

Recipes train on the CPU with each peer, then under a budget of the peer's measured peak. Torch's `FlopCounterMode`
counts the FLOPs of matrix products, convolutions and attention in one settled step; allocator events of another step
give the peak. What exceeds plain training's count is recomputed. The graphs of torch's budgeted partitioner
(`activation_memory_budget`) run in eager mode, so that they can be counted; they are not timed, because nobody would
train that way. Plans minimise operations here (`costs="operations"`). With `--costs seconds` they minimise time, which
is the package's default: on a CPU a norm may take as long as a convolution, but a peer that recomputes only norms
counts no FLOPs. A row is marked, and the exit code is 1, where a plan recomputes more FLOPs than the peer or exceeds
its peak. Seconds are those of the quickest of a few steps and decide nothing. `benchmarks.peers_in_simulator` compares
in simulated seconds.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false, reportPrivateUsage=false

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._functorch.config
import typer
from rich.console import Console
from rich.progress import track
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.listener import Listener
from benchmarks.recipe_options import Models, Size
from recipes.config import CompareConfig, ModelName, Precision, compose_config
from recipes.data import Batch, make_batches
from recipes.measure import package_version, record_memory
from recipes.models import Workload, build_workload
from recipes.modes import Mode
from recipes.peers import apply_mode
from tinybp_lightning.config import Costs
from tinybp_lightning.errors import BudgetTooSmallError

__all__ = ["Row", "app", "compare", "markdown_table"]

_TODAY = datetime.now().astimezone().date().isoformat()
_DEVICE = torch.device("cpu")
_NUM_WARMUP = 2
_NUM_TIMED = 7
# A plan is traced and repaired for at most five steps, after the first.
_MAX_STEPS = 10
_SHARES = (0.7, 0.5, 0.3, 0.1)
_CHECKPOINTS = (Mode.checkpoint, Mode.selective)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What one step takes with one way of training; `step_s` is `None` if it was not timed."""

    peak_bytes: int
    flops: int
    step_s: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One peer, and the plan under a budget of its peak. `plan_flops` is `None` if no plan meets that budget.

    FLOPs are those beyond plain training's `plain_flops`. Peaks are bytes of activations. Seconds are of one step.
    """

    model: str
    peer: str
    plain_peak_bytes: int
    plain_flops: int
    peer_peak_bytes: int
    peer_flops: int
    plan_peak_bytes: int | None
    plan_flops: int | None
    plain_step_s: float | None
    peer_step_s: float | None
    plan_step_s: float | None

    @property
    def is_good(self) -> bool:
        """Whether the plan keeps within the peer's peak and recomputes no more than it, or no plan is that small."""
        if self.plan_peak_bytes is None or self.plan_flops is None:
            return True
        return self.plan_peak_bytes <= self.peer_peak_bytes and self.plan_flops <= self.peer_flops


class _Counting:
    """Runs the graphs of torch's budgeted partitioner in eager mode, and counts their FLOPs."""

    def __init__(self, workload: Workload) -> None:
        self.flops = 0
        # `Any`, because torch annotates none of these.
        backend: Any = aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            partition_fn=min_cut_rematerialization_partition,
        )
        workload.model.compile(backend=backend, dynamic=False)

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run_graph: Any = boxed_nop(graph, list(inputs))

        def run(arguments: list[Any]) -> Any:
            with FlopCounterMode(display=False) as counter:
                outputs = run_graph(arguments)
            self.flops += counter.get_total_flops()
            return outputs

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess] - torch marks it this way
        return run


def _build(config: CompareConfig) -> Workload:
    return build_workload(config.model, config.shape, seed=config.seed, device=_DEVICE)


def _cost(
    workload: Workload,
    batches: Sequence[Batch],
    *,
    counting: _Counting | None = None,
    listener: Listener | None = None,
) -> _Cost:
    """Train until the plan that `listener` records has settled, and return what one step costs.

    **Raises:** `RuntimeError` if it does not settle.
    """

    def step(batch: Batch) -> None:
        workload.model.zero_grad(set_to_none=True)
        workload.loss(batch).backward()

    for number, batch in enumerate(batches[:_MAX_STEPS], start=1):
        step(batch)
        told = [] if listener is None else listener.profiles
        is_settled = listener is None or (bool(told) and told[-1].measured_peak_bytes is None)
        if number >= _NUM_WARMUP and is_settled:
            break
    else:
        raise RuntimeError(f"the plan has not settled after {_MAX_STEPS} steps.")
    step_s = None
    if counting is None:
        step_s = min(_seconds(lambda: step(batches[-2])) for _ in range(_NUM_TIMED))
        with FlopCounterMode(display=False) as counter:
            step(batches[-2])
        flops = counter.get_total_flops()
    else:
        counting.flops = 0
        step(batches[-2])
        flops = counting.flops
    workload.model.zero_grad(set_to_none=True)

    def measured_step() -> None:
        workload.loss(batches[-1]).backward()

    peak = record_memory(measured_step, workload.model).memory.activation_peak_bytes
    workload.model.zero_grad(set_to_none=True)
    return _Cost(peak, flops, step_s)


def _seconds(step: Callable[[], None]) -> float:
    begin_s = time.perf_counter()
    step()
    return time.perf_counter() - begin_s


def _peers(config: CompareConfig, batches: Sequence[Batch], console: Console) -> list[tuple[str, _Cost]]:
    """Return what each peer costs, without those that cannot train the model; `console` shows why."""
    found: list[tuple[str, _Cost]] = []
    for mode in _CHECKPOINTS:
        workload = _build(config)
        apply_mode(mode, workload, budget="100%", naive_peak_bytes=0)
        found.append((mode.value, _cost(workload, batches)))
    for share in _SHARES:
        torch.compiler.reset()
        with torch._functorch.config.patch(activation_memory_budget=share):
            workload = _build(config)
            name = f"partitioner {share:.0%}"
            try:
                found.append((name, _cost(workload, batches, counting=_Counting(workload))))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                console.print(f"{config.model.name.value}: {name} does not train it: {reason}", soft_wrap=True)
    torch.compiler.reset()
    return found


def compare(
    model: str,
    size: str,
    console: Console,
    *,
    costs: Costs = Costs.OPERATIONS,
    precision: Precision = Precision.fp32,
) -> list[Row]:
    """Return a row for each peer on the recipe `model` at `size`. `costs`: what plans minimise.

    **Raises:** the errors of building, compiling and training.
    """
    config = compose_config([f"model={model}", f"size={size}", "device=cpu", f"shape.precision={precision.value}"])
    batches = make_batches(config.model.name, config.shape, num_batches=_MAX_STEPS + 2, seed=config.seed)
    plain = _cost(_build(config), batches)
    rows: list[Row] = []
    for name, peer in track(_peers(config, batches, console), description=model, transient=True):
        workload, listener = _build(config), Listener()
        apply_mode(
            Mode.hcb_eager,
            workload,
            budget=f"{peer.peak_bytes}B",
            naive_peak_bytes=plain.peak_bytes,
            observers=[listener],
            costs=costs.value,
        )
        try:
            mine = _cost(workload, batches, listener=listener)
        except BudgetTooSmallError:
            mine = None
        rows.append(
            Row(
                model=model,
                peer=name,
                plain_peak_bytes=plain.peak_bytes,
                plain_flops=plain.flops,
                peer_peak_bytes=peer.peak_bytes,
                peer_flops=peer.flops - plain.flops,
                plan_peak_bytes=mine and mine.peak_bytes,
                plan_flops=mine and mine.flops - plain.flops,
                plain_step_s=plain.step_s,
                peer_step_s=peer.step_s,
                plan_step_s=mine and mine.step_s,
            )
        )
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; `!` marks a failure."""
    head = "| model | peer | peak, MiB | of plain | recomputed, MFLOP | step, plain = 1 |"
    head += " plan's peak, MiB | plan's MFLOP | plan's step |\n"
    lines = [head + "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in rows:
        plan = ("below the smallest plan", "")
        if r.plan_peak_bytes is not None and r.plan_flops is not None:
            plan = (f"{r.plan_peak_bytes / 2**20:.2f}", f"{r.plan_flops / 1e6:.1f}{'' if r.is_good else ' !'}")
        steps = _times(r.peer_step_s, r.plain_step_s), _times(r.plan_step_s, r.plain_step_s)
        lines.append(
            f"| {r.model} | {r.peer} | {r.peer_peak_bytes / 2**20:.2f} | "
            f"{r.peer_peak_bytes / r.plain_peak_bytes:.1%} | {r.peer_flops / 1e6:.1f} | "
            f"{steps[0]} | {plan[0]} | {plan[1]} | {steps[1]} |"
        )
    return "\n".join(lines) + "\n"


def _times(step_s: float | None, plain_s: float | None) -> str:
    return "" if step_s is None or plain_s is None else f"{step_s / plain_s:.3f}"


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    model: Models = None,
    size: Size = "small",
    costs: Annotated[Costs, typer.Option(help="What plans minimise.")] = Costs.OPERATIONS,
    precision: Annotated[
        Precision, typer.Option(help="Number format of the parameters, or of autocast regions.")
    ] = Precision.fp32,
    export: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it as Markdown.")] = Path(
        f"results/{_TODAY}_recomputed_flops.json"
    ),
) -> None:
    """Measure and compare what peers and plans recompute at equal peaks."""
    torch.set_num_threads(1)
    console = Console()
    rows: list[Row] = []
    for name in model or list(ModelName):
        rows += compare(name.value, size, console, costs=costs, precision=precision)
        where = {
            "date": _TODAY,
            "size": size,
            "costs": costs.value,
            "precision": precision.value,
            "torch": package_version("torch"),
            "rows": [asdict(r) for r in rows],
        }
        export.parent.mkdir(parents=True, exist_ok=True)
        # After every model, so that an interrupted benchmark leaves what it measured.
        export.write_text(json.dumps(where, indent=1) + "\n")
        title = f"# Recomputed FLOPs at equal peaks, {_TODAY}\n\n"
        title += f"Size `{size}`, {precision.value}, plans that minimise {costs.value}, "
        title += f"torch {package_version('torch')}.\n\n"
        export.with_suffix(".md").write_text(title + markdown_table(rows))
    console.print(markdown_table(rows), soft_wrap=True)
    for suffix in (".json", ".md"):
        console.print(f"wrote {export.with_suffix(suffix)}", soft_wrap=True)
    if not all(row.is_good for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
