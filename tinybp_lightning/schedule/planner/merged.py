"""What does a chain look like when neighbouring blocks are kept and reversed as one? A shorter chain, to plan with.

The table of schedules with helpers (`helped`) grows with the fourth power of the number of blocks. Most blocks of a
long chain are small beside the largest: nothing is lost when a norm is kept together with what follows it. A schedule
of the merged chain becomes one of the chain by `expand`; its bytes are estimates from above, its seconds are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import assert_never

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import BlockId, BoundaryId, StorageId
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

__all__ = ["Merged", "merge"]


@dataclass(frozen=True, slots=True)
class Merged:
    """A chain whose block `g` stands for the blocks `starts[g] .. starts[g + 1] - 1` of another."""

    chain: Chain
    starts: tuple[int, ...]

    def expand(self, schedule: Schedule) -> Schedule:
        """Return the schedule of the long chain that does what `schedule` does on the merged one.

        **Raises:** `ScheduleError` when it offloads.
        """
        actions: list[Action] = []
        for action in schedule.actions:
            match action:
                case Forward(group):
                    actions += [Forward(block) for block in self._blocks(group)]
                case ForwardSave(group, option):
                    actions += [ForwardSave(block, option) for block in self._blocks(group)]
                case Backward(group, option):
                    actions += [Backward(block, option) for block in reversed(self._blocks(group))]
                case Store(boundary):
                    actions.append(Store(BoundaryId(self.starts[boundary])))
                case Drop(boundary):
                    actions.append(Drop(BoundaryId(self.starts[boundary])))
                case Offload() | Reload():
                    raise ScheduleError(f"`{action}` cannot be expanded: give a schedule that does not offload.")
                case _:
                    assert_never(action)
        return Schedule(num_blocks=self.starts[-1], actions=tuple(actions))

    def _blocks(self, group: int) -> list[BlockId]:
        return [BlockId(block) for block in range(self.starts[group], self.starts[group + 1])]


def merge(chain: Chain, starts: Sequence[int]) -> Merged:
    """Return `chain` with the blocks between neighbouring `starts` merged into one.

    **Arguments:** `starts`: ascending boundaries, from 0 to the number of blocks.
    """
    outer = frozenset(s for start in starts for s in chain.boundaries[start].storages)
    blocks = [_Group(chain, u, v, outer).block() for u, v in pairwise(starts)]
    boundaries = tuple(chain.boundaries[start] for start in starts)
    merged = Chain(
        storage_bytes=chain.storage_bytes,
        blocks=tuple(blocks),
        boundaries=boundaries,
        tail_peak_bytes=chain.tail_peak_bytes,
        tail_live_bytes=chain.tail_live_bytes,
        workspace_bytes=chain.workspace_bytes,
    )
    return Merged(merged, tuple(starts))


@dataclass(frozen=True, slots=True)
class _Group:
    """Blocks `first .. end - 1`; `outer` are the storages of the boundaries that stay."""

    chain: Chain
    first: int
    end: int
    outer: frozenset[StorageId]

    def block(self) -> Block:
        blocks = self.chain.blocks[self.first : self.end]
        if len(blocks) == 1 and self._option(0).saved_bytes == blocks[0].options[0].saved_bytes:
            return blocks[0]
        num_options = min(len(block.options) for block in blocks)
        here = set(self.chain.boundaries[self.first].storages)
        peaks = [
            self._bytes(set(boundary.storages) - here) + block.forward_peak_bytes
            for boundary, block in zip(self.chain.boundaries[self.first :], blocks, strict=False)
        ]
        return Block(
            name=blocks[0].name,
            signature=" ".join(block.signature for block in blocks),
            forward_s=sum(block.forward_s for block in blocks),
            forward_peak_bytes=max(peaks),
            parameter_gradient_bytes=sum(block.parameter_gradient_bytes for block in blocks),
            options=tuple(self._option(o) for o in range(num_options)),
        )

    def _option(self, number: int) -> SavedSet:
        blocks = self.chain.blocks[self.first : self.end]
        options = [block.options[number] for block in blocks]
        boundaries = self.chain.boundaries[self.first : self.end + 1]
        storages = {s for option in options for s in option.storages}
        here, held, private_bytes = set(boundaries[0].storages), set[StorageId](), 0
        save_peak = replay_peak = 0
        for boundary, after, option in zip(boundaries, boundaries[1:], options, strict=False):
            alive = held | set(boundary.storages)
            before = private_bytes + self._bytes(alive - here)
            private_bytes += option.saved_bytes
            held |= set(option.storages)
            # While the saved set is taken over, what the block read is still alive.
            replay = max(before + option.replay_peak_bytes, private_bytes + self._bytes((alive | held) - here))
            saves = self._bytes((alive | held | set(after.storages)) - here)
            save = max(before + option.save_peak_bytes, private_bytes + saves)
            replay_peak = max(save_peak, replay)
            save_peak = max(save_peak, save)
        inner_bytes = self._bytes(storages - self.outer)
        return SavedSet(
            name=options[0].name,
            storages=tuple(sorted(storages & self.outer)),
            saved_bytes=private_bytes + inner_bytes,
            save_peak_bytes=save_peak,
            replay_s=sum(block.forward_s for block in blocks[:-1]) + options[-1].replay_s,
            replay_peak_bytes=replay_peak,
            backward_s=sum(option.backward_s for option in options),
            backward_peak_bytes=self._backward_peak_bytes(options, boundaries),
        )

    def _backward_peak_bytes(self, options: list[SavedSet], boundaries: tuple[Boundary, ...]) -> int:
        """The most new bytes during the backwards; what a backward before has released is taken off."""
        peak_bytes, released_bytes, gradients_bytes = 0, 0, 0
        for k in reversed(range(len(options))):
            gradient_bytes = boundaries[k + 1].gradient_bytes - boundaries[-1].gradient_bytes + gradients_bytes
            peak_bytes = max(peak_bytes, options[k].backward_peak_bytes + gradient_bytes - released_bytes)
            released_bytes += options[k].saved_bytes
            earlier = {s for option in options[:k] for s in option.storages}
            later = {s for option in options[k + 1 :] for s in option.storages}
            released_bytes += self._bytes(set(options[k].storages) - earlier - later - self.outer)
        return peak_bytes

    def _bytes(self, storages: set[StorageId] | frozenset[StorageId]) -> int:
        return sum(self.chain.storage_bytes[s] for s in storages)
