"""Are the schedules that the documentation shows legal, and does its table of letters say what the code does?"""

import re
from pathlib import Path

import pytest

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import BlockId, BoundaryId, StorageId
from tinybp_lightning.schedule.actions import Backward, Drop, Forward, ForwardSave, Offload, Reload, Schedule, Store
from tinybp_lightning.schedule.notation import from_text, to_text
from tinybp_lightning.schedule.verify import verify_schedule

_DOCS = Path(__file__).parents[3] / "docs"
_SCHEDULE = re.compile(r"\b[FK]0(?: [FKBSDOR]\d+(?:\.\d+)?)+ B0\b")
_SHOWN = sorted({text for page in _DOCS.rglob("*.md") for text in _SCHEDULE.findall(page.read_text())})
_LETTER_ROW = re.compile(r"^\| `([A-Z]3)` \| `(\w+)` \|", re.MULTILINE)
_ACTIONS = (
    Forward(BlockId(3)),
    ForwardSave(BlockId(3)),
    Backward(BlockId(3)),
    Store(BoundaryId(3)),
    Drop(BoundaryId(3)),
    Offload(BoundaryId(3)),
    Reload(BoundaryId(3)),
)


def _uniform_chain(num_blocks: int) -> Chain:
    option = SavedSet("all", (), 1, 1, 1.0, 1, 1.0, 1)
    block = Block("block", "block", 1.0, 1, 0, (option,))
    boundaries = tuple(Boundary((StorageId(i),), 1) for i in range(num_blocks + 1))
    return Chain((0, *(1 for _ in range(num_blocks))), (block,) * num_blocks, boundaries)


def test_theory_shows_schedules() -> None:
    assert "K0 K1 K2 B2 B1 B0" in _SHOWN
    assert len(_SHOWN) >= 2


@pytest.mark.parametrize("text", _SHOWN)
def test_shown_schedule_is_legal(text: str) -> None:
    schedule = from_text(text)
    verify_schedule(_uniform_chain(schedule.num_blocks), schedule)
    assert to_text(schedule) == text


def test_a_schedule_without_its_checkpoint_would_be_found() -> None:
    schedule = from_text("F0 F1 K2 B2 K1 B1 K0 B0")
    with pytest.raises(ScheduleError):
        verify_schedule(_uniform_chain(3), schedule)


def test_letters_in_theory_are_those_of_the_code() -> None:
    shown = dict(_LETTER_ROW.findall((_DOCS / "theory.md").read_text()))
    assert shown == {to_text(Schedule(4, (action,))): type(action).__name__ for action in _ACTIONS}
