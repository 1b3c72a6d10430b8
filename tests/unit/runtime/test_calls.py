"""The calls of the largest step that may come."""

from dataclasses import replace

import pytest

from tinybp_lightning.runtime.profile import StepMeasurement
from tinybp_lightning.runtime.torch.calls import CallCost, DroppedStep, LargestStep


def calls(units: str, *, input_bytes: int = 100, saved_bytes: int = 1000) -> list[CallCost]:
    """Calls of the units that the letters name, all dropped."""
    return [
        CallCost(unit, units[:k].count(unit), input_bytes, 1.0, saved_bytes, guard_bytes=8, is_dropped=True)
        for k, unit in enumerate(units)
    ]


def saved(step: LargestStep) -> list[int]:
    return [block.options[0].saved_bytes for block in step.chain(DroppedStep()).blocks]


def units(step: LargestStep) -> str:
    return "".join(block.name for block in step.chain(DroppedStep()).blocks)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(["abc"], "abc"), (["ac", "abc"], "abc"), (["ab", "bc"], "abc"), (["aa", "a", "aaa"], "aaa"), (["b", "a"], "ab")],
)
def test_each_call_that_some_step_made_is_known(steps: list[str], expected: str) -> None:
    largest = LargestStep()
    for step in steps:
        largest = largest.with_calls(calls(step))
    assert units(largest) == expected
    for step in steps:
        assert largest.with_calls(calls(step)) is largest
        assert [units(largest)[largest.place(call) or 0] for call in calls(step)] == list(step)


def test_the_most_that_a_call_saved_counts() -> None:
    step = LargestStep(calls("ab"))
    assert step.with_calls(calls("ab", saved_bytes=1010)) is step
    assert step.with_calls(calls("ab", saved_bytes=0)) is step
    larger = step.with_calls(calls("b", saved_bytes=2000))
    assert saved(larger) == [1000, 2000]
    assert saved(step) == [1000, 1000]


def test_a_call_that_is_given_more_is_not_the_one_that_is_known() -> None:
    step = LargestStep(calls("ab"))
    (larger,) = calls("a", input_bytes=200, saved_bytes=2000)
    assert step.place(larger) is None
    grown = step.with_calls([larger])
    assert grown.place(larger) == 0
    assert grown.with_calls(calls("ab")) is grown


def test_a_step_is_whole_that_makes_all_calls_with_as_much() -> None:
    step = LargestStep(calls("ab"))
    assert step.is_whole(calls("ab"))
    assert not step.is_whole(calls("b"))
    assert not step.is_whole(calls("ab", input_bytes=50))


def test_units_that_are_no_blocks_any_more_are_left_out() -> None:
    step = LargestStep(calls("abab"))
    assert units(step.without({"a"})) == "bb"
    assert step.without({"c"}) is step
    assert step.without({"a"}).is_whole(calls("bb"))


def test_what_is_alive_beside_the_blocks_is_held_throughout_and_what_each_backward_needs_is_its_own() -> None:
    dropped = calls("ab")
    measured = StepMeasurement(1800, 516, 0, 0, {0: 1800, 1: 1600})
    chain = LargestStep(dropped).chain(DroppedStep(measured, tuple(dropped)))
    assert chain.storage_bytes == (500,)
    assert chain.unmodelled_bytes == 16
    assert [block.options[0].backward_peak_bytes for block in chain.blocks] == [284, 84]
    kept = replace(measured, keeps_graph=True)
    chain = LargestStep(dropped).chain(DroppedStep(kept, tuple(dropped)))
    assert [block.options[0].backward_peak_bytes for block in chain.blocks] == [284, 284]
    more = LargestStep(dropped).with_calls(calls("abc"))
    blocks = more.chain(DroppedStep(measured, tuple(dropped))).blocks
    assert [block.options[0].backward_peak_bytes for block in blocks] == [284, 84, 284]


def test_more_is_alive_beside_the_blocks_of_a_larger_step() -> None:
    """As many times as much as more is given to all its calls, or to the one that is given most."""
    dropped = calls("ab")
    step = LargestStep(dropped).with_calls(calls("abc"))
    measured = StepMeasurement(1800, 516, 0, 0, {0: 1800, 1: 1800})
    assert step.chain(DroppedStep(measured, tuple(dropped))).storage_bytes == (750,)
    step = LargestStep(dropped).with_calls(calls("a", input_bytes=300, saved_bytes=3000))
    chain = step.chain(DroppedStep(measured, tuple(dropped)))
    assert chain.storage_bytes == (1000,)
    assert chain.blocks[1].options[0].backward_peak_bytes == 3 * 284
