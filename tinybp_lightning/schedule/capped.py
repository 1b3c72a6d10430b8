"""Below which time can no schedule go when bytes come in whole pieces? A second bound: short chains, tight budgets.

Prices (`bound`) let a schedule be a mixture: three quarters of it store a boundary, one quarter does not. Where only
a few boundaries fit, that is far from what can be done. This program instead gives every segment the bytes left, and
what is held from below (`held`), and counts each storage exactly once. Bytes left are rounded up to slots and what is
held down, so the result stays a lower bound. It takes `n^4 / 24` times the number of slots and of held sets in steps:
`certificate` uses it for short chains only.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.held import HeldSets
from tinybp_lightning.schedule.relaxed import RelaxedChain

__all__ = ["affordable_slots", "capped_bound_s"]

_Times = NDArray[np.float64]
_INFINITE = float(np.inf)
_SAFE = 1e-9
"""Slots that a quotient may be off by rounding: always in favour of a lower bound."""
_UNITS_TRIED = 400
_MAX_SETS = 8
_WORK = 8e8
"""About how many elementary steps a bound may take: two or three seconds."""
_MIN_SLOTS, _MAX_SLOTS = 24, 1000


def affordable_slots(relaxed: RelaxedChain) -> int:
    """Return how many slots a bound of this chain can have in a few seconds; 0 if too few for a useful bound."""
    n, held = relaxed.num_blocks, HeldSets(relaxed.chain, max_sets=_MAX_SETS)
    # At each boundary and for each of its held sets: every end with every fork before it.
    num_forks = sum(held.count(i) * (n - i + 1) ** 3 / 6 for i in range(n))
    num_slots = min(_MAX_SLOTS, int(_WORK / num_forks))
    return num_slots if num_slots >= _MIN_SLOTS else 0


def capped_bound_s(relaxed: RelaxedChain, *, num_slots: int, max_sets: int = _MAX_SETS) -> float:
    """Return a lower bound on the seconds of every legal schedule within the budget; infinite if there is none.

    **Arguments:** `num_slots`: about how many whole pieces the bytes left are counted in. `max_sets`: how many sets
    of storages held from below are told apart at each boundary; fewer are quicker and looser.
    """
    return _Capped(relaxed, HeldSets(relaxed.chain, max_sets=max_sets), num_slots=num_slots).bound_s()


class _Capped:
    """Arrays end in an axis of slots; the last slot has all bytes left, the first what the cheapest backward needs."""

    def __init__(self, relaxed: RelaxedChain, held: HeldSets, *, num_slots: int) -> None:
        lowest_bytes = min([held.loss_need_bytes, *held.lowest_need_bytes])
        span_bytes = relaxed.left_bytes - lowest_bytes
        self._relaxed = relaxed
        self._held = held
        self._unit = _unit_bytes(held, span_bytes, num_slots)
        self._top = max(0, int(span_bytes / self._unit) + 1)

    def bound_s(self) -> float:
        n = self._relaxed.num_blocks
        last = np.full((n + 1, n + 1, self._top + 1), _INFINITE)
        last_sweep = np.full((n + 1, self._top + 1), _INFINITE)
        last_sweep[n, self._first_slot(self._held.loss_need_bytes) :] = 0.0
        after = [(last, last_sweep)] * self._held.count(n)
        for i in reversed(range(n)):
            after = [self._fill(i, index, after) for index in range(self._held.count(i))]
        return float(after[0][1][0, -1])

    def _first_slot(self, need_bytes: float) -> int:
        """The first slot whose bytes left, rounded up, cover `need_bytes`."""
        if need_bytes > self._relaxed.left_bytes:
            return self._top + 1
        return max(0, self._top - int((self._relaxed.left_bytes - need_bytes) / self._unit + _SAFE))

    def _shift(self, held_bytes: int) -> int:
        return min(self._top + 1, int(held_bytes / self._unit))

    def _fill(self, i: int, index: int, after: list[tuple[_Times, _Times]]) -> tuple[_Times, _Times]:
        """The costs from boundary `i` with its set `index` held from below, given those from boundary `i + 1`."""
        n, width = self._relaxed.num_blocks, self._top + 1
        segment, sweep = np.full((n + 1, n + 1, width), _INFINITE), np.full((n + 1, width), _INFINITE)
        forward_s = float(self._relaxed.forward_s[i])
        target, held_bytes = self._held.after_pass(i, index)
        shift = self._shift(held_bytes)
        segment[i + 1 :, i + 2 :, shift:] = after[target][0][i + 1 :, i + 2 :, : width - shift] + forward_s
        sweep[i + 1 :, shift:] = after[target][1][i + 1 :, : width - shift] + forward_s
        self._offer_keeps(i, index, after, segment, sweep)
        for q in range(i + 1, n + 1):
            for first, last, target, shift in self._holds(i, index, q):
                rest = after[target][1][q, : width - shift] + forward_s
                forked_sweep = segment[first:last, q, shift:] + rest
                np.minimum(sweep[first:last, shift:], forked_sweep, out=sweep[first:last, shift:])
                if q < n:
                    top = after[target][0][q, q + 1 :, : width - shift] + forward_s
                    lows = segment[first:last, q + 1 :, shift:]
                    np.minimum(lows, segment[first:last, q, None, shift:] + top, out=lows)
        return segment, sweep

    def _offer_keeps(
        self, i: int, index: int, after: list[tuple[_Times, _Times]], segment: _Times, sweep: _Times
    ) -> None:
        width, forward_s = self._top + 1, float(self._relaxed.forward_s[i])
        for keep in self._held.keeps(i, index, left_bytes=self._relaxed.left_bytes):
            first = self._first_slot(keep.need_bytes)
            segment[i, i + 1, first:] = np.minimum(segment[i, i + 1, first:], keep.replay_s + keep.backward_s)
            shift = self._shift(keep.held_bytes)
            first = max(first, shift)
            if first >= width:
                continue
            kept_s = forward_s + keep.backward_s
            rest, rest_sweep = after[keep.target]
            part = rest[i + 1, i + 2 :, first - shift : width - shift] + kept_s
            np.minimum(segment[i, i + 2 :, first:], part, out=segment[i, i + 2 :, first:])
            part_sweep = rest_sweep[i + 1, first - shift : width - shift] + kept_s
            np.minimum(sweep[i, first:], part_sweep, out=sweep[i, first:])

    def _holds(self, i: int, index: int, q: int) -> Iterator[tuple[int, int, int, int]]:
        """Ranges of `low` for which boundary `i`, held for `low .. q-1`, leads to one set and takes as many slots."""
        lows = self._held.after_hold(i, index, q)
        starts = [0, *(k for k in range(1, len(lows)) if lows[k] != lows[k - 1]), len(lows)]
        for a, b in pairwise(starts):
            target, held_bytes = lows[a]
            if (shift := self._shift(held_bytes)) <= self._top:
                yield i + a, i + b, target, shift


def _unit_bytes(held: HeldSets, span_bytes: float, num_slots: int) -> float:
    """Return a slot of `span / num_slots` bytes to twice that, in which what is held is just above whole slots."""
    wanted = max(1, int(span_bytes / num_slots))
    sizes, counts = np.unique(np.array(held.sizes_bytes, np.int64), return_counts=True)
    units = np.unique(np.linspace(wanted, 2 * wanted, _UNITS_TRIED).astype(np.int64))
    lost = (sizes % units[:, None] * counts).sum(axis=1)
    return float(units[int(lost.argmin())])
