"""Which of all schedules of a very short chain is the fastest within a budget? A search of all that can be held.

The tables hold trees only: a block is replayed when its backward is due. Beside a heavy skip it can pay to replay it
sooner and to release what it starts from, which no tree does (`helped` counts how often). On a few blocks all schedules
can be searched. A *state* is the cursor, the stored boundaries and the saved sets, the last two as bit masks; a *stage*
is how far the first sweep has come, and then how far the backward. All states of a stage are moved on at once, by
arrays, until nothing new is reached; backwards lead to the next stage.

# Note [What is still to do]
A block without saved set must run once more. If its nearest start below is not its own boundary, all blocks between
run once more too, in full. That, each block counted once, and the backwards are a bound from below for the time that is
left. A state whose bound is not under the time already known is left out, so what is found is the optimum, or nothing
faster exists. The search never gives up: its answer depends on chain and budget alone, and a larger budget, which
allows every schedule of a smaller one, never makes it slower (beyond the last bits of a sum of floats).

# Note [No idle moves]
A boundary is dropped right after its last use, and stored for a use to come only; a forward that neither saves nor ends
in a store runs on. Every schedule can be brought to that order, and never holds more then.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId, StorageId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store

__all__ = ["faster_schedule", "is_searchable"]

_MAX_BLOCKS = 8
_MAX_SETS = 20
"""Bits of the mask of saved sets: the options of all blocks together."""
_MAX_STORAGES = 62
_NONE = -1
_STOPPED = -2
"""No cursor, and only the next backward may follow: a replay stopped early."""
_ROUNDING = 1e-9

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Flags = NDArray[np.bool_]


def is_searchable(chain: Chain) -> bool:
    """Whether the chain is short enough, and has few enough options and storages, for `faster_schedule`."""
    num_sets = sum(len(block.options) for block in chain.blocks)
    return len(chain.blocks) <= _MAX_BLOCKS and num_sets <= _MAX_SETS and len(chain.storage_bytes) <= _MAX_STORAGES


def faster_schedule(chain: Chain, *, budget_bytes: int, known_s: float) -> Schedule | None:
    """Return the fastest schedule within `budget_bytes`, or `None` if none takes less than `known_s` seconds."""
    return _Search(chain, budget_bytes, known_s * (1 - _ROUNDING)).run()


@dataclass(frozen=True, slots=True)
class _States:
    """States of one stage, the seconds in which each was reached, and the last line of its trail."""

    cursor: _Ints
    stored: _Ints
    saved: _Ints
    seconds: _Floats
    line: _Ints

    def __len__(self) -> int:
        return len(self.line)

    @property
    def key(self) -> _Ints:
        """One number for each state."""
        return ((self.cursor - _STOPPED) << _MAX_BLOCKS + 1 | self.stored) << _MAX_SETS | self.saved

    def at(self, which: _Flags | _Ints) -> "_States":
        return _States(self.cursor[which], self.stored[which], self.saved[which], self.seconds[which], self.line[which])

    def with_cursor(self, cursor: int) -> "_States":
        return replace(self, cursor=np.full(len(self), cursor))


@dataclass(frozen=True, slots=True)
class _Move:
    """What an action leads to; every state still has the line of the one it comes from."""

    action: Action
    after: _States


class _Stage:
    """The states reached in one stage, with the least seconds of each."""

    def __init__(self) -> None:
        self._keys, self._seconds = np.zeros(0, np.int64), np.zeros(0)

    def take(self, states: _States) -> _States:
        """Note the states that are new, or reached sooner than before, and return them, each once."""
        keys = np.concatenate([self._keys, states.key])
        seconds = np.concatenate([self._seconds, states.seconds])
        # Among equals what was known comes first: the sort is stable.
        order = np.lexsort((seconds, keys))
        best = order[np.diff(keys[order], prepend=-1) != 0]
        known = len(self._keys)
        self._keys, self._seconds = keys[best], seconds[best]
        return states.at(best[best >= known] - known)


class _Search:
    def __init__(self, chain: Chain, budget_bytes: int, limit_s: float) -> None:
        self._chain, self._budget, self._limit_s = chain, budget_bytes, limit_s
        self._blocks, self._n = chain.blocks, len(chain.blocks)
        sets = [(b, o) for b, block in enumerate(chain.blocks) for o in range(len(block.options))]
        self._bit = {pair: 1 << k for k, pair in enumerate(sets)}
        self._of_block = [sum(self._bit[b, o] for o in range(len(k.options))) for b, k in enumerate(chain.blocks)]
        masks = [_mask(boundary.storages) for boundary in chain.boundaries]
        # The cursors `_STOPPED` and `_NONE`, -2 and -1, index from the end: no storages.
        self._boundary = np.array([*masks, 0, 0], np.int64)
        options = [chain.blocks[b].options[o] for b, o in sets]
        self._of_stored = _of_subsets(masks, np.bitwise_or)
        self._of_saved = _of_subsets([_mask(option.storages) for option in options], np.bitwise_or)
        self._private_bytes = _of_subsets([option.saved_bytes for option in options], np.add)
        self._highest = np.array([max(0, number.bit_length() - 1) for number in range(2 << self._n)], np.int64)
        gradients = [block.parameter_gradient_bytes for block in chain.blocks]
        self._standing = [chain.workspace_bytes] * (self._n + 2)
        for j, boundary in enumerate(chain.boundaries):
            self._standing[j] += boundary.gradient_bytes + sum(gradients[j:]) + (chain.tail_live_bytes if j else 0)
        self._trail: list[tuple[_Ints, _Ints]] = []
        self._num_lines = 0
        self._actions: dict[Action, int] = {}

    def run(self) -> Schedule | None:
        one = np.ones(1, np.int64)
        states = _States(0 * one, one, 0 * one, np.zeros(1), -one)
        for block in range(self._n):
            if block:
                states = _joined([states, self._noted(_Stage(), [self._stores(states)], block, self._n + 1)])
            moves = list(self._forwards(states, block, self._n + 1))
            states = self._noted(_Stage(), moves, block + 1, self._n + (block + 1 < self._n))
        for position in range(self._n, 0, -1):
            states = self._reversed(states, position)
        return self._schedule(int(states.line[states.seconds.argmin()])) if len(states) else None

    def _reversed(self, states: _States, position: int) -> _States:
        """Return the states after the backward of block `position - 1`, from those after the backward before it."""
        stage, ready = _Stage(), list[_Move]()
        states = stage.take(states)
        while len(states):
            ready += self._backwards(states, position)
            states = self._noted(stage, list(self._replays(states, position)), self._n, position)
        return self._noted(_Stage(), ready, self._n, position - 1)

    def _noted(self, stage: _Stage, moves: Sequence[_Move], swept: int, position: int) -> _States:
        """Return the states that moves lead to, as far as it is worth going on from them, with lines of their own."""
        after = _joined([move.after for move in moves])
        parents, here = after.line, np.arange(len(after))
        actions = [self._actions.setdefault(move.action, len(self._actions)) for move in moves]
        taken = np.repeat(np.array(actions, np.int64), [len(move.after) for move in moves])
        after = replace(after, line=here)
        after = stage.take(after.at(after.seconds + self._left_s(after, swept, position) < self._limit_s))
        self._trail.append((parents[after.line], taken[after.line]))
        first, self._num_lines = self._num_lines, self._num_lines + len(after)
        return replace(after, line=np.arange(first, self._num_lines))

    def _schedule(self, line: int) -> Schedule:
        parents = np.concatenate([parents for parents, _ in self._trail])
        taken = np.concatenate([taken for _, taken in self._trail])
        known, actions = list(self._actions), list[Action]()
        while line >= 0:
            actions.append(known[int(taken[line])])
            line = int(parents[line])
        return Schedule(num_blocks=self._n, actions=tuple(reversed(actions)))

    def _left_s(self, states: _States, swept: int, position: int) -> _Floats:
        """See Note [What is still to do]."""
        total_s = np.full(len(states), sum(block.forward_s for block in self._blocks[swept:]), np.float64)
        through = np.full(len(states), self._n)
        for b in reversed(range(min(position, self._n))):
            block, kept, passed = self._blocks[b], states.saved & self._of_block[b] > 0, b >= through
            backward_s = np.full(len(states), min(option.backward_s for option in block.options))
            if b < swept:
                again_s = [min(option.replay_s, block.forward_s) + option.backward_s for option in block.options]
                backward_s[~passed] = min(again_s)
                total_s[passed] += block.forward_s
                below = self._highest[states.stored & ((2 << b) - 1)]
                start = np.maximum(below, np.where(states.cursor <= b, states.cursor, 0))
                needed = np.where(passed, np.minimum(through, start), start)
                through = np.where(kept, through, needed)
                through[through >= b] = self._n
            for o, option in enumerate(block.options):
                backward_s[states.saved & self._bit[b, o] > 0] = option.backward_s
            total_s += backward_s
        return total_s

    def _live(self, states: _States, saved: _Ints, next_cursor: int = _NONE) -> _Ints:
        """The bytes of all that is held, and of boundary `next_cursor` beside."""
        mask = self._of_stored[states.stored] | self._boundary[states.cursor] | self._of_saved[saved]
        mask |= self._boundary[next_cursor]
        live = self._private_bytes[saved]
        for storage, size in enumerate(self._chain.storage_bytes):
            live += (mask >> storage & 1) * size
        return live

    def _stores(self, states: _States) -> _Move:
        """Store the boundary at the cursor, the same for all."""
        cursor = int(states.cursor[0]) if len(states) else 1
        return _Move(Store(BoundaryId(cursor)), replace(states, stored=states.stored | 1 << cursor))

    def _replays(self, states: _States, position: int) -> Iterator[_Move]:
        """Yield all moves after the first sweep but backwards. See Note [No idle moves]."""
        for k in range(1, self._n):
            used = (states.cursor == k + 1) | ((states.cursor == _STOPPED) & (k == position - 1))
            used = states.at(used & (states.stored >> k & 1 > 0))
            if len(used):
                yield _Move(Drop(BoundaryId(k)), replace(used, stored=used.stored & ~(1 << k)))
            arrived = states.at((states.cursor == k) & (states.stored >> k & 1 == 0))
            if len(arrived):
                yield self._stores(arrived)
        idle = self._idle(states)
        for block in range(position):
            may = (states.stored >> block & 1 > 0) & (states.cursor != _STOPPED) & ~idle
            starts = states.at(may | (states.cursor == block))
            if len(starts):
                yield from self._forwards(starts, block, position)

    def _idle(self, states: _States) -> _Flags:
        """Whether the last forward was for nothing, unless its boundary is stored or run on from."""
        idle = np.zeros(len(states), np.bool_)
        for k in range(1, self._n):
            idle |= (states.cursor == k) & (states.saved & self._of_block[k - 1] == 0) & (states.stored >> k & 1 == 0)
        return idle

    def _backwards(self, states: _States, position: int) -> Iterator[_Move]:
        block = position - 1
        states = states.at(~self._idle(states) & (states.stored < max(2, 1 << block)))
        for o, option in enumerate(self._blocks[block].options):
            bit = self._bit[block, o]
            ready = states.at(states.saved & bit > 0).with_cursor(_NONE)
            after = replace(ready, saved=ready.saved & ~bit, seconds=ready.seconds + option.backward_s)
            own_bytes = option.backward_peak_bytes + self._blocks[block].parameter_gradient_bytes
            during = self._live(ready, ready.saved) + self._standing[position] + own_bytes
            then = self._live(after, after.saved) + self._standing[block]
            yield _Move(Backward(BlockId(block), OptionId(o)), after.at(np.maximum(during, then) <= self._budget))

    def _forwards(self, states: _States, block: int, position: int) -> Iterator[_Move]:
        """Yield the runs of `block`, with and without saving; `position` beyond the last: in the first sweep."""
        costs, sweeping = self._blocks[block], position > self._n
        # A forward that only reaches the boundary the backward stands at leads nowhere.
        if sweeping or block < position - 1:
            yield self._ran(
                states, states, costs.forward_peak_bytes, costs.forward_s, Forward(BlockId(block)), position
            )
        states = states.at(states.saved & self._of_block[block] == 0)
        stops = block == position - 1
        for o, option in enumerate(costs.options):
            action = ForwardSave(BlockId(block), OptionId(o))
            saving = replace(states, saved=states.saved | self._bit[block, o])
            peak_bytes = option.replay_peak_bytes if stops else option.save_peak_bytes
            yield self._ran(states, saving, peak_bytes, option.replay_s if stops else costs.forward_s, action, position)

    def _ran(
        self,
        before: _States,
        after: _States,
        new_bytes: int,
        seconds: float,
        action: Forward | ForwardSave,
        position: int,
    ) -> _Move:
        """The run where its bytes fit, and those of the tail where it ends the first sweep."""
        standing, sweeping = self._standing[position], position > self._n
        reached = _STOPPED if action.block + 1 == position else action.block + 1
        both = self._live(before, after.saved, reached) + standing
        fits = np.maximum(self._live(before, before.saved) + standing + new_bytes, both) <= self._budget
        after = replace(after.at(fits), seconds=after.seconds[fits] + seconds).with_cursor(reached)
        if not sweeping or reached < self._n:
            return _Move(action, after)
        in_tail = self._live(after, after.saved) + standing + self._chain.tail_peak_bytes
        after = after.with_cursor(_NONE)
        then = self._live(after, after.saved) + self._standing[self._n]
        return _Move(action, after.at(np.maximum(in_tail, then) <= self._budget))


def _mask(storages: Sequence[StorageId]) -> int:
    return sum(1 << int(storage) for storage in storages)


def _of_subsets(values: Sequence[int], combine: np.ufunc) -> _Ints:
    """Return what `combine` makes of every subset of `values`, by the subset's bit mask."""
    combined = np.zeros(1, np.int64)
    for value in values:
        combined = np.concatenate([combined, combine(combined, value)])
    return combined


def _joined(parts: Sequence[_States]) -> _States:
    if not parts:
        nothing = np.zeros(0, np.int64)
        return _States(nothing, nothing, nothing, np.zeros(0), nothing)
    columns = zip(*((p.cursor, p.stored, p.saved, p.seconds, p.line) for p in parts), strict=True)
    cursor, stored, saved, seconds, line = (np.concatenate(column) for column in columns)
    return _States(cursor, stored, saved, seconds, line)
