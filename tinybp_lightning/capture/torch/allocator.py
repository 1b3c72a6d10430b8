"""How many bytes were alive, when? The allocator's own events, cut into marked segments.

On CPU the only witness is the profiler (`profile_memory=True`), whose allocation events carry address and size; on
CUDA the caching allocator keeps a running peak. Both are read here and nowhere else. Private API used: Kineto's event
tree (`torch._C._profiler`), unchanged from torch 2.11 to 2.14.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._C._profiler import _EventType  # pyright: ignore[reportPrivateUsage] - the one place for Kineto's events
from torch.profiler import ProfilerActivity, profile, record_function

from tinybp_lightning.capture.torch.private import is_profiling

__all__ = ["AllocatorTrace", "Segment", "can_trace", "open_trace"]

_MARK = "tinybp::mark"
# Kineto writes a line to stderr each time a profiler starts or stops; it reads this when the first one does.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes alive between one mark and the next, relative to the start of the trace."""

    label: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int


class AllocatorTrace(Protocol):
    """A running trace. `mark` opens a segment; `close` ends the last one and returns all, in order."""

    def mark(self, label: str) -> None:
        """Start the segment `label` here."""
        ...

    def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do not count these tensors, from their allocation on (parameters' gradients)."""
        ...

    def close(self) -> tuple[Segment, ...]:
        """Stop and return the segments."""
        ...

    def abandon(self) -> None:
        """Stop without reading (the step ended in an exception, or never)."""
        ...


def can_trace(device: torch.device) -> bool:
    """Whether a trace can be opened now: on CPU only one profiler may run at a time."""
    return device.type == "cuda" or (device.type == "cpu" and not is_profiling())


def open_trace(device: torch.device) -> AllocatorTrace:
    """Start to trace the allocator of `device` (`cpu` or `cuda`)."""
    return _CudaTrace(device) if device.type == "cuda" else _CpuTrace()


class _CpuTrace:
    def __init__(self) -> None:
        self._labels: list[str] = []
        self._left_out: list[tuple[int, tuple[int, ...]]] = []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)
        self._profile.start()
        self.mark("start")

    def mark(self, label: str) -> None:
        with record_function(f"{_MARK}{len(self._labels)}"):
            self._labels.append(label)

    def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
        addresses = tuple(t.untyped_storage().data_ptr() for t in tensors)
        self._left_out.append((len(self._labels), addresses))
        self.mark(self._labels[-1])

    def abandon(self) -> None:
        self._profile.stop()

    def close(self) -> tuple[Segment, ...]:
        self._profile.stop()
        events, marks = self._read()
        self._drop_left_out(events, marks)
        return _segments(self._labels, events, marks)

    def _read(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        results: Any = getattr(self._profile.profiler, "kineto_results", None)
        assert results is not None, "the profiler was stopped"
        events: list[tuple[int, int, int]] = []
        marks = [0] * len(self._labels)
        stack: list[Any] = list(results.experimental_event_tree())
        while stack:
            event = stack.pop()
            if event.tag == _EventType.Allocation:
                if event.extra_fields.device.type == "cpu":
                    events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
            elif event.name.startswith(_MARK):
                marks[int(event.name.removeprefix(_MARK))] = event.start_time_ns
            stack.extend(event.children)
        events.sort(key=lambda e: e[0])
        return events, marks

    def _drop_left_out(self, events: list[tuple[int, int, int]], marks: list[int]) -> None:
        for mark, addresses in self._left_out:
            wanted = set(addresses)
            for i in range(len(events) - 1, -1, -1):
                when, address, size = events[i]
                if when < marks[mark] and address in wanted and size > 0:
                    wanted.discard(address)
                    _erase(events, i)


def _erase(events: list[tuple[int, int, int]], allocation: int) -> None:
    """Take one allocation and the free that ends it out of the events."""
    when, address, _ = events[allocation]
    events[allocation] = (when, address, 0)
    for j in range(allocation + 1, len(events)):
        if events[j][1] == address:
            if events[j][2] < 0:
                events[j] = (events[j][0], address, 0)
            return


def _segments(labels: list[str], events: list[tuple[int, int, int]], marks: list[int]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    live, position = 0, 0
    for k, label in enumerate(labels):
        end = marks[k + 1] if k + 1 < len(marks) else None
        start = peak = live
        while position < len(events) and (end is None or events[position][0] < end):
            live += events[position][2]
            peak = max(peak, live)
            position += 1
        segments.append(Segment(label, start, peak, live))
    return tuple(segments)


class _CudaTrace:
    """Reads the caching allocator's running peak at each mark. Left-out tensors leave the levels, not the peaks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = torch.cuda.memory_allocated(device)
        self._left_out = 0
        self._segments: list[Segment] = []
        self._open: tuple[str, int] = ("start", 0)
        torch.cuda.reset_peak_memory_stats(device)

    def _level(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._base - self._left_out

    def mark(self, label: str) -> None:
        self._end_segment()
        self._open = (label, self._level())
        torch.cuda.reset_peak_memory_stats(self._device)

    def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
        self._left_out += sum(t.untyped_storage().nbytes() for t in tensors)

    def abandon(self) -> None:
        return  # the caching allocator counts by itself; nothing runs

    def close(self) -> tuple[Segment, ...]:
        self._end_segment()
        return tuple(self._segments)

    def _end_segment(self) -> None:
        label, start = self._open
        peak = torch.cuda.max_memory_allocated(self._device) - self._base
        self._segments.append(Segment(label, start, max(peak, start), self._level()))
