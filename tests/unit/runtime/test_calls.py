"""The calls of the largest step there may be."""

import pytest

from tinybp_lightning.runtime.torch.calls import CallBook, CallCost
from tinybp_lightning.runtime.torch.watch import Measured


def calls(units: str, *, input_bytes: int = 100, saved_bytes: int = 1000) -> list[CallCost]:
    """Calls of the units that the letters name, all dropped."""
    return [
        CallCost(unit, units[:k].count(unit), input_bytes, 1.0, saved_bytes, guard_bytes=8, is_dropped=True)
        for k, unit in enumerate(units)
    ]


def units(book: CallBook) -> str:
    return "".join(block.name for block in book.chain(None, []).blocks)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(["abc"], "abc"), (["ac", "abc"], "abc"), (["ab", "bc"], "abc"), (["aa", "a", "aaa"], "aaa"), (["b", "a"], "ab")],
)
def test_each_call_that_some_step_made_is_known(steps: list[str], expected: str) -> None:
    book = CallBook()
    assert all(book.learn(calls(step)) or step == "a" for step in steps)
    assert units(book) == expected
    for step in steps:
        assert not book.learn(calls(step))
        assert [units(book)[book.place(call) or 0] for call in calls(step)] == list(step)


def test_the_most_that_a_call_saved_counts() -> None:
    book = CallBook()
    book.learn(calls("ab"))
    assert not book.learn(calls("ab", saved_bytes=1010))
    assert not book.learn(calls("ab", saved_bytes=0))
    assert book.learn(calls("b", saved_bytes=2000))
    assert [block.options[0].saved_bytes for block in book.chain(None, []).blocks] == [1000, 2000]


def test_a_call_that_is_given_more_is_not_the_one_that_is_known() -> None:
    book = CallBook()
    book.learn(calls("ab"))
    (larger,) = calls("a", input_bytes=200, saved_bytes=2000)
    assert book.place(larger) is None
    assert book.learn([larger])
    assert book.place(larger) == 0
    assert not book.learn(calls("ab"))


def test_a_step_is_whole_that_makes_all_calls_with_as_much() -> None:
    book = CallBook()
    book.learn(calls("ab"))
    assert book.is_whole(calls("ab"))
    assert not book.is_whole(calls("b"))
    assert not book.is_whole(calls("ab", input_bytes=50))


def test_what_is_alive_beside_the_blocks_is_held_throughout() -> None:
    book, dropped = CallBook(), calls("ab")
    book.learn(dropped)
    book.learn(calls("abc"))
    chain = book.chain(Measured(1800, 516, 0, 0), dropped)
    assert chain.storage_bytes == (500,)
    assert chain.workspace_bytes == 24
    assert [block.options[0].backward_peak_bytes for block in chain.blocks] == [284] * 3
