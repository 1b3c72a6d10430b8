"""The ops that a block saves: the best at every price, the hull of all choices, and what must not be chosen."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybp_lightning.errors import GraphError
from tinybp_lightning.schedule.saved_ops import BlockOps, SavedOps, cheapest_saved_ops, saved_ops_frontier

PRICES = st.sampled_from([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0])


@st.composite
def block_ops(draw: st.DrawFn) -> BlockOps:
    """Up to 7 ops, some views, some random, some that cannot be saved; what backward reads can always be had."""
    n = draw(st.integers(1, 7))
    inputs = [tuple(sorted(draw(st.sets(st.integers(0, v - 1), max_size=2)))) if v else () for v in range(n)]
    can_save = [draw(st.integers(0, 4)) > 0 for _ in range(n)]
    can_repeat = [not can_save[v] or draw(st.integers(0, 4)) > 0 for v in range(n)]
    return BlockOps(
        inputs=tuple(inputs),
        seconds=tuple(float(draw(st.integers(0, 20))) if can_save[v] else 0.0 for v in range(n)),
        size_bytes=tuple(draw(st.integers(1, 20)) if can_save[v] else 0 for v in range(n)),
        is_read=tuple(draw(st.booleans()) for _ in range(n)),
        can_save=tuple(can_save),
        can_repeat=tuple(can_repeat),
    )


def every_choice(ops: BlockOps) -> list[tuple[int, float]]:
    """Saved bytes and repeated seconds of every choice that serves backward."""
    n = len(ops.inputs)
    found: list[tuple[int, float]] = []
    for states in itertools.product("-sr", repeat=n):
        is_had = all(states[v] != "-" for v in range(n) if ops.is_read[v])
        is_possible = all(
            (s != "s" or ops.can_save[v])
            and (s != "r" or (ops.can_repeat[v] and all(states[u] != "-" for u in ops.inputs[v])))
            for v, s in enumerate(states)
        )
        if is_had and is_possible:
            saved_bytes = sum(ops.size_bytes[v] for v in range(n) if states[v] == "s")
            found.append((saved_bytes, sum(ops.seconds[v] for v in range(n) if states[v] == "r")))
    return found


def serves_backward(ops: BlockOps, choice: SavedOps) -> bool:
    had = choice.saved | choice.repeated
    return (
        all(v in had for v, read in enumerate(ops.is_read) if read)
        and all(ops.can_save[v] for v in choice.saved)
        and all(ops.can_repeat[v] and set(ops.inputs[v]) <= had for v in choice.repeated)
        and not choice.saved & choice.repeated
        and choice.saved_bytes == sum(ops.size_bytes[v] for v in choice.saved)
        and choice.repeat_s == sum(ops.seconds[v] for v in choice.repeated)
    )


@settings(max_examples=300, deadline=None)
@given(block_ops(), PRICES)
def test_no_choice_is_cheaper(ops: BlockOps, price: float) -> None:
    choice = cheapest_saved_ops(ops, seconds_per_byte=price)
    assert serves_backward(ops, choice)
    best = min(seconds + price * saved_bytes for saved_bytes, seconds in every_choice(ops))
    # Flows are integers: a hundred-millionth of all costs together is one.
    total = sum(ops.seconds) + price * sum(ops.size_bytes)
    assert choice.repeat_s + price * choice.saved_bytes <= best + 1e-7 * total


@settings(max_examples=200, deadline=None)
@given(block_ops())
def test_the_frontier_falls_from_the_most_to_the_fewest_bytes(ops: BlockOps) -> None:
    frontier = saved_ops_frontier(ops)
    assert all(serves_backward(ops, corner) for corner in frontier)
    saved = [corner.saved_bytes for corner in frontier]
    assert saved == sorted(set(saved), reverse=True)
    choices = every_choice(ops)
    assert saved[-1] == min(saved_bytes for saved_bytes, _ in choices)
    assert frontier[0].repeat_s <= min(seconds for _, seconds in choices) + 0.02 * sum(ops.seconds)
    # Every choice lies on or above the line between two neighbouring corners.
    for high, low in itertools.pairwise(frontier):
        slope = (low.repeat_s - high.repeat_s) / (high.saved_bytes - low.saved_bytes)
        line = high.repeat_s + slope * high.saved_bytes
        assert all(s + slope * b >= line - 0.02 * sum(ops.seconds) - 1e-6 for b, s in choices)


def test_a_random_result_is_saved_whatever_it_costs() -> None:
    ops = BlockOps(((), (0,)), (1.0, 1.0), (1000, 10), (True, True), (True, True), (False, True))
    assert saved_ops_frontier(ops)[-1].saved == {0}


def test_equal_ops_leave_the_saved_set_one_after_the_other() -> None:
    ops = BlockOps(((),) * 4, (1.0,) * 4, (10,) * 4, (True,) * 4, (True,) * 4, (True,) * 4)
    assert [corner.saved_bytes for corner in saved_ops_frontier(ops)] == [40, 30, 20, 10, 0]


def test_what_can_neither_be_saved_nor_repeated_is_an_error() -> None:
    ops = BlockOps(((),), (1.0,), (1,), (True,), (False,), (False,))
    with pytest.raises(GraphError, match="op `0`, which can neither be saved nor repeated"):
        saved_ops_frontier(ops)
