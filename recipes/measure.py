"""Measure training: the time of a step, the memory that is alive in it, and digests of what it computed.

A step is a forward and a backward; the optimizer runs between steps and is not measured. Steps are timed without a
profiler. One further step is measured for memory, from allocator events: `torch.profiler`'s on the CPU, the caching
allocator's own history on CUDA. Digests of gradients, parameters and buffers show whether two modes computed the same.
Nothing here uses the package that is being judged.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import gc
import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType  # pyright: ignore[reportPrivateUsage]  # no public name for event kinds
from torch.profiler import ProfilerActivity, profile

from recipes.data import Batch
from recipes.measurement import Measurement, Versions
from recipes.models import Workload
from recipes.timeline import MemoryEvent, StepMemory, Timeline, account, downsample

__all__ = ["cpu_memory", "cuda_events", "measure", "package_version", "record_memory", "tensors_sha256"]

# Kineto writes a line to stderr each time a profiler starts or stops. It reads this setting when the first one starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
NANOSECONDS = 1e-9
MICROSECONDS = 1e-6
# With more events the CUDA allocator's history would overwrite its own beginning.
MAX_CUDA_EVENTS = 4_000_000


@dataclass(frozen=True, slots=True)
class _Recorded:
    memory: StepMemory
    reserved_peak_bytes: int | None


def measure(
    workload: Workload,
    optimizer: torch.optim.Optimizer,
    batches: tuple[Batch, ...],
    *,
    warmup_steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Measurement:
    """Train on all but the last of `batches`, then profile a step on the last one.

    **Arguments:** `warmup_steps`: steps that are not timed. `seed`: seeds the random numbers once, for the whole run,
    so that a mode that draws more of them than plain training gets other losses. `on_step`: called with each step's
    index.

    **Returns:** the measurement. Its digests are of the state after the last optimizer step and of the gradients of the
    profiled step.

    **Raises:** `ValueError` unless at least one step is timed.
    """
    if not 0 <= warmup_steps < len(batches) - 1:
        raise ValueError(f"`warmup_steps={warmup_steps}` leaves none of {len(batches) - 1} steps to time: lower it.")
    device = next(workload.model.parameters()).device
    batches = tuple(batch.to(device) for batch in batches)
    torch.manual_seed(seed)
    losses: list[float] = []
    walls_s: list[float] = []
    for step, batch in enumerate(batches[:-1]):
        on_step(step)
        optimizer.zero_grad(set_to_none=True)
        wall_s, loss = _timed_step(workload, batch, device)
        walls_s.append(wall_s)
        losses.append(loss)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    on_step(len(batches) - 1)
    recorded = record_memory(lambda: losses.append(_step(workload, batches[-1])), workload.model)
    timed_s = walls_s[warmup_steps:]
    wall_s = statistics.median(timed_s)
    memory = recorded.memory
    return Measurement(
        losses=tuple(losses),
        wall_s=wall_s,
        step_walls_s=tuple(timed_s),
        first_step_s=walls_s[0],
        peak_bytes=memory.peak_bytes,
        activation_peak_bytes=memory.activation_peak_bytes,
        residue_bytes=memory.residue_bytes,
        reserved_peak_bytes=recorded.reserved_peak_bytes,
        timeline=_stretch(downsample(memory.timeline), wall_s),
        gradients_sha256=tensors_sha256(_gradients(workload.model)),
        parameters_sha256=tensors_sha256(workload.model.named_parameters()),
        buffers_sha256=tensors_sha256(workload.model.named_buffers()),
        device=_device_name(device),
        versions=_versions(),
    )


def _step(workload: Workload, batch: Batch) -> float:
    loss = workload.loss(batch)
    loss.backward()
    return loss.item()


def _timed_step(workload: Workload, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Return the seconds and the loss of one step, after the device has finished it."""
    _synchronize(device)
    begin_s = time.perf_counter()
    loss = workload.loss(batch)
    loss.backward()
    _synchronize(device)
    return time.perf_counter() - begin_s, loss.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record_memory(step: Callable[[], None], model: nn.Module) -> _Recorded:
    """Run `step` and return what it allocated on the device of `model`, whose gradients must be `None` at the start.

    **Arguments:** `step`: one forward and backward that leaves gradients in `model`'s parameters.

    **Raises:** `ValueError` when a gradient is already there: it would not be allocated in the step.
    """
    stale = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    if stale:
        raise ValueError(f"`{stale[0]}` has a gradient before the step: call `zero_grad(set_to_none=True)` first.")
    # Otherwise garbage of earlier steps could be released inside this one.
    gc.collect()
    device = next(model.parameters()).device
    if device.type == "cuda":
        return _record_cuda(step, model, device)
    return _record_cpu(step, model)


def _record_cpu(step: Callable[[], None], model: nn.Module) -> _Recorded:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        step()
    return _Recorded(cpu_memory(profiler, model), None)


def cpu_memory(profiler: profile, model: nn.Module) -> StepMemory:
    """Return what a profiled step (`profile_memory=True`) allocated, given the model that has its gradients."""
    kineto = cast(Any, profiler).profiler.kineto_results
    # Sorted by integer nanoseconds: floats of seconds since 1970 would make two allocations equal.
    nodes = sorted(_allocations(kineto.experimental_event_tree()), key=lambda node: node.start_time_ns)
    begin_ns = nodes[0].start_time_ns if nodes else 0
    events = [
        MemoryEvent((node.start_time_ns - begin_ns) * NANOSECONDS, node.extra_fields.ptr, node.extra_fields.alloc_size)
        for node in nodes
    ]
    return account(events, gradient_addresses=_gradient_addresses(model))


def _allocations(roots: Sequence[Any]) -> Iterator[Any]:
    """Yield the allocator events of a profiler's event tree, depth first, without recursion: the tree may be deep."""
    pending = list(reversed(roots))
    while pending:
        node = pending.pop()
        pending.extend(reversed(node.children))
        if node.typed[0] == _EventType.Allocation:
            yield node


def _record_cuda(step: Callable[[], None], model: nn.Module, device: torch.device) -> _Recorded:
    memory = cast(Any, torch.cuda.memory)
    torch.cuda.synchronize(device)
    # Not from `max_memory_allocated`: a mode may reset that counter inside the step, which would hide the peak.
    reserved_bytes = torch.cuda.memory_reserved(device)
    memory._record_memory_history(enabled="all", context=None, max_entries=MAX_CUDA_EVENTS)
    try:
        step()
        torch.cuda.synchronize(device)
        entries = memory._snapshot(device)["device_traces"][device.index or 0]
    finally:
        memory._record_memory_history(enabled=None)
    memory_of_step = account(cuda_events(entries), gradient_addresses=_gradient_addresses(model))
    return _Recorded(memory_of_step, max(reserved_bytes, torch.cuda.memory_reserved(device)))


def cuda_events(entries: Sequence[Mapping[str, Any]]) -> list[MemoryEvent]:
    """Return the allocations and releases in one device's trace of the caching allocator, in order.

    **Arguments:** `entries`: as in `torch.cuda.memory._snapshot()["device_traces"]`. A release counts when it is
    requested, as in `memory_allocated`; completed releases and segments from the driver do not count.
    """
    sign = {"alloc": 1, "free_requested": -1}
    changes = [entry for entry in entries if entry["action"] in sign]
    begin_us = changes[0]["time_us"] if changes else 0
    return [
        MemoryEvent((entry["time_us"] - begin_us) * MICROSECONDS, entry["addr"], sign[entry["action"]] * entry["size"])
        for entry in changes
    ]


def _gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


def _gradient_addresses(model: nn.Module) -> list[int]:
    return [gradient.untyped_storage().data_ptr() for _, gradient in _gradients(model)]


def _stretch(timeline: Timeline, wall_s: float) -> Timeline:
    """Scale the timeline to the range from 0 to `wall_s`, because profiling slows a step down."""
    if not timeline.time_s:
        return timeline
    begin_s, end_s = timeline.time_s[0], timeline.time_s[-1]
    scale = wall_s / (end_s - begin_s) if end_s > begin_s else 0.0
    return Timeline(tuple((time_s - begin_s) * scale for time_s in timeline.time_s), timeline.live_bytes)


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names, types, shapes and bits of the tensors, in order."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)".replace(" 1 threads", " 1 thread")


def _versions() -> Versions:
    packages = ("transformers", "diffusers", "torchvision")
    return Versions(platform.python_version(), torch.__version__, *map(package_version, packages))


def package_version(package: str) -> str:
    """Return the installed version of `package`; empty when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
