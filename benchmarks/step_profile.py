"""Profile where the time of a step goes in each mode: `python -m benchmarks.step_profile --help`.

All modes train in one process and alternate step by step, so that a device that slows down slows all of them. Then one
step of each is profiled: how long the device was busy, how long the host took to launch the work, and how often each
kernel ran. The difference of two modes' kernel tables shows what only one of them does.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from recipes.config import compose_config
from recipes.data import Batch, make_batches
from recipes.measure import record_memory
from recipes.models import Workload, build_workload
from recipes.modes import Mode, parse_modes
from recipes.peers import apply_mode
from recipes.run_one import pick_device
from tinybp_lightning.runtime.profile import PlanReport, StepProfile
from tinybp_lightning.schedule import to_text

__all__ = ["ModeProfile", "main"]

MICROSECONDS = 1e-6
NUM_KERNELS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class ModeProfile:
    """A step of one mode. `host_s` ends when backward returns, before the device has finished.

    `chain` and `schedule` are the active plan's: what the planner was given and what it returned.
    """

    mode: str
    wall_s: float
    walls_s: tuple[float, ...]
    host_s: float
    activation_peak_bytes: int
    device_busy_s: float
    num_kernels: int
    kernels: dict[str, tuple[int, float]]
    recompute_s: float | None
    predicted_recompute_s: float | None
    plan: str
    chain: dict[str, Any] | None
    schedule: str


@dataclass(slots=True)
class _Trainee:
    mode: Mode
    workload: Workload
    watcher: "_Watcher"
    walls_s: list[float]
    hosts_s: list[float]


class _Watcher:
    """An observer that keeps the last plan and the last step's profile."""

    def __init__(self) -> None:
        self.plan: PlanReport | None = None
        self.step: StepProfile | None = None

    def on_plan(self, report: PlanReport) -> None:
        self.plan = report

    def on_replay(self, profile: StepProfile) -> None:
        self.step = profile


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(workload: Workload, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Return the seconds until the device has finished, and until the host has."""
    workload.model.zero_grad(set_to_none=True)
    _synchronize(device)
    began = time.perf_counter()
    workload.loss(batch).backward()
    host_s = time.perf_counter() - began
    _synchronize(device)
    return time.perf_counter() - began, host_s


def _kernels(step: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """Run `step` under the profiler; return the count and the total seconds of each kernel (on the CPU: of each op)."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        _synchronize(device)
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in cast(Any, profiler).events():
        on_device = "CUDA" in str(event.device_type)
        if on_device == is_cuda:
            counts[event.name] += 1
            time_us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            seconds[event.name] += time_us * MICROSECONDS
    return {name: (counts[name], seconds[name]) for name, _ in sorted(seconds.items(), key=lambda item: -item[1])}


def _profile(trainee: _Trainee, batch: Batch, device: torch.device) -> ModeProfile:
    workload, watcher = trainee.workload, trainee.watcher
    kernels = _kernels(lambda: _step(workload, batch, device), device)
    workload.model.zero_grad(set_to_none=True)
    memory = record_memory(lambda: workload.loss(batch).backward(), workload.model).memory
    workload.model.zero_grad(set_to_none=True)
    return ModeProfile(
        mode=trainee.mode.value,
        wall_s=statistics.median(trainee.walls_s),
        walls_s=tuple(trainee.walls_s),
        host_s=statistics.median(trainee.hosts_s),
        activation_peak_bytes=memory.activation_peak_bytes,
        device_busy_s=sum(seconds for _, seconds in kernels.values()),
        num_kernels=sum(count for count, _ in kernels.values()),
        kernels=kernels,
        recompute_s=watcher.step.replay_s if watcher.step else None,
        predicted_recompute_s=watcher.plan.predicted_recompute_s if watcher.plan else None,
        plan=_plan(watcher),
        chain=asdict(watcher.plan.chain) if watcher.plan else None,
        schedule=to_text(watcher.plan.schedule) if watcher.plan else "",
    )


def _plan(watcher: _Watcher) -> str:
    step = watcher.step
    if step is None:
        return ""
    return f"{step.plan_summary}; {step.replayed_blocks} blocks replayed, {step.advanced_blocks} passed"


def _show(found: ModeProfile, base: ModeProfile) -> None:
    print(
        f"{found.mode:26} {found.wall_s * 1e3:8.1f} ms  host {found.host_s * 1e3:8.1f}  busy "
        f"{found.device_busy_s * 1e3:8.1f}  kernels {found.num_kernels:6}  "
        f"{found.activation_peak_bytes / 2**20:9.1f} MiB"
    )
    if found.plan:
        print(f"    recompute {found.recompute_s} s, predicted {found.predicted_recompute_s}; {found.plan}")
    if found is base:
        return
    none = (0, 0.0)
    names = found.kernels.keys() | base.kernels.keys()
    more = {n: found.kernels.get(n, none)[1] - base.kernels.get(n, none)[1] for n in names}
    for name in sorted(names, key=lambda n: -abs(more[n]))[:NUM_KERNELS_SHOWN]:
        counts = found.kernels.get(name, none)[0], base.kernels.get(name, none)[0]
        print(f"    {more[name] * 1e3:+8.2f} ms  {counts[0]:5} against {counts[1]:5}  {name[:110]}")


def main(
    overrides: Annotated[list[str], typer.Argument(help="As in `recipes.compare`: model=transformer size=medium ...")],
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each mode.")] = 10,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Untimed steps of each mode, before the timed ones.")] = 6,
    export: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/step_profile.json"),
) -> None:
    """Time steps of the modes alternately and profile a step of each; the first mode is the base of the comparison."""
    config = compose_config(overrides)
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    batch = make_batches(config.model.name, config.shape, num_batches=1, seed=config.seed)[0].to(device)
    trainees: list[_Trainee] = []
    for mode in parse_modes(config.mode):
        workload = build_workload(config.model, config.shape, seed=config.seed, device=device)
        watcher = _Watcher()
        apply_mode(mode, workload, budget=config.budget, naive_peak_bytes=0, observers=(watcher,))
        for step in range(warmup_steps):
            wall_s, _ = _step(workload, batch, device)
            print(f"{mode.value}: warm-up step {step + 1}/{warmup_steps}: {wall_s:.3f} s", flush=True)
        workload.model.zero_grad(set_to_none=True)
        trainees.append(_Trainee(mode, workload, watcher, [], []))
    for _ in range(steps):
        for trainee in trainees:
            wall_s, host_s = _step(trainee.workload, batch, device)
            trainee.walls_s.append(wall_s)
            trainee.hosts_s.append(host_s)
            trainee.workload.model.zero_grad(set_to_none=True)
    found = [_profile(trainee, batch, device) for trainee in trainees]
    for one in found:
        _show(one, found[0])
    export.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    report = {
        "date": datetime.now().astimezone().date().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "overrides": overrides,
        "modes": [asdict(one) for one in found],
    }
    export.write_text(json.dumps(report, indent=1))
    print(f"Written: {export}")


if __name__ == "__main__":
    typer.run(main)
