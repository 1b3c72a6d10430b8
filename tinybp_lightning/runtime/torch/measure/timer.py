"""Time a call, in the seconds of the device and in those of the host.

The *device* runs the kernels while the *host* launches the next ones, so a step takes as long as the slower of the two
over the whole step: a small block that only the host makes slow costs next to nothing between large ones. The device is
held back until the host has launched the call, and then runs it without a gap, because waiting for it around each call
would charge every block for launches that overlap. That makes the host slower, and a call of autograd wakes its thread
(0.3 ms), which a step does once for all blocks: so the host is timed on an idle device, less an empty call's time.

On a CPU a repeated call would find its data in caches, and a norm would take half its time. So before each call the
timer touches as many bytes as a step does, up to the caches' size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from tinybp_lightning.capture.torch.private import hold_cuda

__all__ = ["Timer", "Timing"]

_HOLD_CYCLES = 20_000_000  # about 10 ms at 2 GHz: longer than the host takes to launch a block
_REPEATS = 3
_IDLE_REPEATS = 5
_CACHE_BYTES = 64 * 2**20  # more than the caches that one core can fill


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the device and of the host; on the CPU they are the same."""

    device_s: float
    host_s: float

    def plus(self, other: "Timing", *, share: float = 1.0) -> "Timing":
        """Return the sum with a share of `other`."""
        return Timing(self.device_s + share * other.device_s, self.host_s + share * other.host_s)

    def without_host(self, host_s: float) -> "Timing":
        """Return the timing with `host_s` less on the host, but at least nothing."""
        return Timing(self.device_s, max(0.0, self.host_s - host_s))

    def at_most(self, other: "Timing") -> "Timing":
        """Return the lesser of each."""
        return Timing(min(self.device_s, other.device_s), min(self.host_s, other.host_s))


class Timer:
    """Times calls whose work is on `device`; except for CUDA it holds `step_bytes` of host memory, at most 64 MiB."""

    def __init__(self, device: torch.device, *, step_bytes: int) -> None:
        self.device = device
        num_bytes = 0 if device.type == "cuda" else min(step_bytes, _CACHE_BYTES)
        self._cold = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")

    @cached_property
    def idle_backward_s(self) -> float:
        """Host seconds of a call of autograd that does nothing, on a GPU; on the CPU it wakes no thread."""
        if self.device.type != "cuda":
            return 0.0
        leaf = torch.ones((), device=self.device, requires_grad=True)
        calls = [partial(torch.autograd.grad, leaf * 2, leaf) for _ in range(_IDLE_REPEATS)]
        return min(self.time(call, is_held=False).host_s for call in calls)

    def time(self, call: Callable[[], Any], *, is_held: bool = True) -> Timing:
        """Run `call` once and return what it took; `is_held`: a GPU waits until the call is launched."""
        if self.device.type == "cuda":
            return self._time_cuda(call, is_held=is_held)
        self._cold.bitwise_not_()  # reads and writes all of it, and allocates nothing that a trace would see
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        return Timing(seconds, seconds)

    def time_repeatable(self, call: Callable[[], Any]) -> Timing:
        """Run `call` several times, because others use the machine too, and return the least that it took."""
        timing = self.time(call)
        for number in range(1, _REPEATS):
            timing = timing.at_most(self.time(call, is_held=number % 2 == 0))
        return timing

    def _time_cuda(self, call: Callable[[], Any], *, is_held: bool) -> Timing:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            if is_held:
                hold_cuda(_HOLD_CYCLES)
            begin.record()
            started = time.perf_counter()
            call()
            host_s = time.perf_counter() - started
            end.record()
            torch.cuda.synchronize()
        return Timing(begin.elapsed_time(end) * 1e-3, host_s)
