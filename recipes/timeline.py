"""Compute the memory that is alive at each moment of a step, from the allocator's events.

This is pure accounting, for CPU and CUDA alike, and independent of the package that is being judged. The *activation
peak* leaves out the allocations that are parameters' gradients at the end of the step, from their beginning: every mode
makes them, and they would hide the differences.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["MAX_POINTS", "MemoryEvent", "StepMemory", "Timeline", "account", "downsample"]

MAX_POINTS = 2000


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """One allocation (`size_bytes` > 0) or release (`size_bytes` < 0) at `address`."""

    time_s: float
    address: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Live bytes after each moment, in time order; both sequences have the same length."""

    time_s: tuple[float, ...]
    live_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.time_s) == len(self.live_bytes)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What one step allocated above what was alive when it began.

    `peak_bytes` counts everything, `activation_peak_bytes` everything but the gradients that outlive the step, and
    `residue_bytes` what else was alive at its end. `timeline` shows the activations.
    """

    peak_bytes: int
    activation_peak_bytes: int
    residue_bytes: int
    timeline: Timeline


def account(events: Sequence[MemoryEvent], *, gradient_addresses: Iterable[int]) -> StepMemory:
    """Return the peaks of a step from its allocator events.

    **Arguments:** `events`: in time order; releases of memory that was allocated before the first event are ignored.
    `gradient_addresses`: the addresses of the parameters' gradients after the step. The last allocation at such an
    address is the gradient.

    **Returns:** exact byte counts; the timeline has one point per event.
    """
    begun_by: dict[int, int] = {}
    ended_by: dict[int, int] = {}
    for index, event in enumerate(events):
        if event.size_bytes > 0:
            begun_by[event.address] = index
        elif event.address in begun_by:
            ended_by[index] = begun_by.pop(event.address)
    gradients = frozenset(begun_by[address] for address in gradient_addresses if address in begun_by)

    live_bytes = activation_bytes = peak_bytes = activation_peak_bytes = 0
    times: list[float] = []
    activations: list[int] = []
    for index, event in enumerate(events):
        if event.size_bytes > 0:
            change_bytes = event.size_bytes
        elif index in ended_by:
            change_bytes = -events[ended_by[index]].size_bytes
        else:
            continue
        live_bytes += change_bytes
        activation_bytes += 0 if index in gradients else change_bytes
        peak_bytes = max(peak_bytes, live_bytes)
        activation_peak_bytes = max(activation_peak_bytes, activation_bytes)
        times.append(event.time_s)
        activations.append(activation_bytes)
    return StepMemory(peak_bytes, activation_peak_bytes, activation_bytes, Timeline(tuple(times), tuple(activations)))


def downsample(timeline: Timeline, *, max_points: int = MAX_POINTS) -> Timeline:
    """Return `timeline` with at most `max_points` points: the smallest and the largest of each run of points.

    **Returns:** the same object if it is short enough; otherwise its peak and the order of its points stay.

    **Raises:** `ValueError` when `max_points` is below 2.
    """
    if max_points < 2:
        raise ValueError(f"`max_points={max_points}` cannot hold a smallest and a largest point: pass 2 or more.")
    num_points = len(timeline.time_s)
    if num_points <= max_points:
        return timeline
    num_runs = max_points // 2
    kept: list[int] = []
    for run in range(num_runs):
        indices = range(run * num_points // num_runs, (run + 1) * num_points // num_runs)
        extremes = {
            min(indices, key=timeline.live_bytes.__getitem__),
            max(indices, key=timeline.live_bytes.__getitem__),
        }
        kept.extend(sorted(extremes))
    return Timeline(tuple(timeline.time_s[i] for i in kept), tuple(timeline.live_bytes[i] for i in kept))
