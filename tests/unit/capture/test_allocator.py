"""Bytes alive, from the allocator's events: exact, whatever else is going on."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tinybp_lightning.capture.torch.allocator import AllocatorTrace, Segment, can_trace, open_trace

CPU = torch.device("cpu")
KILO = 1000


def floats(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes // 4)


def test_segments_are_exact() -> None:
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
    assert one == Segment("one", 0, 6 * KILO, 2 * KILO)
    assert two == Segment("two", 2 * KILO, 3 * KILO, KILO)
    assert three == Segment("three", KILO, KILO, 0)
    del before


def test_a_tensor_from_before_that_is_freed_does_not_lower_the_level() -> None:
    """The allocator does not know its size. The peak is overstated, never understated."""
    before = floats(8 * KILO)
    trace = open_trace(CPU)
    trace.mark("one")
    del before
    after = floats(KILO)
    assert trace.close()[1] == Segment("one", 0, KILO, KILO)
    del after


def test_a_size_remembered_from_an_earlier_trace_is_not_believed() -> None:
    """The profiler's table of sizes outlives a trace: it says what was at an address when it last looked."""
    trace = open_trace(CPU)
    large = [floats(64 * KILO) for _ in range(50)]
    trace.close()
    places = {t.data_ptr() for t in large}
    del large
    small = [floats(KILO) for _ in range(5000)]
    assert any(t.data_ptr() in places for t in small), "no address was given again: the test shows nothing"
    trace = open_trace(CPU)
    trace.mark("one")
    small.clear()
    assert trace.close()[1] == Segment("one", 0, 0, 0)


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
