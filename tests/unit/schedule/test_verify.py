"""The oracle accepts legal schedules and names what is wrong with others, in words that help."""

import pytest

from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.schedule import from_text, verify_schedule

LEGAL = [
    "K0 K1 K2 B2 B1 B0",
    "F0 S1 F1 S2 F2 K2 D2 B2 K1 D1 B1 K0 B0",
    "F0 F1 K2 B2 F0 K1 B1 K0 B0",
    "F0 S1 F1 F2 F1 K2 D1 B2 F0 K1 B1 K0 B0",
    "F0 S1 O1 F1 F2 R1 F1 K2 B2 K1 D1 B1 K0 B0",
    "F0 S1 O1 D1 F1 K2 B2 K0 K1 B1 B0",
]

ILLEGAL = [
    ("F1", "first sweep must run block 0|not stored"),
    ("F0 F1 F0", "first sweep must run block 2"),
    ("F0 K1 B1", "first sweep has not run block 2"),
    ("F0 F1 F2 B2", "holds no saved set"),
    ("K0 K1 K2 B1", "next backward must be block 2's"),
    ("K0 K1 K2 B2.1", "holds the saved set of option 0"),
    ("K0.1", "block 0 has 1 options"),
    ("F0 S2", "the cursor is at boundary 1"),
    ("F0 S1 S1", "stored already"),
    ("F0 S1 O1 S1", "stored already"),
    ("F0 D1", "it is not stored"),
    ("F0 D0", "never dropped"),
    ("F0 O1", "only a stored boundary"),
    ("O0", "only a stored boundary"),
    ("F0 S1 R1", "not moved to the host"),
    ("F0 F1 F2 S3", "the cursor is not set"),
    ("F0 F1 K2 B2 F1", "boundary 1 is not stored"),
    ("F0 S1 O1 F1 K2 B2 F1", "boundary 1 is not stored"),
    ("F0 F1 F2 F0 K1 K1", "boundary 1 is not stored"),
    ("F0 S1 F1 F2 K1 K1", "holds a saved set already"),
    ("K0 K1 K2 B2 B1 B0 K0", "has run already"),
    ("K0 K1 K2 B2 B1 B0 F9", "blocks 0 to 2"),
    ("F0 F1 F2 F0 K1 B1", "next backward must be block 2's"),
]


@pytest.mark.parametrize("text", LEGAL)
def test_accepts(text: str) -> None:
    verify_schedule(uniform_chain(3), from_text(text))


@pytest.mark.parametrize(("text", "problem"), ILLEGAL)
def test_refuses_at_the_last_action(text: str, problem: str) -> None:
    last = len(text.split()) - 1
    with pytest.raises(ScheduleError, match=rf"(?s)action {last} .*({problem})"):
        verify_schedule(uniform_chain(3), from_text(text, num_blocks=3))


def test_a_replay_that_stops_early_leaves_no_cursor() -> None:
    with pytest.raises(ScheduleError, match=r"action 8 .*boundary 2 is not stored"):
        verify_schedule(uniform_chain(3), from_text("F0 S1 F1 K2 B2 K1 D1 B1 F2"))


@pytest.mark.parametrize(
    ("text", "missing"), [("F0 F1", "before block 2"), ("K0 K1 K2 B2 B1", r"before `Backward\(0\)`"), ("", "block 0")]
)
def test_refuses_an_unfinished_schedule(text: str, missing: str) -> None:
    with pytest.raises(ScheduleError, match=missing):
        verify_schedule(uniform_chain(3), from_text(text, num_blocks=3))


def test_refuses_a_schedule_of_another_chain() -> None:
    with pytest.raises(ScheduleError, match=r"`num_blocks=3` does not match the chain, which has 4"):
        verify_schedule(uniform_chain(4), from_text("K0 K1 K2 B2 B1 B0"))
