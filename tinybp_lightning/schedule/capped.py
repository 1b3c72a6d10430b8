"""Below which time can no schedule go when bytes come in whole pieces? A second bound: short chains, tight budgets.

Prices (`bound`) let a schedule be a mixture: three quarters of it store a boundary, one quarter does not. Where only
a few boundaries fit, that is far from what can be done. This program instead gives every segment the bytes left and
counts each thing held against them, for the relaxed chain of `relaxed`. Bytes left are rounded up to slots and
weights down, so the result stays a lower bound. It takes `n^4 / 24` times the number of slots in steps: `certificate`
uses it for short chains only.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.relaxed import RelaxedChain

__all__ = ["capped_bound_s"]

_Floats = NDArray[np.float64]
_INFINITE = float(np.inf)
_SAFE = 1e-9
"""Slots that a quotient may be off by rounding: always in favour of a lower bound."""


def capped_bound_s(relaxed: RelaxedChain, *, num_slots: int) -> float:
    """Return a lower bound on the seconds of every legal schedule within the budget; infinite if there is none."""
    return _Capped(relaxed, num_slots=num_slots).bound_s()


class _Capped:
    """Arrays end in an axis of slots; the last slot has all bytes left, the first what the cheapest backward needs."""

    def __init__(self, relaxed: RelaxedChain, *, num_slots: int) -> None:
        needs = [option.backward_bytes for options in relaxed.options for option in options]
        lowest_bytes = min([relaxed.loss_bytes, *needs])
        self._relaxed = relaxed
        self._unit = max(1.0, (relaxed.left_bytes - lowest_bytes) / num_slots)
        self._top = int((relaxed.left_bytes - lowest_bytes) / self._unit) + 1

    def bound_s(self) -> float:
        n = self._relaxed.num_blocks
        segment = np.full((n + 1, n + 1, self._top + 1), _INFINITE)
        sweep = np.full((n + 1, self._top + 1), _INFINITE)
        sweep[n, self._first_slot(self._relaxed.loss_bytes) :] = 0.0
        for i in reversed(range(n)):
            segment, sweep = self._moves(i, segment, sweep)
            self._fork_segments(i, segment)
            self._fork_sweep(i, segment, sweep)
        return float(sweep[0, -1])

    def _first_slot(self, need_bytes: float) -> int:
        """The first slot whose bytes left, rounded up, cover `need_bytes`."""
        if need_bytes > self._relaxed.left_bytes:
            return self._top + 1
        return max(0, self._top - int((self._relaxed.left_bytes - need_bytes) / self._unit + _SAFE))

    def _moves(self, i: int, after: _Floats, after_sweep: _Floats) -> tuple[_Floats, _Floats]:
        """Keep block `i` or run and leave it, given the costs from boundary `i + 1`."""
        forward_s = float(self._relaxed.forward_s[i])
        segment, sweep = after + forward_s, after_sweep + forward_s
        segment[i], sweep[i] = _INFINITE, _INFINITE
        for option in self._relaxed.options[i]:
            shift = int(option.weight_bytes / self._unit)
            first, end = self._first_slot(option.backward_bytes), self._top + 1 - shift
            leaf = segment[i, i + 1, first:]
            np.minimum(leaf, option.replay_s + option.backward_s, out=leaf)
            first = max(first, shift)
            if first > self._top:
                continue
            kept_s = forward_s + option.backward_s
            rest = segment[i, i + 2 :, first:]
            np.minimum(rest, after[i + 1, i + 2 :, first - shift : end] + kept_s, out=rest)
            np.minimum(sweep[i, first:], after_sweep[i + 1, first - shift : end] + kept_s, out=sweep[i, first:])
        return segment, sweep

    def _fork_segments(self, i: int, segment: _Floats) -> None:
        for q in range(i + 1, self._relaxed.num_blocks):
            for first, last, shift in self._shifts(i, q):
                top = segment[q, q + 1 :, : self._top + 1 - shift]
                forked = segment[first:last, q, None, shift:] + top
                lows = segment[first:last, q + 1 :, shift:]
                np.minimum(lows, forked, out=lows)

    def _fork_sweep(self, i: int, segment: _Floats, sweep: _Floats) -> None:
        for q in range(i + 1, self._relaxed.num_blocks + 1):
            for first, last, shift in self._shifts(i, q):
                forked = segment[first:last, q, shift:] + sweep[q, : self._top + 1 - shift]
                np.minimum(sweep[first:last, shift:], forked, out=sweep[first:last, shift:])

    def _shifts(self, i: int, q: int) -> list[tuple[int, int, int]]:
        """Group `low` in `i .. q-1` by the slots that boundary `i`, held for `low .. q-1`, takes."""
        first_bytes, passed = self._relaxed.first_bytes[i, q], self._relaxed.passed_bytes[i]
        slots = np.maximum(0.0, (first_bytes + passed[q] - passed[i:q]) / self._unit).astype(np.int64)
        starts = [0, *(int(k) + 1 for k in np.flatnonzero(np.diff(slots))), len(slots)]
        groups = [(i + a, i + b, int(slots[a])) for a, b in pairwise(starts)]
        return [(a, b, shift) for a, b, shift in groups if shift <= self._top]
