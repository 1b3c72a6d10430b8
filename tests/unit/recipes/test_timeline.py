import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.timeline import MAX_POINTS, MemoryEvent, Timeline, account, downsample


def events(*changes: tuple[int, int]) -> list[MemoryEvent]:
    return [MemoryEvent(float(time), address, size) for time, (address, size) in enumerate(changes)]


def test_peak_is_the_most_alive_at_once() -> None:
    memory = account(events((1, 100), (2, 50), (1, -100), (3, 70), (2, -50), (3, -70)), gradient_addresses=[])
    assert (memory.peak_bytes, memory.activation_peak_bytes, memory.residue_bytes) == (150, 150, 0)
    assert memory.timeline.live_bytes == (100, 150, 50, 120, 70, 0)


def test_a_gradient_is_left_out_from_its_birth() -> None:
    memory = account(events((1, 100), (9, 40), (2, 10), (1, -100), (2, -10)), gradient_addresses=[9])
    assert (memory.peak_bytes, memory.activation_peak_bytes, memory.residue_bytes) == (150, 110, 0)
    assert memory.timeline.live_bytes == (100, 100, 110, 10, 0)


def test_a_reused_address_counts_until_its_last_allocation() -> None:
    """The activation of 500 lay where the gradient of 40 came to lie."""
    memory = account(events((9, 500), (1, 1), (9, -500), (9, 40), (1, -1)), gradient_addresses=[9])
    assert (memory.peak_bytes, memory.activation_peak_bytes) == (501, 501)
    assert memory.timeline.live_bytes == (500, 501, 1, 1, 0)


def test_a_gradient_that_was_released_again_is_an_activation() -> None:
    memory = account(events((9, 40), (9, -40)), gradient_addresses=[9])
    assert memory.activation_peak_bytes == 40


def test_releases_of_older_memory_are_ignored() -> None:
    memory = account(events((7, -1000), (1, 10), (7, -5), (1, -10)), gradient_addresses=[])
    assert (memory.peak_bytes, memory.timeline.live_bytes) == (10, (10, 0))


def test_what_stays_beside_gradients_is_residue() -> None:
    memory = account(events((1, 8), (9, 40)), gradient_addresses=[9])
    assert memory.residue_bytes == 8


def test_nothing_allocated_is_nothing() -> None:
    memory = account([], gradient_addresses=[1])
    assert (memory.peak_bytes, memory.activation_peak_bytes, memory.timeline.time_s) == (0, 0, ())


def test_a_short_timeline_stays_as_it_is() -> None:
    timeline = Timeline((0.0, 1.0), (3, 4))
    assert downsample(timeline) is timeline


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6000), st.integers(2, 300))
def test_downsampling_keeps_the_peak_and_the_order(live: list[int], max_points: int) -> None:
    timeline = Timeline(tuple(float(index) for index in range(len(live))), tuple(live))
    short = downsample(timeline, max_points=max_points)
    assert len(short.time_s) <= max_points
    assert max(short.live_bytes) == max(live)
    assert list(short.time_s) == sorted(set(short.time_s))
    assert all(live[int(time_s)] == bytes_then for time_s, bytes_then in zip(*_points(short), strict=True))


def _points(timeline: Timeline) -> tuple[tuple[float, ...], tuple[int, ...]]:
    return timeline.time_s, timeline.live_bytes


def test_downsampling_to_the_default() -> None:
    timeline = Timeline(tuple(map(float, range(10_001))), tuple(range(10_001)))
    assert len(downsample(timeline).time_s) <= MAX_POINTS


def test_one_point_is_too_few() -> None:
    with pytest.raises(ValueError, match="max_points=1"):
        downsample(Timeline((), ()), max_points=1)
