"""Check that a schedule is legal on its chain: the simulator asks this before it plays one.

It follows the state that `actions` documents (stored boundaries, cursor, saved sets) and nothing else: no bytes, no
seconds. It shares no code with the simulator, so that one cannot hide the other's mistake.
"""

from dataclasses import dataclass, field
from typing import assert_never

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId
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
from tinybp_lightning.schedule.arguments import check_chain, check_schedule

__all__ = ["verify_schedule"]


def verify_schedule(chain: Chain, schedule: Schedule) -> None:
    """Check that `schedule` is a legal training step over `chain`.

    **Arguments:** `schedule`: at least one first sweep over all blocks in order, then every block's backward once, in
    descending order.

    **Raises:** `ScheduleError` at the first action that reads a state that is not there, with its index and text;
    `ConfigError` for arguments that are not a chain and a schedule.
    """
    check_chain(chain)
    check_schedule(schedule)
    num_blocks = len(chain.blocks)
    if schedule.num_blocks != num_blocks:
        raise ScheduleError(
            f"`num_blocks={schedule.num_blocks}` does not match the chain, which has {num_blocks} blocks: "
            "plan again for this chain."
        )
    state = _State(chain=chain, num_blocks=num_blocks, backward_next=num_blocks - 1)
    actions = schedule.actions
    for index, action in enumerate(actions):
        problem = state.play(action, stops_early=_stops_early(actions, index))
        if problem:
            raise ScheduleError(f"action {index} `{action}` is not legal: {problem}.")
    if state.sweep_next < num_blocks:
        raise ScheduleError(f"the first sweep ends before block {state.sweep_next}: every block must run forward.")
    if state.backward_next >= 0:
        raise ScheduleError(f"the schedule ends before `Backward({state.backward_next})`: every block needs one.")


def _stops_early(actions: tuple[Action, ...], index: int) -> bool:
    """Whether the action after `index`, `Drop`s aside, is the backward of the block that `index` saves."""
    action = actions[index]
    if not isinstance(action, ForwardSave):
        return False
    following = (actions[k] for k in range(index + 1, len(actions)))
    reader = next((one for one in following if not isinstance(one, Drop)), None)
    return isinstance(reader, Backward) and reader.block == action.block


@dataclass(slots=True)
class _State:
    chain: Chain
    num_blocks: int
    backward_next: int
    sweep_next: int = 0
    cursor: int | None = None
    stored: set[int] = field(default_factory=lambda: {0})
    offloaded: set[int] = field(default_factory=set[int])
    saved: dict[int, int] = field(default_factory=dict[int, int])

    def play(self, action: Action, *, stops_early: bool) -> str:
        """Move to the state after `action`; return what forbids it, or nothing."""
        match action:
            case Forward(block):
                return self._forward(block, leaves_cursor=True)
            case ForwardSave(block, option):
                return self._forward_save(block, option, stops_early=stops_early)
            case Backward(block, option):
                return self._backward(block, option)
            case Store(boundary):
                if self.cursor != boundary:
                    return f"the cursor is {_at(self.cursor)}, and only the cursor can be stored"
                if boundary in self.stored or boundary in self.offloaded:
                    return "it is stored already"
                self.stored.add(boundary)
            case Drop(boundary):
                if boundary == 0:
                    return "boundary 0 belongs to the caller and is never dropped"
                if boundary not in self.stored and boundary not in self.offloaded:
                    return "it is not stored"
                self.stored.discard(boundary)
                self.offloaded.discard(boundary)
            case Offload(boundary):
                if boundary == 0 or boundary not in self.stored:
                    return "only a stored boundary other than 0 can be moved to the host"
                self.stored.remove(boundary)
                self.offloaded.add(boundary)
            case Reload(boundary):
                if boundary not in self.offloaded:
                    return "it was not moved to the host"
                self.offloaded.remove(boundary)
                self.stored.add(boundary)
            case _:
                assert_never(action)
        return ""

    def _forward(self, block: BlockId, *, leaves_cursor: bool) -> str:
        if not 0 <= block < self.num_blocks:
            return f"the chain has blocks 0 to {self.num_blocks - 1}"
        if self.cursor != block and block not in self.stored:
            return f"boundary {block} is not stored on the device and the cursor is {_at(self.cursor)}"
        in_sweep = self.sweep_next < self.num_blocks
        if in_sweep and block != self.sweep_next:
            return f"the first sweep must run block {self.sweep_next} next"
        self.sweep_next += in_sweep
        # What the loss does with the last boundary ends the first sweep; a replay cannot start from it.
        sweep_ended = in_sweep and self.sweep_next == self.num_blocks
        self.cursor = block + 1 if leaves_cursor and not sweep_ended else None
        return ""

    def _forward_save(self, block: BlockId, option: int, *, stops_early: bool) -> str:
        problem = self._forward(block, leaves_cursor=not stops_early)
        if problem:
            return problem
        num_options = len(self.chain.blocks[block].options)
        if not 0 <= option < num_options:
            return f"block {block} has {num_options} options"
        if block in self.saved:
            return f"block {block} holds a saved set already"
        if block > self.backward_next:
            return f"the backward of block {block} has run already"
        self.saved[block] = option
        return ""

    def _backward(self, block: BlockId, option: int) -> str:
        if self.sweep_next < self.num_blocks:
            return f"the first sweep has not run block {self.sweep_next} yet"
        if block != self.backward_next:
            return f"the next backward must be block {self.backward_next}'s"
        if block not in self.saved:
            return f"block {block} holds no saved set"
        if self.saved[block] != option:
            return f"block {block} holds the saved set of option {self.saved[block]}"
        del self.saved[block]
        self.backward_next -= 1
        self.cursor = None
        return ""


def _at(cursor: int | None) -> str:
    return "not set" if cursor is None else f"at boundary {cursor}"
