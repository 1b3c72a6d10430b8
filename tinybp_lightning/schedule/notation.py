"""Write a schedule on one line, and read it back.

`F3` is forward, `K3` keep, `B3` backward, `S3` store, `D3` drop, `O3` offload and `R3` reload.
Option 0 is left out; option 1 of block 3 is `K3.1` and `B3.1`. `from_text` is the inverse of `to_text`.
"""

import re
from typing import assert_never

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule.actions import (
    Action,
    Backward,
    Drop,
    Forward,
    ForwardSave,
    Offload,
    Reload,
    Schedule,
    Store,
)

__all__ = ["from_text", "to_text"]

_WORD = re.compile(r"([FKBSDOR])(\d+)(?:\.(\d+))?")
_OF_BLOCK = {"K": ForwardSave, "B": Backward}
_OF_BOUNDARY = {"S": Store, "D": Drop, "O": Offload, "R": Reload}
_LETTERS: dict[type[Action], str] = {
    kind: letter for letter, kind in {"F": Forward, **_OF_BLOCK, **_OF_BOUNDARY}.items()
}


def to_text(schedule: Schedule) -> str:
    """Return the schedule's actions as words separated by one space."""
    return " ".join(_word(action) for action in schedule.actions)


def from_text(text: str, *, num_blocks: int | None = None) -> Schedule:
    """Return the schedule that `text` spells.

    **Arguments:** `num_blocks`: left out, one more than the highest block that is named.

    **Raises:** `ScheduleError` at a word that is not in the notation.
    """
    actions = tuple(_action(word) for word in text.split())
    named = [action.block for action in actions if isinstance(action, Forward | ForwardSave | Backward)]
    return Schedule(num_blocks=max(named, default=-1) + 1 if num_blocks is None else num_blocks, actions=actions)


def _word(action: Action) -> str:
    match action:
        case Forward(number) | Store(number) | Drop(number) | Offload(number) | Reload(number):
            option = 0
        case ForwardSave(number, option) | Backward(number, option):
            pass
        case _:
            assert_never(action)
    return f"{_LETTERS[type(action)]}{number}" + (f".{option}" if option else "")


def _action(word: str) -> Action:
    match = _WORD.fullmatch(word)
    if match is None or (match[3] is not None and match[1] not in _OF_BLOCK):
        raise ScheduleError(
            f"`{word}` is not an action: expected one of F, K, B, S, D, O, R and a number, such as `F3` or `K3.1`."
        )
    number, option = int(match[2]), OptionId(int(match[3] or 0))
    if match[1] == "F":
        return Forward(BlockId(number))
    if match[1] in _OF_BLOCK:
        return _OF_BLOCK[match[1]](BlockId(number), option)
    return _OF_BOUNDARY[match[1]](BoundaryId(number))
