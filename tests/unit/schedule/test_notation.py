"""The notation reads back what it writes, and refuses what it does not know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule import (
    Backward,
    Drop,
    Forward,
    ForwardSave,
    Offload,
    Reload,
    Schedule,
    Store,
    from_text,
    to_text,
)

_NUMBER = st.integers(0, 999)
_ACTIONS = st.one_of(
    st.builds(Forward, _NUMBER.map(BlockId)),
    st.builds(ForwardSave, _NUMBER.map(BlockId), st.integers(0, 12).map(OptionId)),
    st.builds(Backward, _NUMBER.map(BlockId), st.integers(0, 12).map(OptionId)),
    st.builds(Store, _NUMBER.map(BoundaryId)),
    st.builds(Drop, _NUMBER.map(BoundaryId)),
    st.builds(Offload, _NUMBER.map(BoundaryId)),
    st.builds(Reload, _NUMBER.map(BoundaryId)),
)


@given(st.lists(_ACTIONS))
def test_reads_back_what_it_writes(actions: list[Forward]) -> None:
    schedule = Schedule(num_blocks=1000, actions=tuple(actions))
    assert from_text(to_text(schedule), num_blocks=1000) == schedule


def test_every_action_literally() -> None:
    schedule = from_text("F0 S1 K1.2 O1 R1 D1 B1.2")
    assert schedule.num_blocks == 2
    assert schedule.actions[2] == ForwardSave(BlockId(1), OptionId(2))
    assert to_text(schedule) == "F0 S1 K1.2 O1 R1 D1 B1.2"


@pytest.mark.parametrize("word", ["X1", "F", "F-1", "S1.0", "K1.", "f1", "F1.1"])
def test_refuses_an_unknown_word_by_name(word: str) -> None:
    with pytest.raises(ScheduleError, match=f"`{word}` is not an action"):
        from_text(f"F0 {word}")
