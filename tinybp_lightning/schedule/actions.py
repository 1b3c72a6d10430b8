"""Define what a training step can do with a block: the actions that simulator, oracle, printer and runtime interpret.

A `Schedule` is data. It has two parts in one list: the *first sweep* (up to the last block's first `Forward` or
`ForwardSave`, run while the user's forward runs) and the rest (run while autograd runs backward).

State that the actions act on: `stored` boundaries (boundary 0 always is), the *cursor* (the boundary the last forward
left behind, readable by the next action until the next `Backward`), and the saved sets alive.
"""

from dataclasses import dataclass

from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId

__all__ = ["Action", "Backward", "Drop", "Forward", "ForwardSave", "Offload", "Reload", "Schedule", "Store"]


@dataclass(frozen=True, slots=True)
class Forward:
    """Run `block` from the cursor or from its stored boundary; keep nothing but its outputs, as the new cursor."""

    block: BlockId


@dataclass(frozen=True, slots=True)
class ForwardSave:
    """Run `block` likewise and keep the saved set of `option`; its outputs become the cursor.

    In a replay whose next action is the block's own `Backward` (a `Drop` may stand between) the run stops at the last
    saved tensor and leaves no cursor.
    """

    block: BlockId
    option: OptionId = OptionId(0)


@dataclass(frozen=True, slots=True)
class Backward:
    """Run `block`'s backward from the saved set of `option`, which is released; the cursor is released too."""

    block: BlockId
    option: OptionId = OptionId(0)


@dataclass(frozen=True, slots=True)
class Store:
    """Keep the cursor, which is boundary `boundary`, so that later forwards can start there."""

    boundary: BoundaryId


@dataclass(frozen=True, slots=True)
class Drop:
    """Release a stored boundary."""

    boundary: BoundaryId


@dataclass(frozen=True, slots=True)
class Offload:
    """Start to move a stored boundary to pinned host memory; its device bytes are free when the copy has ended."""

    boundary: BoundaryId


@dataclass(frozen=True, slots=True)
class Reload:
    """Start to bring an offloaded boundary back; the next action that reads it waits for the copy."""

    boundary: BoundaryId


Action = Forward | ForwardSave | Backward | Store | Drop | Offload | Reload


@dataclass(frozen=True, slots=True)
class Schedule:
    """One training step over a chain of `num_blocks` blocks: a legal list of actions (`verify_schedule`)."""

    num_blocks: int
    actions: tuple[Action, ...]
