"""Bytes alive, from the allocator's events: exact, whatever else is going on."""

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from tinybp_lightning.capture.torch.private import is_profiling
from tinybp_lightning.runtime.torch.measure import allocator
from tinybp_lightning.runtime.torch.measure.allocator import AllocatorTrace, Interval, can_trace, open_trace

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KILO = 1000


def floats(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes // 4)


def test_intervals_are_exact() -> None:
    before = floats(8 * KILO)  # alive before the trace: not counted
    trace = open_trace(CPU)
    trace.mark("one")
    a = floats(4 * KILO)
    b = floats(2 * KILO)
    del a
    trace.mark("two")
    c = floats(KILO)
    del b
    trace.mark("three")
    del c
    _, one, two, three = trace.close()
    assert one == Interval("one", 0, 6 * KILO, 2 * KILO)
    assert two == Interval("two", 2 * KILO, 3 * KILO, KILO)
    assert three == Interval("three", KILO, KILO, 0)
    del before


def test_a_tensor_from_before_that_is_freed_does_not_lower_the_level() -> None:
    """The allocator does not know its size. The peak is overstated, never understated."""
    before = floats(8 * KILO)
    trace = open_trace(CPU)
    trace.mark("one")
    del before
    after = floats(KILO)
    assert trace.close()[1] == Interval("one", 0, KILO, KILO)
    del after


def test_a_size_remembered_from_an_earlier_trace_is_not_believed() -> None:
    """The profiler's table of sizes outlives a trace: it says what was at an address when it last looked."""
    trace = open_trace(CPU)
    large = [floats(64 * KILO) for _ in range(50)]
    trace.close()
    places = {t.data_ptr() for t in large}
    del large
    # Nearly as large: these come from the memory just freed, not from small holes of which there are many.
    small = list[torch.Tensor]()
    while not any(t.data_ptr() in places for t in small[-1:]):
        assert len(small) < 20_000, "no address was given again: the test shows nothing"
        small.append(floats(48 * KILO))
    trace = open_trace(CPU)
    trace.mark("one")
    small.clear()
    assert trace.close()[1] == Interval("one", 0, 0, 0)


def test_calls_of_a_gpus_driver_between_allocations_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    call = SimpleNamespace(tag=_EventType.Kineto, name="cudaStreamIsCapturing", children=[])
    stop = allocator.profiler._disable_profiler

    def stop_beside_a_gpu() -> Any:
        events = [e for event in stop().experimental_event_tree() for e in (call, event)]
        return SimpleNamespace(experimental_event_tree=lambda: events)

    monkeypatch.setattr(allocator.profiler, "_disable_profiler", stop_beside_a_gpu)
    trace = open_trace(CPU)
    trace.mark("one")
    held = floats(2 * KILO)
    _, one = trace.close()
    assert one == Interval("one", 0, 2 * KILO, 2 * KILO)
    del held


def test_what_is_left_out_never_was() -> None:
    trace = open_trace(CPU)
    trace.mark("one")
    kept, gradient = floats(KILO), floats(4 * KILO)
    trace.mark("two")
    other = floats(2 * KILO)
    trace.leave_out([gradient])
    del other
    assert [(s.label, s.peak_bytes) for s in trace.close()] == [
        ("start", 0),
        ("one", KILO),
        ("two", 3 * KILO),
    ]
    del kept


def test_an_address_used_twice_is_left_out_once() -> None:
    """The allocator gives an address again; only the newest tensor there is meant."""
    trace = open_trace(CPU)
    trace.mark("one")
    seen: list[int] = []
    while True:
        tensor = floats(400)
        if tensor.data_ptr() in seen:
            break
        seen.append(tensor.data_ptr())
        del tensor
    trace.leave_out([tensor])
    segments = trace.close()
    assert segments[1].peak_bytes == 400
    assert segments[1].end_bytes == 0


def test_backward_and_its_thread_are_seen() -> None:
    x = torch.ones(KILO // 4, requires_grad=True)
    y = x.exp().exp()
    trace = open_trace(CPU)
    trace.mark("backward")
    y.sum().backward()
    x.grad = None
    (_, backward) = trace.close()
    assert backward.peak_bytes >= 2 * KILO


def closed(trace: AllocatorTrace) -> None:
    trace.close()


def abandoned(trace: AllocatorTrace) -> None:
    trace.abandon()


@pytest.mark.parametrize("end", [closed, abandoned])
def test_one_trace_after_another(end: Callable[[AllocatorTrace], None]) -> None:
    for _ in range(3):
        assert can_trace(CPU)
        trace = open_trace(CPU)
        assert not can_trace(CPU)
        end(trace)
    assert can_trace(CPU)


@pytest.mark.parametrize("end", [closed, abandoned])
def test_a_range_that_outlives_its_trace_does_no_harm(end: Callable[[AllocatorTrace], None]) -> None:
    """It begins under one trace and ends under the next: writing its end into the first one's memory would be fatal."""
    for _ in range(30):
        first = open_trace(CPU)
        with record_function("outer"):
            end(first)
            second = open_trace(CPU)
            torch.randn(64, 64).sum()
        second.close()
    gc.collect()


def test_no_trace_while_the_user_profiles() -> None:
    with profile(activities=[ProfilerActivity.CPU]):
        assert not can_trace(CPU)
    assert can_trace(CPU)


def test_nothing_but_allocations_is_recorded() -> None:
    """Ops and ranges are not: reading the trace asserts that no event is anything else."""
    trace = open_trace(CPU)
    with record_function("range"):
        x = torch.ones(KILO // 4, requires_grad=True).exp()
    x.sum().backward()
    assert trace.close()[0].peak_bytes >= KILO


# ---- what goes wrong -------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    pass


def fails(*_: Any) -> Any:
    raise BrokenError


def others_can_trace(module: Any = allocator) -> bool:
    """Whether the lock is free, as another thread sees it: within one thread it nests."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(module.can_trace(CPU)))
    thread.start()
    thread.join()
    return seen[0]


class History:
    """Stands for the CUDA allocator's, which a machine without a device has not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_on = False
        self.lock_was_free_at_stop = False
        monkeypatch.setattr(allocator, "cuda_history_is_on", lambda: self.is_on)
        monkeypatch.setattr(allocator, "start_cuda_history", self.start)
        monkeypatch.setattr(allocator, "stop_cuda_history", self.stop)
        monkeypatch.setattr(allocator, "cuda_history", fails)
        monkeypatch.setattr(allocator._CudaTrace, "mark", lambda *_: None)

    def start(self, _: int) -> None:
        self.is_on = True

    def stop(self) -> None:
        self.is_on = False
        self.lock_was_free_at_stop = others_can_trace()


def test_a_trace_that_cannot_begin_leaves_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator._CpuTrace, "mark", fails)
    with pytest.raises(BrokenError):
        open_trace(CPU)
    assert not is_profiling()
    assert others_can_trace()


def test_a_profiler_that_cannot_start_leaves_the_lock_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.profiler, "_enable_profiler", fails)
    with pytest.raises(BrokenError):
        open_trace(CPU)
    assert others_can_trace()


def test_a_history_that_cannot_begin_is_not_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(monkeypatch)
    monkeypatch.setattr(allocator._CudaTrace, "mark", fails)
    with pytest.raises(BrokenError):
        open_trace(CUDA)
    assert not history.is_on
    assert others_can_trace()


@pytest.mark.parametrize("end", [closed, abandoned])
def test_the_lock_is_released_once_the_profiler_has_stopped(
    end: Callable[[AllocatorTrace], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = allocator.profiler._disable_profiler
    free: list[bool] = []

    def stop() -> Any:
        free.append(others_can_trace())
        return original()

    monkeypatch.setattr(allocator.profiler, "_disable_profiler", stop)
    trace = open_trace(CPU)
    end(trace)
    assert free == [False]
    assert others_can_trace()
    trace.abandon()  # harmless
    assert free == [False]


@pytest.mark.parametrize("end", [closed, abandoned])
def test_the_lock_is_released_where_stopping_fails(
    end: Callable[[AllocatorTrace], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = open_trace(CPU)
    original = allocator.profiler._disable_profiler
    monkeypatch.setattr(allocator.profiler, "_disable_profiler", fails)
    try:
        with pytest.raises(BrokenError):
            end(trace)
    finally:
        original()
    assert others_can_trace()


def test_a_history_that_cannot_be_read_is_not_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(monkeypatch)
    trace = open_trace(CUDA)
    assert history.is_on
    with pytest.raises(BrokenError):
        trace.close()
    assert not history.is_on
    assert not history.lock_was_free_at_stop
    assert others_can_trace()


def test_the_users_history_is_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(monkeypatch)
    history.is_on = True
    open_trace(CUDA).abandon()
    assert history.is_on
    assert others_can_trace()


def test_the_lock_is_acquired_without_assertions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -O` leaves out what an `assert` calls."""
    path = Path(allocator.__file__)
    optimized = ModuleType("optimized_allocator")
    monkeypatch.setitem(sys.modules, optimized.__name__, optimized)  # dataclasses look there
    exec(compile(path.read_text(), path, "exec", optimize=1), optimized.__dict__)
    trace = optimized.open_trace(CPU)
    could = others_can_trace(optimized)
    trace.abandon()
    assert not could
    assert others_can_trace(optimized)


def test_a_trace_of_a_thread_that_has_ended_does_not_stop_this_ones(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch says on stderr that it lets go of the other's profiler."""
    theirs: list[AllocatorTrace] = []
    thread = threading.Thread(target=lambda: theirs.append(open_trace(CPU)))
    thread.start()
    thread.join()
    mine = open_trace(CPU)
    mine.mark("one")
    theirs[0].abandon()
    assert is_profiling()
    assert not others_can_trace()
    kept = floats(KILO)
    assert mine.close()[1] == Interval("one", 0, KILO, KILO)
    capfd.readouterr()
    del kept
