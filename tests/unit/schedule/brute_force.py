"""The fastest of all legal schedules, by an A* search over every state a schedule can reach within a budget.

An executable second opinion on the memory model: it shares no code with the simulator, the oracle or the planner. Sets
are bit masks. Left out are forwards beyond the next backward, which cannot help. The estimate of what is still to do
(forwards of the first sweep, one replay of every block that is not kept, the backwards) is never too high and falls by
no more than an action's time, so the first schedule found is a fastest one.
"""

import heapq
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from tinybp_lightning.graph import Chain

__all__ = ["fastest"]


class _State(NamedTuple):
    swept: int
    """Blocks the first sweep has run."""
    position: int
    """The boundary the backward stands at; one beyond the last until the loss."""
    cursor: int
    """-1: none; -2: none, and only the next backward may follow (a replay stopped early)."""
    stored: int
    saved: int
    """A mask with one bit for each option of each block."""


@cache
def fastest(chain: Chain, budget_bytes: int, *, is_persistent: bool = False) -> tuple[float, str] | None:
    """Return the least time and a schedule in its notation, or `None` where nothing fits.

    **Arguments:** `is_persistent`: of schedules in which a stored boundary stays until its block's saved set exists.
    """
    return _Search(chain, budget_bytes, is_persistent).run()


class _Search:
    def __init__(self, chain: Chain, budget_bytes: int, is_persistent: bool) -> None:
        self.is_persistent = is_persistent
        self.chain, self.budget, self.n = chain, budget_bytes, len(chain.blocks)
        self.boundary = [sum(1 << s for s in b.storages) for b in chain.boundaries]
        self.bits: list[tuple[int, int]] = []
        self.bit: dict[tuple[int, int], int] = {}
        for block in range(self.n):
            for option in range(len(chain.blocks[block].options)):
                self.bit[block, option] = len(self.bits)
                self.bits.append((block, option))
        gradients = [block.parameter_gradient_bytes for block in chain.blocks]
        self.standing = [
            chain.boundaries[j].gradient_bytes + sum(gradients[j:]) + (chain.tail_live_bytes if j else 0)
            for j in range(self.n + 1)
        ] + [0]
        self.held = cache(self._held)

    def _held(self, stored: int, cursors: tuple[int, ...], saved: int) -> int:
        mask, total = 0, self.chain.unmodelled_bytes
        for k in (*_ones(stored), *(c for c in cursors if c >= 0)):
            mask |= self.boundary[k]
        for index in _ones(saved):
            block, option = self.bits[index]
            saved_set = self.chain.blocks[block].options[option]
            total += saved_set.saved_bytes
            mask |= sum(1 << s for s in saved_set.storages)
        return total + sum(self.chain.storage_bytes[s] for s in _ones(mask))

    def live(self, state: _State) -> int:
        return self.held(state.stored, (state.cursor,), state.saved) + self.standing[state.position]

    def to_do(self, state: _State) -> float:
        blocks = self.chain.blocks
        total = sum(block.forward_s for block in blocks[state.swept :])
        for b, block in enumerate(blocks[: min(state.position, self.n)]):
            kept = [o for k, o in enumerate(block.options) if state.saved >> self.bit[b, k] & 1]
            if kept:
                total += kept[0].backward_s
            elif b >= state.swept:
                total += min(option.backward_s for option in block.options)
            else:
                total += min(option.replay_s + option.backward_s for option in block.options)
        return total

    def run(self) -> tuple[float, str] | None:
        start = _State(0, self.n + 1, -1, 1, 0)
        seconds, before = {start: 0.0}, dict[_State, tuple[_State, str]]()
        queue, done = [(self.to_do(start), start)], set[_State]()
        while queue:
            _, state = heapq.heappop(queue)
            if state in done:
                continue
            done.add(state)
            now = seconds[state]
            if state.position == 0:
                words = list[str]()
                while state in before:
                    state, word = before[state]
                    words.append(word)
                return now, " ".join(reversed(words))
            for cost, word, after in self.moves(state):
                if now + cost < seconds.get(after, float("inf")):
                    seconds[after], before[after] = now + cost, (state, word)
                    heapq.heappush(queue, (now + cost + self.to_do(after), after))
        return None

    def moves(self, state: _State) -> Iterator[tuple[float, str, _State]]:
        sweeping = state.swept < self.n
        if not sweeping:
            for k in _ones(state.stored & ~1):
                if self.is_persistent and k < state.position and not self.is_saved(state, k):
                    continue
                yield 0.0, f"D{k}", state._replace(stored=state.stored & ~(1 << k))
        if state.position <= self.n:
            yield from self.backwards(state)
        if state.cursor == -2:
            return
        if state.cursor > 0 and not state.stored >> state.cursor & 1:
            yield 0.0, f"S{state.cursor}", state._replace(stored=state.stored | 1 << state.cursor)
        for block in [state.swept] if sweeping else range(min(state.position, self.n)):
            if state.cursor == block or state.stored >> block & 1:
                yield from self.forwards(state, block)

    def is_saved(self, state: _State, block: int) -> bool:
        options = range(len(self.chain.blocks[block].options))
        return any(state.saved >> self.bit[block, option] & 1 for option in options)

    def backwards(self, state: _State) -> Iterator[tuple[float, str, _State]]:
        block = state.position - 1
        for option, costs in enumerate(self.chain.blocks[block].options):
            if state.saved >> self.bit[block, option] & 1:
                released = state._replace(cursor=-1)
                peak = self.live(released) + costs.backward_peak_bytes
                peak += self.chain.blocks[block].parameter_gradient_bytes
                after = released._replace(position=block, saved=state.saved & ~(1 << self.bit[block, option]))
                if max(peak, self.live(after)) <= self.budget:
                    yield costs.backward_s, _word("B", block, option), after

    def forwards(self, state: _State, block: int) -> Iterator[tuple[float, str, _State]]:
        costs = self.chain.blocks[block]
        swept = state.swept + (state.swept < self.n)
        after = state._replace(swept=swept, cursor=block + 1)
        yield from self.ran(state, after, costs.forward_peak_bytes, costs.forward_s, f"F{block}")
        if self.is_saved(state, block):
            return
        for option, saved in enumerate(costs.options):
            kept, word = after._replace(saved=state.saved | 1 << self.bit[block, option]), _word("K", block, option)
            if state.swept == self.n and block == state.position - 1:
                early = kept._replace(cursor=-2)
                yield from self.ran(state, early, saved.replay_peak_bytes, saved.replay_s, word)
            else:
                yield from self.ran(state, kept, saved.save_peak_bytes, costs.forward_s, word)

    def ran(
        self, state: _State, after: _State, new_bytes: int, seconds: float, word: str
    ) -> Iterator[tuple[float, str, _State]]:
        """Check the bytes of one forward, and of the loss where it follows."""
        both = self.held(state.stored, (state.cursor, after.cursor), after.saved) + self.standing[state.position]
        if max(self.live(state) + new_bytes, both) > self.budget:
            return
        if state.swept < self.n == after.swept:
            loss = self.live(after) + self.chain.tail_peak_bytes
            after = after._replace(position=self.n, cursor=-1)
            if max(loss, self.live(after)) > self.budget:
                return
        yield seconds, word, after


def _word(letter: str, block: int, option: int) -> str:
    return f"{letter}{block}.{option}" if option else f"{letter}{block}"


def _ones(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
