"""How do the planner's seconds and gap grow with the number of layers? `python -m benchmarks.planner_scaling --help`.

Layers are those of captured networks (`benchmarks.chains`), repeated; DenseNet-like and random chains are made up. A
gap is how much slower than the best possible a plan is at most. Seconds are of the process's CPU time: one planner for
all budgets of a chain, setting it up included in the first; with `--fresh` each plan has a planner of its own, as the
first plan of a training has. The second picture is the peak of uniform chains when no block runs again more often than
a height allows, which is what makes the tree worth its name.
"""

# matplotlib annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from rich.console import Console

from benchmarks.chains import load_chain
from benchmarks.chains.shapes import dense_chain, random_dag_chain, repeated, uniform_chain
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph import BlockId, BoundaryId, Chain
from tinybp_lightning.schedule import Planner, Schedule, certify, keep_all, simulate
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Store

__all__ = ["HeightPoint", "Point", "main"]

mpl.use("Agg")
_TODAY = datetime.now().astimezone().date().isoformat()
LAYERS = (8, 16, 32, 80, 160, 320)
PERCENTS = (70, 50, 30, 15)


@dataclass(frozen=True, slots=True)
class Point:
    """One plan: `budget` is a percentage of the plain peak, or `min` for the smallest feasible one."""

    family: str
    num_layers: int
    num_blocks: int
    budget: str
    budget_share: float
    cpu_s: float
    slowdown: float
    gap: float


@dataclass(frozen=True, slots=True)
class HeightPoint:
    """The peak of a uniform chain under a tree in which no block runs again more than `height` times; `log`: binary."""

    height: str
    num_blocks: int
    peak_bytes: int
    num_forwards: int


def _llama(num_layers: int) -> Chain:
    return repeated(load_chain("llama_8"), first_block=15, layer_blocks=7, num_copies=num_layers - 8)


def _gpt2(num_layers: int) -> Chain:
    return repeated(load_chain("gpt2_8"), first_block=5, layer_blocks=2, num_copies=num_layers - 8)


def _resnet(num_layers: int) -> Chain:
    """ResNet-152 has 50 bottleneck blocks; more of them go to its third stage."""
    return repeated(load_chain("resnet_152"), first_block=22, layer_blocks=1, num_copies=max(0, num_layers - 50))


_FAMILIES: dict[str, Callable[[int], Chain]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "resnet": _resnet,
    "densenet-like": dense_chain,
    "random": lambda num_layers: random_dag_chain(num_layers, seed=num_layers),
    "unet_small": lambda _: load_chain("unet_small"),
    "unet_medium": lambda _: load_chain("unet_medium"),
}
_DEPTHS = {"resnet": (50, 80, 160, 320), "unet_small": (22,), "unet_medium": (32,)}
"""Where a family has depths of its own; the U-Nets are single networks, counted by their residual layers."""

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    export: Annotated[Path, typer.Option(help="JSON to write; table and picture go beside it.")] = Path(
        f"results/{_TODAY}_planner_scaling.json"
    ),
    family: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(_FAMILIES)}; repeat it.")] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="Numbers of layers; repeat it. 8 to 320 when not given.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set up a planner of its own for each plan.")] = False,
    limit_s: Annotated[float, typer.Option(help="Longer chains of a family are left out after a plan this slow.")] = 30,
) -> None:
    """Plan chains of 8 to 320 layers at 70, 50, 30 and 15 % of the plain peak and at the smallest budget."""
    console = Console()
    points: list[Point] = []
    left_out: list[str] = []
    heights = [_height_point(height, n) for height in ("1", "2", "3", "log") for n in (4, 8, 16, 32, 64, 128, 256)]
    for name in family or list(_FAMILIES):
        for num_layers in _DEPTHS.get(name, tuple(layers or LAYERS)):
            slowest_s = max((p.cpu_s for p in points if p.family == name), default=0.0)
            if slowest_s > limit_s:
                left_out.append(f"{name} of {num_layers} layers: a shorter one took {slowest_s:.0f} s")
                console.print(f"left out {left_out[-1]}", soft_wrap=True)
                continue
            for point in _measure(name, num_layers, fresh=fresh):
                points.append(point)
                console.print(_row(point), soft_wrap=True)
            # After every chain: a run that is stopped leaves what it measured.
            _write(export, points, heights, left_out, fresh=fresh)
    for suffix in (".json", ".md", ".png"):
        console.print(f"wrote {export.with_suffix(suffix)}", soft_wrap=True)


def _measure(name: str, num_layers: int, *, fresh: bool) -> list[Point]:
    chain = _FAMILIES[name](num_layers)
    plain_bytes = simulate(chain, keep_all(chain)).peak_bytes
    points: list[Point] = []
    started_s = time.process_time()
    planner = Planner(chain)
    for percent in (*PERCENTS, None):
        if fresh:
            started_s, planner = time.process_time(), Planner(chain)
        budget = "min" if percent is None else f"{percent}%"
        budget_bytes = planner.smallest_bytes if percent is None else plain_bytes * percent // 100
        try:
            found = planner.plan(budget_bytes=budget_bytes)
        except BudgetTooSmallError:
            continue
        plain_s = found.total_s - found.recompute_s
        cpu_s = time.process_time() - started_s
        gap = certify(chain, found, planner=planner).gap
        started_s = time.process_time()
        share = budget_bytes / plain_bytes
        points.append(Point(name, num_layers, len(chain.blocks), budget, share, cpu_s, found.total_s / plain_s, gap))
    return points


def _height_point(height: str, num_blocks: int) -> HeightPoint:
    chain = uniform_chain(num_blocks)
    # The binary tree splits until single blocks are left.
    schedule = _nested(
        num_blocks, math.ceil(math.log2(num_blocks)) if height == "log" else int(height), height == "log"
    )
    timeline = simulate(chain, schedule)
    assert height == "log" or max(timeline.num_forwards) <= int(height) + 1, "a block runs again too often"
    return HeightPoint(height, num_blocks, timeline.peak_bytes, sum(timeline.num_forwards))


def _nested(num_blocks: int, height: int, is_binary: bool) -> Schedule:
    """Run through, storing every part's boundary; reverse the parts from the last, each the same way a level lower."""
    actions: list[Action] = []
    pending = [(0, num_blocks, height, False)]
    while pending:
        first, end, levels, stored = pending.pop()
        if not levels or end - first == 1:
            actions += [ForwardSave(BlockId(block)) for block in range(first, first + 1)]
            actions += [Drop(BoundaryId(first))] if stored and first else []
            actions += [ForwardSave(BlockId(block)) for block in range(first + 1, end)]
            actions += [Backward(BlockId(block)) for block in reversed(range(first, end))]
            continue
        num_parts = 2 if is_binary else _num_parts(end - first, levels)
        edges = [first + (end - first) * k // num_parts for k in range(num_parts + 1)]
        for k, start in enumerate(edges[:-1]):
            is_last = k == num_parts - 1
            pending.append((start, edges[k + 1], levels - 1, stored if k == 0 else not is_last))
            if not is_last:
                is_new = start > 0 and not (k == 0 and stored)
                actions += [Store(BoundaryId(start))] if is_new else []
                actions += [Forward(BlockId(block)) for block in range(start, edges[k + 1])]
        if num_parts > 1:
            # The first part's boundary is stored now, whoever stored it.
            position = len(pending) - num_parts
            pending[position] = (first, edges[1], levels - 1, True)
    return Schedule(num_blocks=num_blocks, actions=tuple(actions))


@cache
def _least_bytes(num_blocks: int, height: int) -> int:
    """About the bytes that a tree of `height` needs: stored boundaries, and two bytes for each block kept."""
    if not height:
        return 2 * num_blocks
    return min(k - 1 + _least_bytes(-(-num_blocks // k), height - 1) for k in range(1, num_blocks + 1))


def _num_parts(num_blocks: int, height: int) -> int:
    parts = range(1, num_blocks + 1)
    return min(parts, key=lambda k: k - 1 + _least_bytes(-(-num_blocks // k), height - 1))


def _row(point: Point) -> str:
    return (
        f"| {point.family} | {point.num_layers} | {point.num_blocks} | {point.budget} ({point.budget_share:.1%}) "
        f"| {point.cpu_s:.1f} | {point.slowdown:.3f} | {point.gap:.2%} |"
    )


def _write(export: Path, points: list[Point], heights: list[HeightPoint], left_out: list[str], *, fresh: bool) -> None:
    export.parent.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "date": _TODAY}
    data = {**machine, "fresh": fresh, "points": [asdict(p) for p in points], "heights": [asdict(h) for h in heights]}
    export.write_text(json.dumps({**data, "left_out": left_out}, indent=1) + "\n")
    lines = [
        "| family | layers | blocks | budget (of plain) | CPU seconds | step, plain = 1 | gap |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, points),
        "",
        *(f"Left out: {reason}." for reason in left_out),
        "",
        "| height | blocks | peak bytes | forwards |",
        "| --- | --- | --- | --- |",
        *(f"| {h.height} | {h.num_blocks} | {h.peak_bytes} | {h.num_forwards} |" for h in heights),
    ]
    export.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _draw(export.with_suffix(".png"), points, heights)


def _draw(path: Path, points: list[Point], heights: list[HeightPoint]) -> None:
    from matplotlib import pyplot as plt  # noqa: PLC0415  after the backend is chosen

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    seconds, gaps, peaks = axes
    for name in dict.fromkeys(p.family for p in points):
        layers = sorted({p.num_layers for p in points if p.family == name})
        of_layers = [[p for p in points if p.family == name and p.num_layers == n] for n in layers]
        seconds.plot(layers, [max(p.cpu_s for p in own) for own in of_layers], "o-", label=name)
        (line,) = gaps.plot(layers, [_worst(own, at_minimum=False) for own in of_layers], "o-", label=name)
        at_minimum = [_worst(own, at_minimum=True) for own in of_layers]
        gaps.plot(layers, at_minimum, "x--", color=line.get_color(), label="_at the smallest budget")
    for height in dict.fromkeys(h.height for h in heights):
        own = [h for h in heights if h.height == height]
        peaks.plot([h.num_blocks for h in own], [h.peak_bytes for h in own], "o-", label=f"height {height}")
    _finish(seconds, "layers", "CPU seconds of the slowest plan")
    _finish(gaps, "layers", "largest gap, percent (dashed: smallest budget)")
    gaps.set_yscale("symlog", linthresh=1)
    gaps.set_ylim(bottom=0)
    _finish(peaks, "blocks of a uniform chain", "peak, in boundaries")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _worst(points: list[Point], *, at_minimum: bool) -> float:
    return max((100 * p.gap for p in points if (p.budget == "min") == at_minimum), default=math.nan)


def _finish(axis: Any, across: str, up: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    app()
