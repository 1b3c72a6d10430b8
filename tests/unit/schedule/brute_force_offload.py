"""The fastest of all legal schedules that may offload, by an A* search over every state within a budget.

A second opinion on the memory model with a link; it shares no code with the simulator, the oracle or any planner, and
follows Note [Two directions of one link]. Sets are bit masks, and times of copies count from now. Left out is what
cannot help: forwards beyond the next backward, drops during the first sweep, and sending out or dropping what is still
on its way. Without the last, copies could go to and fro while no time passes.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from tinybp_lightning.graph import Chain

__all__ = ["fastest_with_offload"]


class _State(NamedTuple):
    swept: int
    position: int
    """The boundary the backward stands at; one beyond the last until the loss."""
    cursor: int
    """-1: none; -2: none, and only the next backward may follow (a replay stopped early)."""
    stored: int
    host: int
    saved: frozenset[tuple[int, int]]
    leaving: tuple[tuple[float, int], ...] = ()
    """Seconds until the storages of a mask are let go of."""
    arriving: tuple[tuple[int, float], ...] = ()
    out_busy_s: float = 0.0
    back_busy_s: float = 0.0


def fastest_with_offload(chain: Chain, budget_bytes: int, link_bytes_per_s: float, *, limit_s: float) -> float | None:
    """Return the seconds of a fastest schedule within `budget_bytes`, or `None` where none takes `limit_s` or less."""
    return _Search(chain, budget_bytes, link_bytes_per_s).run(limit_s)


class _Search:
    def __init__(self, chain: Chain, budget_bytes: int, rate: float) -> None:
        self.chain, self.budget, self.rate, self.n = chain, budget_bytes, rate, len(chain.blocks)
        self.boundary = [sum(1 << s for s in b.storages if chain.storage_bytes[s]) for b in chain.boundaries]
        self.standing = [
            chain.unmodelled_bytes
            + (chain.tail_live_bytes + b.gradient_bytes if i else 0)
            + sum(block.parameter_gradient_bytes for block in chain.blocks[i:])
            for i, b in enumerate(chain.boundaries)
        ]
        self.standing.append(chain.unmodelled_bytes)

    def size(self, mask: int) -> int:
        return sum(self.chain.storage_bytes[s] for s in _ones(mask))

    def held(self, state: _State) -> int:
        """Return the storages held for another reason than a copy out."""
        mask = 0
        for k in [*_ones(state.stored), *([state.cursor] if state.cursor >= 0 else [])]:
            mask |= self.boundary[k]
        for block, option in state.saved:
            mask |= sum(1 << s for s in self.chain.blocks[block].options[option].storages)
        return mask

    def live(self, state: _State, *, beside: int = 0) -> int:
        mask = self.held(state) | beside
        for _, leaves in state.leaving:
            mask |= leaves
        private = sum(self.chain.blocks[b].options[o].saved_bytes for b, o in state.saved)
        return self.size(mask) + private + self.standing[state.position]

    def run(self, limit_s: float) -> float | None:
        start = _State(0, self.n + 1, -1, 1, 0, frozenset())
        seconds, done = {start: 0.0}, set[_State]()
        queue, count = [(self.to_do(start), 0, start)], 0
        while queue:
            _, _, state = heapq.heappop(queue)
            if state in done:
                continue
            done.add(state)
            now = seconds[state]
            if state.position == 0:
                return now
            for cost, after in self.moves(state):
                # Copies to and fro could go on for ever.
                if now + cost + self.to_do(after) <= limit_s and now + cost < seconds.get(after, float("inf")):
                    seconds[after], count = now + cost, count + 1
                    heapq.heappush(queue, (now + cost + self.to_do(after), count, after))
        return None

    def to_do(self, state: _State) -> float:
        total = sum(block.forward_s for block in self.chain.blocks[state.swept :])
        kept = dict(state.saved)
        for b, block in enumerate(self.chain.blocks[: min(state.position, self.n)]):
            if b in kept:
                total += block.options[kept[b]].backward_s
            else:
                again = b < state.swept
                total += min(o.backward_s + (o.replay_s if again else 0.0) for o in block.options)
        return total

    def moves(self, state: _State) -> Iterator[tuple[float, _State]]:
        if state.position <= self.n:
            yield from self.backwards(state)
        if state.swept == self.n:
            yield from self.drops(state)
        if state.cursor == -2:
            return
        yield from self.keep_and_move(state)
        for block in [state.swept] if state.swept < self.n else range(min(state.position, self.n)):
            if state.cursor == block:
                yield from self.forwards(state, block, 0.0)
            elif state.stored >> block & 1:
                waited = max((s for k, s in state.arriving if self.boundary[block] >> k & 1), default=0.0)
                yield from self.forwards(_passed(state, waited), block, waited)

    def is_arriving(self, state: _State, k: int) -> bool:
        return any(self.boundary[k] >> storage & 1 for storage, _ in state.arriving)

    def drops(self, state: _State) -> Iterator[tuple[float, _State]]:
        for k in _ones(state.stored & ~1):
            if not self.is_arriving(state, k):
                yield 0.0, state._replace(stored=state.stored & ~(1 << k))

    def keep_and_move(self, state: _State) -> Iterator[tuple[float, _State]]:
        anywhere = state.stored | state.host
        if state.cursor > 0 and not anywhere >> state.cursor & 1:
            yield 0.0, state._replace(stored=state.stored | 1 << state.cursor)
        for k in _ones(state.stored & ~1):
            yield from self.offload(state, k)
        for k in _ones(state.host):
            yield from self.reload(state, k)

    def offload(self, state: _State, k: int) -> Iterator[tuple[float, _State]]:
        on_host = 0
        for other in _ones(state.host):
            on_host |= self.boundary[other]
        moved = self.boundary[k] & ~on_host
        if any(mask & moved for _, mask in state.leaving) or self.is_arriving(state, k):
            return
        end = state.out_busy_s + self.size(moved) / self.rate
        leaving = tuple(sorted((*state.leaving, (end, moved)))) if moved else state.leaving
        yield (
            0.0,
            state._replace(stored=state.stored & ~(1 << k), host=state.host | 1 << k, leaving=leaving, out_busy_s=end),
        )

    def reload(self, state: _State, k: int) -> Iterator[tuple[float, _State]]:
        wanted = self.boundary[k] & ~self.held(state)
        waited = max((s for s, mask in state.leaving if mask & wanted), default=0.0)
        state = _passed(state, waited)
        present = self.held(state)
        for _, mask in state.leaving:
            present |= mask
        missing = self.boundary[k] & ~present
        end = state.back_busy_s + self.size(missing) / self.rate if missing else state.back_busy_s
        after = state._replace(
            stored=state.stored | 1 << k,
            host=state.host & ~(1 << k),
            arriving=tuple(sorted((*state.arriving, *((s, end) for s in _ones(missing))))),
            back_busy_s=end,
        )
        if self.live(after) <= self.budget:
            yield waited, after

    def backwards(self, state: _State) -> Iterator[tuple[float, _State]]:
        block = state.position - 1
        for option, costs in enumerate(self.chain.blocks[block].options):
            if (block, option) in state.saved:
                released = state._replace(cursor=-1)
                peak = self.live(released) + costs.backward_peak_bytes
                peak += self.chain.blocks[block].parameter_gradient_bytes
                after = released._replace(position=block, saved=state.saved - {(block, option)})
                if max(peak, self.live(after)) <= self.budget:
                    yield costs.backward_s, _passed(after, costs.backward_s)

    def forwards(self, state: _State, block: int, waited: float) -> Iterator[tuple[float, _State]]:
        costs = self.chain.blocks[block]
        swept = state.swept + (state.swept < self.n)
        after = state._replace(swept=swept, cursor=block + 1)
        yield from self.ran(state, after, costs.forward_peak_bytes, costs.forward_s, waited)
        if block in dict(state.saved):
            return
        for option, saved in enumerate(costs.options):
            kept = after._replace(saved=state.saved | {(block, option)})
            if state.swept == self.n and block == state.position - 1:
                early = kept._replace(cursor=-2)
                yield from self.ran(state, early, saved.replay_peak_bytes, saved.replay_s, waited)
            else:
                yield from self.ran(state, kept, saved.save_peak_bytes, costs.forward_s, waited)

    def ran(
        self, state: _State, after: _State, new_bytes: int, seconds: float, waited: float
    ) -> Iterator[tuple[float, _State]]:
        both = self.live(after, beside=self.boundary[state.cursor] if state.cursor >= 0 else 0)
        if max(self.live(state) + new_bytes, both) > self.budget:
            return
        if state.swept < self.n == after.swept:
            loss = self.live(after) + self.chain.tail_peak_bytes
            after = after._replace(position=self.n, cursor=-1)
            if max(loss, self.live(after)) > self.budget:
                return
        yield waited + seconds, _passed(after, seconds)


def _passed(state: _State, seconds: float) -> _State:
    """Return the state after `seconds`: what has left or arrived is no longer on its way."""
    return state._replace(
        leaving=tuple((s - seconds, mask) for s, mask in state.leaving if s > seconds),
        arriving=tuple((k, s - seconds) for k, s in state.arriving if s > seconds),
        out_busy_s=max(0.0, state.out_busy_s - seconds),
        back_busy_s=max(0.0, state.back_busy_s - seconds),
    )


def _ones(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
