"""Split a schedule at its backwards into a `ReplayProgram`, which autograd can drive.

Autograd decides when a block's backward runs; the schedule says what must have happened by then. So the actions
between two `Backward`s become the replay steps of the later one. The engine plays them when autograd first asks for a
tensor that the later block saved. `pin_program` leaves blocks that must not run again out of the replay steps.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule.actions import Backward, Drop, Forward, ForwardSave, Offload, Reload, Schedule, Store

__all__ = ["ReplayProgram", "ReplayStep", "part_of_program", "pin_program", "replay_program_of"]

_ReplayAction = Forward | ForwardSave | Store | Drop
"""What can stand between two backwards: `replay_program_of` refuses every other action, so the engine sees none."""


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """One action of a replay; `stops_early` if no later step reads the outputs of this `ForwardSave`."""

    action: _ReplayAction
    stops_early: bool


@dataclass(frozen=True, slots=True)
class ReplayProgram:
    """A schedule in the form that the engine plays.

    `kept[i]`: block i saves its tensors in the first sweep, as in plain training. `options[i]`: the option of block
    i's backward. Every run of the block uses it, because backward follows the graph that the first run left behind.
    `stored`: the boundaries kept from the first sweep. `steps[i]`: what to play just before block i's backward.
    `pinned`: the stored boundaries that are never released, because the block before them must not run again.
    """

    kept: tuple[bool, ...]
    options: tuple[OptionId, ...]
    stored: frozenset[BoundaryId]
    steps: tuple[tuple[ReplayStep, ...], ...]
    pinned: frozenset[BoundaryId] = frozenset()


def replay_program_of(schedule: Schedule) -> ReplayProgram:
    """Return a verified schedule's replay program. Raises `ScheduleError` for offload, or if a block mixes options."""
    n = schedule.num_blocks
    options = {a.block: a.option for a in schedule.actions if isinstance(a, Backward)}
    kept: list[bool] = []
    stored: set[BoundaryId] = set()
    steps: list[tuple[ReplayStep, ...]] = [()] * n
    pending: list[_ReplayAction] = []
    for action in schedule.actions:
        in_first_sweep = len(kept) < n
        match action:
            case Offload() | Reload():
                raise ScheduleError(
                    f"`{action}`: the engine cannot move boundaries to host memory yet. Use a schedule without offload."
                )
            case ForwardSave(block=block, option=option) if option != options[block]:
                raise ScheduleError(
                    f"`{action}`: the block's backward uses option `{options[block]}`. Save by the same option."
                )
            case Forward() | ForwardSave() if in_first_sweep:
                kept.append(isinstance(action, ForwardSave))
            case Store(boundary=boundary) if in_first_sweep:
                stored.add(boundary)
            case Drop(boundary=boundary) if in_first_sweep:
                stored.discard(boundary)
            case Forward() | ForwardSave() | Store() | Drop():
                pending.append(action)
            case Backward(block=block):
                steps[block] = _replay_steps(pending)
                pending = []
            case _:
                assert_never(action)
    return ReplayProgram(tuple(kept), tuple(options[BlockId(b)] for b in range(n)), frozenset(stored), tuple(steps))


def pin_program(program: ReplayProgram, blocks: Collection[int]) -> ReplayProgram:
    """Return `program` with `blocks` pinned: the first sweep saves them and stores what follows, replays leave them."""
    if not blocks:
        return program
    after = frozenset(BoundaryId(b + 1) for b in blocks if b + 1 < len(program.kept))
    return replace(
        program,
        kept=tuple(kept or i in blocks for i, kept in enumerate(program.kept)),
        stored=program.stored | after,
        steps=tuple(_replay_steps([step.action for step in steps], blocks, after) for steps in program.steps),
        pinned=after,
    )


def _replay_steps(
    actions: Sequence[_ReplayAction], pinned: Collection[int] = (), after: Collection[int] = ()
) -> tuple[ReplayStep, ...]:
    """Mark what stops early; leave out `pinned` blocks, what only led to them, and the boundaries `after` them."""
    steps: list[ReplayStep] = []
    read_next: int | None = None  # the boundary that the next step takes from the cursor, if none is stored
    for action in reversed(actions):
        stops_early = False
        match action:
            case Store(boundary=boundary) | Drop(boundary=boundary) if boundary in after:
                continue
            case Store(boundary=boundary):
                read_next = boundary
            case Drop():
                pass
            case Forward(block=block) | ForwardSave(block=block):
                is_read = read_next == block + 1
                if block in pinned or not (is_read or isinstance(action, ForwardSave)):
                    continue
                stops_early = not is_read
                read_next = None if block in after else block
            case _:
                assert_never(action)
        steps.append(ReplayStep(action, stops_early))
    return tuple(reversed(steps))


def part_of_program(program: ReplayProgram, blocks: range) -> ReplayProgram:
    """Return what `blocks` have to play, those of one call in a step of several, whose chains were joined.

    A call starts from inputs of its own, so none of its replays needs an earlier call's. Where a replay of a later call
    would run and store blocks of this one on its way, this one does so when its own backward begins.
    """

    def inside(actions: Iterable[_ReplayAction]) -> list[_ReplayAction]:
        found: list[_ReplayAction] = []
        for action in actions:
            match action:
                case Forward(block=b) | ForwardSave(block=b) if b in blocks:
                    found.append(replace(action, block=BlockId(b - blocks.start)))
                case Store(boundary=b) | Drop(boundary=b) if blocks.start < b < blocks.stop:
                    found.append(replace(action, boundary=BoundaryId(b - blocks.start)))
                case Forward() | ForwardSave() | Store() | Drop():
                    pass  # another call's, or the first boundary, which is always there
                case _:
                    assert_never(action)
        return found

    def boundaries(all_of_them: frozenset[BoundaryId]) -> frozenset[BoundaryId]:
        return frozenset(BoundaryId(b - blocks.start) for b in all_of_them if blocks.start < b < blocks.stop)

    actions = [[step.action for step in steps] for steps in program.steps]
    of_later_calls = [action for steps in reversed(actions[blocks.stop :]) for action in steps]
    actions[blocks.stop - 1] = of_later_calls + actions[blocks.stop - 1]
    return ReplayProgram(
        program.kept[blocks.start : blocks.stop],
        program.options[blocks.start : blocks.stop],
        boundaries(program.stored),
        tuple(_replay_steps(inside(mine)) for mine in actions[blocks.start : blocks.stop]),
        boundaries(program.pinned),
    )
