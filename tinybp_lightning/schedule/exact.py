"""Which of all schedules of a very short chain is the fastest within a budget? A best-first search (A*), no table.

The tables hold trees only: a block is replayed when its backward is due. Beside a heavy skip it can pay to replay it
sooner and to release what it starts from, which no tree does (`short` counts how often). On a few blocks all schedules
can be searched. A state is what is held: blocks swept, the boundary the backward stands at, cursor, stored boundaries
and saved sets; bytes alive follow from it. Sets are bit masks.

# Note [What is still to do]
A block without saved set must run once more. If its nearest start below is not its own boundary, all blocks between
run once more too, in full. That, each block counted once, and the backwards are a bound from below for the time that is
left. A state whose bound is not under the time already known is dropped, so what is found is the optimum, or nothing
faster exists. The search never gives up: its answer then depends on chain and budget alone, and a larger budget, which
allows every schedule of a smaller one, never makes it slower (beyond the last bits of a sum of floats).
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store

__all__ = ["faster_schedule", "is_searchable"]

_MAX_BLOCKS = 6
_MAX_SETS = 12
"""Bits of the mask of saved sets: the options of all blocks together."""
_NONE = -1
_STOPPED = -2
"""No cursor, and only the next backward may follow: a replay stopped early."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class _State:
    swept: int
    position: int
    cursor: int
    stored: int
    saved: int


def is_searchable(chain: Chain) -> bool:
    """Whether the chain is short enough, and has few enough options, for `faster_schedule`."""
    return len(chain.blocks) <= _MAX_BLOCKS and sum(len(block.options) for block in chain.blocks) <= _MAX_SETS


def faster_schedule(chain: Chain, *, budget_bytes: int, known_s: float) -> Schedule | None:
    """Return the fastest schedule within `budget_bytes`, or `None` if none takes less than `known_s` seconds."""
    return _Search(chain, budget_bytes).run(known_s * (1 - _ROUNDING))


class _Search:
    def __init__(self, chain: Chain, budget_bytes: int) -> None:
        self._chain, self._budget = chain, budget_bytes
        self._blocks, self._n = chain.blocks, len(chain.blocks)
        self._sets = [(b, o) for b, block in enumerate(chain.blocks) for o in range(len(block.options))]
        self._bit = {pair: 1 << k for k, pair in enumerate(self._sets)}
        self._of_block = [sum(self._bit[b, o] for o in range(len(k.options))) for b, k in enumerate(chain.blocks)]
        self._boundary = [sum(1 << s for s in boundary.storages) for boundary in chain.boundaries]
        gradients = [block.parameter_gradient_bytes for block in chain.blocks]
        self._standing = [
            boundary.gradient_bytes + sum(gradients[j:]) + (chain.tail_live_bytes if j else 0)
            for j, boundary in enumerate(chain.boundaries)
        ] + [0]
        self._masks: dict[int, int] = {}
        self._sets_held: dict[int, tuple[int, int]] = {}

    def run(self, limit_s: float) -> Schedule | None:
        start = _State(0, self._n + 1, _NONE, 1, 0)
        seconds, before = {start: 0.0}, dict[_State, tuple[_State, Action]]()
        queue, pushed = [(self._left_s(start), 0, 0.0, start)], 0
        while queue:
            _, _, now_s, state = heapq.heappop(queue)
            if now_s > seconds[state]:
                continue
            if state.position == 0:
                return self._schedule(state, before)
            for cost_s, action, after in self._moves(state):
                reached_s = now_s + cost_s
                if reached_s >= seconds.get(after, limit_s):
                    continue
                total_s = reached_s + self._left_s(after)
                if total_s < limit_s:
                    seconds[after], before[after] = reached_s, (state, action)
                    pushed += 1
                    # Among equals the latest first: it is deepest, and ends soonest.
                    heapq.heappush(queue, (total_s, -pushed, reached_s, after))
        return None

    def _schedule(self, state: _State, before: dict[_State, tuple[_State, Action]]) -> Schedule:
        actions: list[Action] = []
        while state in before:
            state, action = before[state]
            actions.append(action)
        return Schedule(num_blocks=self._n, actions=tuple(reversed(actions)))

    def _left_s(self, state: _State) -> float:
        """See Note [What is still to do]."""
        total_s = sum(block.forward_s for block in self._blocks[state.swept :])
        through = self._n
        for b in reversed(range(min(state.position, self._n))):
            block, kept = self._blocks[b], state.saved & self._of_block[b]
            if kept:
                total_s += block.options[self._sets[kept.bit_length() - 1][1]].backward_s
            elif b >= state.swept or b >= through:
                total_s += min(option.backward_s for option in block.options)
            else:
                total_s += min(min(option.replay_s, block.forward_s) + option.backward_s for option in block.options)
            if b >= state.swept:
                continue
            if b >= through:
                total_s += block.forward_s
            if not kept:
                through = min(through, self._start_below(state, b)) if through <= b else self._start_below(state, b)
            if b <= through:
                through = self._n
        return total_s

    def _start_below(self, state: _State, block: int) -> int:
        below = state.stored & ((2 << block) - 1)
        return max(below.bit_length() - 1, state.cursor if state.cursor <= block else 0)

    def _live(self, stored: int, cursor: int, next_cursor: int, saved: int) -> int:
        mask, total = self._held_sets(saved)
        for k in range(self._n + 1):
            if stored >> k & 1 or k in (cursor, next_cursor):
                mask |= self._boundary[k]
        return total + self._bytes(mask)

    def _bytes(self, mask: int) -> int:
        if mask not in self._masks:
            self._masks[mask] = sum(size for s, size in enumerate(self._chain.storage_bytes) if mask >> s & 1)
        return self._masks[mask]

    def _held_sets(self, saved: int) -> tuple[int, int]:
        if saved not in self._sets_held:
            held = [self._blocks[b].options[o] for k, (b, o) in enumerate(self._sets) if saved >> k & 1]
            mask = 0
            for option in held:
                for storage in option.storages:
                    mask |= 1 << storage
            own_bytes = sum(option.saved_bytes for option in held)
            self._sets_held[saved] = mask, own_bytes + self._chain.workspace_bytes
        return self._sets_held[saved]

    def _now(self, state: _State) -> int:
        return self._live(state.stored, state.cursor, _NONE, state.saved) + self._standing[state.position]

    def _moves(self, state: _State) -> Iterator[tuple[float, Action, _State]]:
        sweeping = state.swept < self._n
        if not sweeping:
            for k in range(1, self._n):
                if state.stored >> k & 1:
                    yield 0.0, Drop(BoundaryId(k)), replace(state, stored=state.stored & ~(1 << k))
            yield from self._backwards(state)
        if state.cursor == _STOPPED:
            return
        if 0 < state.cursor < self._n and not state.stored >> state.cursor & 1:
            yield 0.0, Store(BoundaryId(state.cursor)), replace(state, stored=state.stored | 1 << state.cursor)
        for block in (state.swept,) if sweeping else range(min(state.position, self._n)):
            if state.cursor == block or state.stored >> block & 1:
                yield from self._forwards(state, block)

    def _backwards(self, state: _State) -> Iterator[tuple[float, Action, _State]]:
        block = state.position - 1
        for option, costs in enumerate(self._blocks[block].options):
            bit = self._bit[block, option]
            if state.saved & bit:
                released = replace(state, cursor=_NONE)
                gradient_bytes = self._blocks[block].parameter_gradient_bytes
                peak_bytes = self._now(released) + costs.backward_peak_bytes + gradient_bytes
                after = replace(released, position=block, saved=state.saved & ~bit)
                if max(peak_bytes, self._now(after)) <= self._budget:
                    yield costs.backward_s, Backward(BlockId(block), OptionId(option)), after

    def _forwards(self, state: _State, block: int) -> Iterator[tuple[float, Action, _State]]:
        costs, sweeping = self._blocks[block], state.swept < self._n
        after = replace(state, swept=state.swept + sweeping, cursor=block + 1)
        plain = Forward(BlockId(block))
        # A forward that only reaches the boundary the backward stands at leads nowhere.
        if sweeping or block < state.position - 1:
            yield from self._ran(state, after, costs.forward_peak_bytes, costs.forward_s, plain)
        if state.saved & self._of_block[block]:
            return
        for option, kept in enumerate(costs.options):
            action = ForwardSave(BlockId(block), OptionId(option))
            saving = replace(after, saved=state.saved | self._bit[block, option])
            if not sweeping and block == state.position - 1:
                early = replace(saving, cursor=_STOPPED)
                yield from self._ran(state, early, kept.replay_peak_bytes, kept.replay_s, action)
            else:
                yield from self._ran(state, saving, kept.save_peak_bytes, costs.forward_s, action)

    def _ran(
        self, state: _State, after: _State, new_bytes: int, seconds: float, action: Action
    ) -> Iterator[tuple[float, Action, _State]]:
        """Offer a forward if its bytes fit, and those of the tail where it ends the first sweep."""
        both = self._live(state.stored, state.cursor, after.cursor, after.saved) + self._standing[state.position]
        if max(self._now(state) + new_bytes, both) > self._budget:
            return
        if state.swept < self._n == after.swept:
            tail_bytes = self._now(after) + self._chain.tail_peak_bytes
            after = replace(after, position=self._n, cursor=_NONE)
            if max(tail_bytes, self._now(after)) > self._budget:
                return
        yield seconds, action, after
