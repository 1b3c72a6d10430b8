"""How many bytes were alive, when? The allocator's own events, cut into marked segments.

On CPU the only witness is the profiler (`profile_memory=True`), whose allocation events carry address and size; on
CUDA the caching allocator keeps a history of the same. Both are read here and nowhere else; nobody's own counters are
reset. Private API used: starting the profiler and Kineto's event tree (`torch._C._profiler`), unchanged from torch 2.11
to 2.14.

Note [Nothing but allocations]
    The profiler is started for a scope that nothing runs in, so that it records no ops. That is cheaper, and it is
    needed: an op or `record_function` range that begins under one profiler and ends under the next writes into the
    first one's freed memory, and a trace ends and begins anywhere, in particular inside ranges of DDP, of Dynamo and of
    `Optimizer.step`. Marks are therefore allocations themselves, known by their size and address.

Note [A thread that ends under its profiler]
    A profiler belongs to the thread that started it, and no other can stop it; but torch keeps the newest one of the
    process alive past its thread, and crashes when it lets go of that at exit. What makes it let go is another start.
    So another thread starts a profiler and stops that; where it profiles already, it has made torch let go.
"""

import contextlib
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch._C._profiler import RecordScope, _EventType  # pyright: ignore[reportPrivateUsage] - the one place
from torch.autograd import profiler as torch_profiler
from torch.profiler import ProfilerActivity

from tinybp_lightning.capture.torch.private import (
    cuda_history,
    cuda_history_is_on,
    is_profiling,
    start_cuda_history,
    stop_cuda_history,
)
from tinybp_lightning.runtime.torch.measure.lock import TracingLock

__all__ = ["AllocatorTrace", "LostTraceError", "Segment", "can_trace", "open_trace", "tracing_lock"]

profiler: Any = torch_profiler  # its stub hides the functions that start and stop it
_MARK_BYTES = 739  # a size that no tensor is likely to have
_TURN = TracingLock()
_NO_SCOPES = {RecordScope.LITE_INTERPRETER}  # an empty set would mean all
_MAX_CUDA_EVENTS = 2_000_000  # past this the allocator's history would overwrite its own beginning
# Kineto writes a line to stderr each time a profiler starts or stops; it reads this when the first one does.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class LostTraceError(Exception):
    """What was recorded is not all there: someone else restarted or cleared the allocator's history meanwhile."""


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
        """Stop and return the segments. Stopped it is even where reading fails."""
        ...

    def abandon(self) -> None:
        """Stop without reading (the step ended in an exception, or never). Harmless where it has stopped.

        By the thread that opened the trace, or under `tracing_lock` once that one has ended.
        """
        ...


@runtime_checkable
class _Sharded(Protocol):
    def to_local(self) -> torch.Tensor: ...


def can_trace(device: torch.device) -> bool:
    """Whether a trace can be opened now: by one thread at a time, and on CPU only where no other profiler runs."""
    with tracing_lock() as is_mine:
        return is_mine and (device.type == "cuda" or (device.type == "cpu" and not is_profiling()))


@contextlib.contextmanager
def tracing_lock() -> Generator[bool]:
    """Keep other threads from opening a trace meanwhile; gives whether this one may."""
    is_mine = _TURN.take()
    try:
        yield is_mine
    finally:
        if is_mine:
            _TURN.give_back()


def open_trace(device: torch.device) -> AllocatorTrace:
    """Start to trace the allocator of `device` (`cpu` or `cuda`). The caller has seen that it can."""
    is_mine = _TURN.take()  # outside of the `assert`, which `python -O` leaves out
    assert is_mine, "another thread traces: ask `can_trace` first, and open under `tracing_lock`"
    with contextlib.ExitStack() as undo:  # in reverse, each whatever the others raise: first stop, then give back
        undo.callback(_give_back, threading.current_thread())
        return _CudaTrace(device, undo) if device.type == "cuda" else _CpuTrace(undo)


def _give_back(opener: threading.Thread) -> None:
    """Give the turn of a trace back. That of a thread that has ended is free already."""
    if opener is threading.current_thread():
        _TURN.give_back()


def _start_profiler() -> None:
    """Start to record this thread's allocations, on CPU. See Note [Nothing but allocations]."""
    config = profiler.profile(use_cpu=True, profile_memory=True).config(create_trace_id=True)
    activities = {ProfilerActivity.CPU}
    profiler._prepare_profiler(config, activities)
    profiler._enable_profiler(config, activities, _NO_SCOPES)


class _CpuTrace:
    """Reads the profiler's allocation events. See Note [Nothing but allocations]."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._opener = threading.current_thread()
        self._results: Any = None
        self._labels: list[str] = []
        self._marks: list[int] = []
        self._left_out: list[tuple[int, tuple[int, ...]]] = []
        _start_profiler()
        undo.callback(self._stop)
        self.mark("start")
        self._undo = undo.pop_all()

    def mark(self, label: str) -> None:
        """Start the segment `label` here."""
        self._labels.append(label)
        self._marks.append(torch.empty(_MARK_BYTES, dtype=torch.uint8).data_ptr())

    def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do not count these tensors, from their allocation on."""
        addresses = _addresses(tensors)
        self._left_out.append((len(self._labels), addresses))
        self.mark(self._labels[-1])

    def abandon(self) -> None:
        """Stop without reading."""
        self._undo.close()

    def close(self) -> tuple[Segment, ...]:
        """Stop and return the segments."""
        self._undo.close()
        events, marks = self._read(self._results)
        _drop_left_out(self._left_out, events, marks)
        return _segments(self._labels, events, marks)

    def _stop(self) -> None:
        """Stop the profiler. See Note [A thread that ends under its profiler]."""
        if self._opener is not threading.current_thread():
            if is_profiling():
                return
            _start_profiler()
        self._results = profiler._disable_profiler()

    def _read(self, results: Any) -> tuple[list[tuple[int, int]], list[int]]:
        """Return `(address, bytes)` of every event in order, and how many events came before each mark.

        Only what the trace saw allocated counts as freed: of anything else the profiler knows no size, or that of an
        earlier tensor at the same address.
        """
        events: list[tuple[int, int]] = []
        marks: list[int] = []
        alive: dict[int, int] = {}
        for event in results.experimental_event_tree():
            if event.tag == _EventType.Kineto and not event.children:
                continue  # a call of the driver: they are recorded with whatever scope where there is a GPU
            assert event.tag == _EventType.Allocation, f"the profiler recorded {event.name} too"
            fields = event.extra_fields
            if fields.device.type != "cpu":
                continue
            if fields.alloc_size == _MARK_BYTES and fields.ptr == self._marks[min(len(marks), len(self._marks) - 1)]:
                marks.append(len(events))
            elif fields.alloc_size > 0:
                alive[fields.ptr] = fields.alloc_size
                events.append((fields.ptr, fields.alloc_size))
            elif fields.ptr in alive:
                events.append((fields.ptr, -alive.pop(fields.ptr)))
        if len(marks) != len(self._marks):
            raise LostTraceError(f"the profiler has {len(marks)} of {len(self._marks)} marks")
        return events, marks


def _addresses(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Where the tensors are; of a sharded one (`DTensor`), this rank's part."""
    parts: list[torch.Tensor] = [t.to_local() if isinstance(t, _Sharded) else t for t in tensors]
    return tuple(t.untyped_storage().data_ptr() for t in parts)


def _drop_left_out(
    left_out: Sequence[tuple[int, tuple[int, ...]]], events: list[tuple[int, int]], marks: Sequence[int]
) -> None:
    """Take the newest allocation at each left-out address, before its mark, out of the events."""
    for mark, addresses in left_out:
        wanted = set(addresses)
        for i in range(marks[mark] - 1, -1, -1):
            address, size = events[i]
            if address in wanted and size > 0:
                wanted.discard(address)
                _erase(events, i)


def _erase(events: list[tuple[int, int]], allocation: int) -> None:
    """Take one allocation and the release that ends it out of the events."""
    address, _ = events[allocation]
    events[allocation] = (address, 0)
    for j in range(allocation + 1, len(events)):
        if events[j][0] == address and events[j][1] < 0:
            events[j] = (address, 0)
            return


def _segments(labels: Sequence[str], events: Sequence[tuple[int, int]], marks: Sequence[int]) -> tuple[Segment, ...]:
    """Cut the events at the marks. `marks[k]` is the number of events before mark `k`."""
    segments: list[Segment] = []
    live = sum(size for _, size in events[: marks[0]])
    for label, start, end in zip(labels, marks, [*marks[1:], len(events)], strict=True):
        first = peak = live
        for _, size in events[start:end]:
            live += size
            peak = max(peak, live)
        segments.append(Segment(label, first, peak, live))
    return tuple(segments)


class _CudaTrace:
    """Reads the caching allocator's own history. A mark is a tiny tensor: its address is the mark's place in it."""

    def __init__(self, device: torch.device, undo: contextlib.ExitStack) -> None:
        self._device = device
        self._labels: list[str] = []
        self._marks: list[torch.Tensor] = []
        self._left_out: list[tuple[int, tuple[int, ...]]] = []
        if not cuda_history_is_on():
            start_cuda_history(_MAX_CUDA_EVENTS)
            undo.callback(stop_cuda_history)
        self.mark("start")
        self._undo = undo.pop_all()

    def mark(self, label: str) -> None:
        """Start the segment `label` here."""
        self._labels.append(label)
        self._marks.append(torch.empty(1, dtype=torch.uint8, device=self._device))

    def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do not count these tensors, from their allocation on."""
        addresses = _addresses(tensors)
        self._left_out.append((len(self._labels), addresses))
        self.mark(self._labels[-1])

    def abandon(self) -> None:
        """Stop without reading."""
        self._marks.clear()
        self._undo.close()

    def close(self) -> tuple[Segment, ...]:
        """Stop and return the segments."""
        try:
            events, marks = self._read()
        finally:
            self.abandon()
        _drop_left_out(self._left_out, events, marks)
        return _segments(self._labels, events, marks)

    def _read(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Return `(address, bytes)` of every event since the first mark, and how many came before each mark."""
        raw = cuda_history(self._device)
        # Marks are alive to the end, so the newest allocation at a mark's address is the mark itself.
        places = {t.data_ptr(): k for k, t in enumerate(self._marks)}
        newest = {address: i for i, (address, size) in enumerate(raw) if size > 0 and address in places}
        at = {i: places[address] for address, i in newest.items()}
        events: list[tuple[int, int]] = []
        marks: list[int] = []
        for i, event in enumerate(raw):
            if i in at:
                marks.append(len(events))
            elif marks:
                events.append(event)
        if len(marks) != len(self._labels):
            raise LostTraceError(f"the allocator's history has {len(marks)} of {len(self._labels)} marks")
        return events, marks
