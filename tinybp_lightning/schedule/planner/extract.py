"""How does an interval tree become a schedule? Walk it, asking a chooser at every node, and write the actions down.

A boundary is stored only when a split comes back to it, and dropped right after its own block's saved set exists.
The walk keeps its own stack: chains of any length.
"""

from dataclasses import dataclass
from typing import Protocol, assert_never

from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store
from tinybp_lightning.schedule.planner.states import Tables

__all__ = ["Chooser", "KeepHere", "Move", "Node", "PassBy", "RunOut", "SplitAt", "unfold"]


@dataclass(frozen=True, slots=True)
class Node:
    """A segment from `state` to the cut with index `end`, or with `None` the rest of the first sweep.

    `left` is the chooser's own measure of the bytes left. `low` is the boundary down to which blocks are reversed, left
    out when it is the state's own.
    """

    state: int
    end: int | None
    left: int
    low: int | None = None


@dataclass(frozen=True, slots=True)
class KeepHere:
    """Keep the first block's saved set of `option`; `rest` is what follows, `None` when nothing does."""

    option: int
    rest: Node | None


@dataclass(frozen=True, slots=True)
class SplitAt:
    """Run to `boundary` and reverse `right` from there, then `left` from here."""

    boundary: int
    right: Node
    left: Node


@dataclass(frozen=True, slots=True)
class PassBy:
    """Run the first block, which a later part reverses, and release its boundary; `rest` is what follows."""

    rest: Node


@dataclass(frozen=True, slots=True)
class RunOut:
    """Run the first sweep to its end keeping nothing, then reverse `left` from here."""

    left: Node


Move = KeepHere | SplitAt | PassBy | RunOut


class Chooser(Protocol):
    """Decides at every node of the tree."""

    def choose(self, node: Node) -> Move:
        """Return the move at `node`."""
        ...


def unfold(tables: Tables, chooser: Chooser, root: Node) -> Schedule:
    """Return the schedule of the tree that `chooser` spans from `root`."""
    actions: list[Action] = []
    # Nodes still to walk (with whether their boundary is stored) and backwards still to run, last first.
    pending: list[tuple[Node, bool] | Backward] = [(root, True)]
    while pending:
        item = pending.pop()
        if isinstance(item, Backward):
            actions.append(item)
            continue
        node, stored = item
        i = tables.states[node.state].boundary
        if i == tables.num_blocks:
            continue
        move = chooser.choose(node)
        match move:
            case KeepHere(option, rest):
                actions.append(ForwardSave(BlockId(i), OptionId(option)))
                actions += [Drop(BoundaryId(i))] if stored and i else []
                pending.append(Backward(BlockId(i), OptionId(option)))
                pending += [(rest, False)] if rest else []
            case SplitAt(boundary, right, left):
                actions += [] if stored else [Store(BoundaryId(i))]
                actions += [Forward(BlockId(block)) for block in range(i, boundary)]
                pending += [(left, True), (right, False)]
            case PassBy(rest):
                actions.append(Forward(BlockId(i)))
                actions += [Drop(BoundaryId(i))] if stored and i else []
                pending.append((rest, False))
            case RunOut(left):
                actions += [] if stored else [Store(BoundaryId(i))]
                actions += [Forward(BlockId(block)) for block in range(i, tables.num_blocks)]
                pending.append((left, True))
            case _:
                assert_never(move)
    return Schedule(num_blocks=tables.num_blocks, actions=tuple(actions))
