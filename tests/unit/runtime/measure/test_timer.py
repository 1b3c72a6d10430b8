"""A call that can be repeated is timed three times, and the lesser of two times is that of each clock."""

import time
from collections.abc import Callable

import pytest
import torch

from tinybp_lightning.runtime.torch.measure.timer import Timer, Timing


def test_a_call_on_the_cpu_takes_the_same_on_both_clocks() -> None:
    naps_s = [0.5, 0.02, 0.5]

    def nap() -> None:
        time.sleep(naps_s.pop())

    spent = Timer(torch.device("cpu"), step_bytes=0).time_repeatable(nap)
    assert not naps_s
    assert 0.5 > spent.device_s == spent.host_s >= 0.02


def test_the_lesser_is_taken_on_each_clock() -> None:
    assert Timing(3.0, 1.0).at_most(Timing(2.0, 4.0)) == Timing(2.0, 1.0)


def test_the_host_is_timed_on_an_idle_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held device makes the host slower, an idle one waits for the host."""

    def timed(_: Timer, call: Callable[[], None], *, is_held: bool) -> Timing:
        call()
        return Timing(2.0, 5.0) if is_held else Timing(4.0, 3.0)

    monkeypatch.setattr(Timer, "_time_cuda", timed)
    clock = Timer(torch.device("cuda"), step_bytes=2**40)
    assert clock.time_repeatable(lambda: None) == Timing(2.0, 3.0)
    assert clock.time(lambda: None) == Timing(2.0, 5.0)


def test_what_a_call_of_autograd_takes_by_itself_is_left_out() -> None:
    assert Timing(2.0, 3.0).without_host(1.0) == Timing(2.0, 2.0)
    assert Timing(2.0, 3.0).without_host(4.0) == Timing(2.0, 0.0)
    assert Timer(torch.device("cpu"), step_bytes=0).idle_backward_s == 0


def test_on_the_cpu_a_call_finds_no_cache_filled_in_a_large_step() -> None:
    """Reading a tensor that fits into any cache takes far longer than it does right after it was read."""
    clock = Timer(torch.device("cpu"), step_bytes=2**40)
    small = torch.randn(64, 1024)

    def read_it() -> None:
        small.sum()

    cold_s = min(clock.time(read_it).host_s for _ in range(20))
    times_s: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        read_it()
        times_s.append(time.perf_counter() - started)
    assert cold_s > 1.2 * min(times_s)
