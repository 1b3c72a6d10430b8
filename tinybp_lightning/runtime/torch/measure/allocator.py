"""Trace how many bytes are alive, from the allocator's own events, cut at marks.

On CPU only the profiler sees allocations (`profile_memory=True`); its events carry address and size. On CUDA the
caching allocator keeps a history of the same. No counter is reset. Starting the profiler and reading Kineto's event
tree (`torch._C._profiler`) takes private API, unchanged from torch 2.11 to 2.14.

Note [Nothing but allocations]
    The profiler is started for a scope that nothing runs in, so it records no ops. That is cheaper, and it is needed:
    an op or `record_function` range that begins under one profiler and ends under the next writes into the first one's
    freed memory, and a trace ends and begins anywhere, in particular inside ranges of DDP, of Dynamo and of
    `Optimizer.step`. Marks are therefore allocations themselves, known by their size and address.

Note [A thread that ends under its profiler]
    A profiler belongs to the thread that started it, and no other thread can stop it. But torch keeps the process's
    newest profiler alive past its thread, and crashes when it lets go of it at exit. The next start makes torch let go.
    So another thread starts a profiler and stops that one; if this thread profiles already, torch has let go.
"""

import contextlib
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

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

__all__ = ["AllocatorTrace", "Interval", "LostTraceError", "can_trace", "local_part", "open_trace", "tracing_lock"]

profiler: Any = torch_profiler  # its stub hides the functions that start and stop it
_MARK_BYTES = 739  # a size that no tensor is likely to have
_NO_SCOPES = {RecordScope.LITE_INTERPRETER}  # an empty set would mean all
_MAX_CUDA_EVENTS = 2_000_000  # past this the allocator's history would overwrite its own beginning
# Kineto writes a line to stderr each time a profiler starts or stops; it reads this when the first one does.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class LostTraceError(Exception):
    """The recording is incomplete: other code restarted or cleared the allocator's history meanwhile."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Bytes alive between one mark and the next, relative to the start of the trace."""

    label: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int


class _TracingLock:
    """A lock that one thread holds any number of times, and that is free again once its thread has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holds: list[threading.Thread] = []  # the owner, once for each time that it holds the lock

    def acquire(self) -> bool:
        """Acquire the lock unless another living thread holds it; return whether this thread holds it now."""
        with self._lock:
            me = threading.current_thread()
            if self._holds and self._holds[0] is not me:
                if self._holds[0].is_alive():
                    return False
                self._holds.clear()
            self._holds.append(me)
            return True

    def release(self, owner: threading.Thread) -> None:
        """Undo one `acquire` of `owner`, if this thread is `owner` and still holds the lock."""
        with self._lock:
            if self._holds and self._holds[0] is owner is threading.current_thread():
                self._holds.pop()


_LOCK = _TracingLock()  # the process has one profiler, so one thread measures at a time, and the others only train


@contextlib.contextmanager
def tracing_lock() -> Generator[bool]:
    """Keep other threads from opening a trace meanwhile; yield whether this thread may open one."""
    is_mine = _LOCK.acquire()
    try:
        yield is_mine
    finally:
        if is_mine:
            _LOCK.release(threading.current_thread())


def can_trace(device: torch.device) -> bool:
    """Return whether this thread can open a trace now; on CPU only while no other profiler runs."""
    with tracing_lock() as is_mine:
        return is_mine and (device.type == "cuda" or (device.type == "cpu" and not is_profiling()))


def open_trace(device: torch.device, *, alive: Sequence[torch.Tensor] = ()) -> "AllocatorTrace":
    """Start to trace the allocator of `device` (`cpu` or `cuda`), after `can_trace` has allowed it.

    What the trace saw allocated counts as freed when it is, and so do the tensors `alive`. Other memory that was taken
    before it began does not: whose it is, and how large it was, is not known.
    """
    is_mine = _LOCK.acquire()  # outside of the `assert`, which `python -O` leaves out
    assert is_mine, "another thread traces: ask `can_trace` first, and open under `tracing_lock`"
    with contextlib.ExitStack() as undo:  # runs in reverse, even where one call raises: first stop, then release
        undo.callback(_LOCK.release, threading.current_thread())
        return _CudaTrace(device, alive, undo) if device.type == "cuda" else _CpuTrace(alive, undo)


class AllocatorTrace(ABC):
    """A running trace: `mark` opens an interval, `close` ends the last one and returns all of them in order."""

    def __init__(self, alive: Sequence[torch.Tensor], undo: contextlib.ExitStack) -> None:
        self._alive = {s.data_ptr(): s.nbytes() for t in alive for s in _storages(local_part(t))}
        self._labels: list[str | None] = []
        self._left_out: list[tuple[int, set[int]]] = []  # a mark's number, and addresses
        self.mark("start")
        self._undo = undo.pop_all()

    def mark(self, label: str | None) -> None:
        """Start the interval `label` here; `None` starts none."""
        self._labels.append(label)
        self._allocate_mark()

    def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do not count these tensors, from their allocation on (parameters' gradients)."""
        self._left_out.append((len(self._labels), {p.data_ptr() for t in tensors for p in _storages(local_part(t))}))
        self.mark(None)

    def close(self) -> tuple[Interval, ...]:
        """Stop the trace, even if it cannot be read, and return the intervals."""
        try:
            events, marks = self._read()
        finally:
            self.abandon()
        if len(marks) != len(self._labels):
            raise LostTraceError(f"the recording has {len(marks)} of {len(self._labels)} marks")
        self._drop_left_out(events, marks)
        return self._intervals(events, marks)

    def abandon(self) -> None:
        """Stop without reading, if it has not stopped: on the thread that opened it, or once that thread has ended."""
        self._undo.close()

    def _drop_left_out(self, events: list[tuple[int, int]], marks: Sequence[int]) -> None:
        """Remove from the events the newest allocation at each left-out address before its mark, and its release."""
        for mark, addresses in self._left_out:
            before = enumerate(events[: marks[mark]])
            newest = {address: i for i, (address, size) in before if size > 0 and address in addresses}
            for address, i in newest.items():
                releases = (j for j in range(i + 1, len(events)) if events[j][0] == address and events[j][1] < 0)
                for j in (i, *itertools.islice(releases, 1)):
                    events[j] = (address, 0)

    def _intervals(self, events: Sequence[tuple[int, int]], marks: Sequence[int]) -> tuple[Interval, ...]:
        """Cut the events at the labelled marks; `marks[k]` is the number of events before mark `k`."""
        cuts = [(label, mark) for label, mark in zip(self._labels, marks, strict=True) if label is not None]
        ends = [*(mark for _, mark in cuts[1:]), len(events)]
        intervals: list[Interval] = []
        live = sum(size for _, size in events[: marks[0]])
        for (label, start), end in zip(cuts, ends, strict=True):
            first = peak = live
            for _, size in events[start:end]:
                live += size
                peak = max(peak, live)
            intervals.append(Interval(label, first, peak, live))
        return tuple(intervals)

    @abstractmethod
    def _allocate_mark(self) -> None: ...

    @abstractmethod
    def _read(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Return the address and bytes of every event in order, and how many events came before each mark."""


class _CpuTrace(AllocatorTrace):
    """Reads the profiler's allocation events. See Note [Nothing but allocations]."""

    def __init__(self, alive: Sequence[torch.Tensor], undo: contextlib.ExitStack) -> None:
        self._opener = threading.current_thread()
        self._results: Any = None
        self._marks: list[int] = []
        _start_profiler()
        undo.callback(self._stop)
        super().__init__(alive, undo)

    def _allocate_mark(self) -> None:
        self._marks.append(torch.empty(_MARK_BYTES, dtype=torch.uint8).data_ptr())

    def _stop(self) -> None:
        # See Note [A thread that ends under its profiler].
        if self._opener is not threading.current_thread():
            if is_profiling():
                return
            _start_profiler()
        self._results = profiler._disable_profiler()

    def _read(self) -> tuple[list[tuple[int, int]], list[int]]:
        self.abandon()  # the profiler hands its events out when it stops
        events: list[tuple[int, int]] = []
        marks: list[int] = []
        # Of anything else the profiler knows no size, or that of an earlier tensor at the same address.
        alive = dict(self._alive)
        for event in self._results.experimental_event_tree():
            if event.tag == _EventType.Kineto and not event.children:
                continue  # a call of a GPU's driver, which is recorded in any scope
            if event.tag != _EventType.Allocation:
                raise LostTraceError(f"the recording has `{event.name}`, which another profiler asked for")
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
        return events, marks


def _start_profiler() -> None:
    config = profiler.profile(use_cpu=True, profile_memory=True).config(create_trace_id=True)
    activities = {ProfilerActivity.CPU}
    profiler._prepare_profiler(config, activities)
    profiler._enable_profiler(config, activities, _NO_SCOPES)


class _CudaTrace(AllocatorTrace):
    """Reads the caching allocator's history, where a mark is a tiny tensor found by its address."""

    def __init__(self, device: torch.device, alive: Sequence[torch.Tensor], undo: contextlib.ExitStack) -> None:
        self._device = device
        self._marks: list[torch.Tensor] = []
        if not cuda_history_is_on():
            start_cuda_history(_MAX_CUDA_EVENTS)
            undo.callback(stop_cuda_history)
        super().__init__(alive, undo)

    def _allocate_mark(self) -> None:
        self._marks.append(torch.empty(1, dtype=torch.uint8, device=self._device))

    def abandon(self) -> None:
        self._marks.clear()
        super().abandon()

    def _read(self) -> tuple[list[tuple[int, int]], list[int]]:
        raw = cuda_history(self._device)
        # Marks are alive to the end, so the newest allocation at a mark's address is the mark itself.
        addresses = {t.data_ptr() for t in self._marks}
        newest = {address: i for i, (address, size) in enumerate(raw) if size > 0 and address in addresses}
        mark_events = set(newest.values())
        events: list[tuple[int, int]] = []
        marks: list[int] = []
        alive = set(self._alive)
        for i, (address, size) in enumerate(raw):
            if i in mark_events:
                marks.append(len(events))
            elif marks and size > 0:
                alive.add(address)
                events.append((address, size))
            elif marks and address in alive:
                alive.remove(address)
                events.append((address, size))
        return events, marks


def _storages(t: torch.Tensor) -> list[torch.UntypedStorage]:
    """Return the storages of a tensor: two of a sparse one."""
    if t.layout is torch.sparse_coo:
        return [part.untyped_storage() for part in (t._indices(), t._values())]
    return [t.untyped_storage()]


def local_part(t: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor (`DTensor`), and any other tensor itself."""
    to_local: Callable[[], torch.Tensor] | None = getattr(t, "to_local", None)
    return t if to_local is None else to_local()
