"""How does a schedule become something autograd can drive? It is split at its backwards, once, into a `ReplayProgram`.

Autograd decides when a block's backward runs; the schedule says what must have happened by then. So the actions
between two `Backward`s become the *segment* of the later one, to be played when autograd first asks for a tensor that
the later block saved.
"""

from dataclasses import dataclass

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

__all__ = ["Move", "ReplayProgram", "replay_program_of"]


@dataclass(frozen=True, slots=True)
class Move:
    """One action of a segment; `stops_early` if nobody reads the outputs of this `ForwardSave`."""

    action: Action
    stops_early: bool


@dataclass(frozen=True, slots=True)
class ReplayProgram:
    """A schedule as the engine plays it.

    `kept[i]`: block i saves its tensors in the first sweep, as in plain training. `options[i]`: of block i's backward,
    and so of every run of it: the autograd graph that the first run leaves behind is the one that backward follows.
    `stored`: boundaries kept from the first sweep. `segments[i]`: what to play just before block i's backward.
    `pinned`: boundaries among `stored` that are never let go of, because the block before them must not run again.
    """

    kept: tuple[bool, ...]
    options: tuple[OptionId, ...]
    stored: frozenset[BoundaryId]
    segments: tuple[tuple[Move, ...], ...]
    pinned: frozenset[BoundaryId] = frozenset()


def replay_program_of(schedule: Schedule) -> ReplayProgram:
    """Return the `ReplayProgram` of a schedule that passed `verify_schedule`.

    **Raises:** `ScheduleError` for an action this engine does not play (offload), or a block saved by two options.
    """
    n = schedule.num_blocks
    kept = [False] * n
    options = {a.block: a.option for a in schedule.actions if isinstance(a, Backward)}
    stored: set[BoundaryId] = set()
    segments: list[tuple[Move, ...]] = [()] * n
    sweeping, pending = 0, list[Action]()
    for action in schedule.actions:
        match action:
            case Offload() | Reload():
                raise ScheduleError(f"`{action}`: the engine does not move boundaries to host memory yet.")
            case ForwardSave(block=block, option=option) if option != options[block]:
                raise ScheduleError(f"`{action}`: the block's backward goes by option `{options[block]}`.")
            case Forward() | ForwardSave() if sweeping < n:
                kept[sweeping] = isinstance(action, ForwardSave)
                sweeping += 1
            case Store(boundary=boundary) if sweeping < n:
                stored.add(boundary)
            case Drop(boundary=boundary) if sweeping < n:
                stored.discard(boundary)
            case Backward(block=block):
                segments[block] = _moves(pending)
                pending = []
            case Forward() | ForwardSave() | Store() | Drop():
                pending.append(action)
    return ReplayProgram(tuple(kept), tuple(options[BlockId(b)] for b in range(n)), frozenset(stored), tuple(segments))


def _moves(actions: list[Action]) -> tuple[Move, ...]:
    """Mark each `ForwardSave` whose outputs no later action of the segment reads."""
    moves: list[Move] = []
    cursor_needed: BoundaryId | None = None
    for action in reversed(actions):
        early = False
        match action:
            case Store(boundary=boundary):
                cursor_needed = boundary
            case Forward(block=block):
                cursor_needed = BoundaryId(block)
            case ForwardSave(block=block):
                early = cursor_needed != BlockId(block + 1)
                cursor_needed = BoundaryId(block)
            case _:
                pass
        moves.append(Move(action, early))
    return tuple(reversed(moves))
