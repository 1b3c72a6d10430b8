"""Bound the time of every schedule within a budget by a dynamic program over whole pieces: for tight budgets.

Prices (`lagrangian`) let a schedule be a mixture: three quarters of it store a boundary, one quarter does not. Where
only a few boundaries fit, that is far from what can be done. This program instead gives every segment the bytes left
and what is held from below (`live_sets`), and counts each storage exactly once. It rounds bytes left up to slots and
what is held down, and times down to whole ticks, so the result stays a lower bound. It takes `n^4 / 24` times the
number of slots and of held sets in steps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.bounds.live_sets import HeldSets, Resolution
from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain

__all__ = ["dp_bound_s"]

_Ticks = NDArray[np.int32]
_NEVER = 2**30 - 1
"""Two of these still add up."""
_TICKS = 2**28  # in `limit_s`
_SAFE = 1e-9
"""Slots and ticks that a quotient may be off by rounding: always in favour of a lower bound."""
_BUFFER = 2**16
"""Costs that are offered at once: what stays near the processor."""


def dp_bound_s(relaxed: RelaxedChain, resolution: Resolution, *, limit_s: float) -> float:
    """Return a lower bound on the seconds of every legal schedule within the budget.

    **Arguments:** `limit_s`: about the time of a schedule within the budget; times are counted in whole fractions of
    it. Bounds far above it, and that of a budget no schedule meets, are infinite.
    """
    held = HeldSets(relaxed.chain, max_sets=resolution.max_sets)
    return _DpBound(relaxed, held, num_slots=resolution.num_slots, limit_s=limit_s).bound_s()


@dataclass(frozen=True, slots=True)
class _Costs:
    """Least ticks from one boundary on, for neighbouring ends, by held set and slots left.

    `segment[e, s, m, a]`: for the ends from the one `a` after the boundary to `e`, `s` a set that blocks are passed
    with, `m` slots; `kept[e, s, m]`: of the other sets, for `a = 0`. Ends are numbered by their block, the loss last.
    """

    segment: _Ticks
    kept: _Ticks

    def due(self, index: int) -> _Ticks:
        """Return the costs of a set where the next end is the boundary's own block."""
        num_passing = self.segment.shape[1]
        return self.segment[:, index, :, 0] if index < num_passing else self.kept[:, index - num_passing]


class _DpBound:
    """The last slot has all bytes left, the first what the cheapest backward needs."""

    def __init__(self, relaxed: RelaxedChain, held: HeldSets, *, num_slots: int, limit_s: float) -> None:
        span_bytes = relaxed.left_bytes - held.lowest_need_bytes
        self._relaxed = relaxed
        self._held = held
        self._tick_s = limit_s / _TICKS
        self._forward = [self._ticks(seconds) for seconds in relaxed.forward_s.tolist()]
        self._unit = max(1.0, span_bytes / num_slots)
        self._width = max(0, int(span_bytes / self._unit) + 1) + 1
        self._buffer = np.empty(_BUFFER, np.int32)

    def bound_s(self) -> float:
        n = self._relaxed.num_blocks
        after = self._nothing(n)
        first = self._first_slot(self._held.loss_need_bytes)
        after.segment[:, :, first:], after.kept[:, :, first:] = 0, 0
        for i in reversed(range(n)):
            after = self._costs(i, after)
        ticks = int(after.segment[-1, 0, -1, 0])
        return ticks * self._tick_s if ticks < _NEVER else float("inf")

    def _nothing(self, i: int) -> _Costs:
        """The costs of boundary `i` before anything is offered: all infinite."""
        num_ends, num_passing = self._relaxed.num_blocks - i + 1, self._held.num_passing(i)
        # Slots are neighbours in memory, so that operations on all of them are fast.
        segment = np.full((num_ends, num_passing, num_ends, self._width), _NEVER, np.int32).swapaxes(2, 3)
        num_kept = self._held.count(i) - num_passing
        return _Costs(segment, np.full((num_ends, num_kept, self._width), _NEVER, np.int32))

    def _ticks(self, seconds: float) -> int:
        return min(max(0, int(seconds / self._tick_s - _SAFE)), _NEVER)

    def _first_slot(self, need_bytes: float) -> int:
        """The first slot whose bytes left, rounded up, cover `need_bytes`."""
        if need_bytes > self._relaxed.left_bytes:
            return self._width
        return max(0, self._width - 1 - int((self._relaxed.left_bytes - need_bytes) / self._unit + _SAFE))

    def _shift(self, held_bytes: int) -> int:
        return min(self._width, int(held_bytes / self._unit))

    def _later(self, costs: _Ticks, shift: int, ticks: int) -> _Ticks:
        """What follows, as seen from here: with `shift` slots (axis 1) held, and `ticks` to get there."""
        return np.minimum(costs[:, : self._width - shift] + np.int32(ticks), np.int32(_NEVER))

    def _costs(self, i: int, after: _Costs) -> _Costs:
        """Return the costs of boundary `i`, given those of boundary `i + 1`."""
        here, forward, num_passing = self._nothing(i), self._forward[i], self._held.num_passing(i)
        for index in range(num_passing):
            target, held_bytes = self._held.after_pass(i, index)
            shift = self._shift(held_bytes)
            here.segment[1:, index, shift:, 1:] = self._later(after.segment[:, target], shift, forward)
        for index in range(self._held.count(i)):
            self._offer_keeps(i, index, after, here.due(index))
        target, held_bytes = self._held.after_store(i)
        tops = self._later(after.segment[:, target], self._shift(held_bytes), forward)
        # With few slots left what follows is infinite: a fork is offered from where the first end is finite.
        lowest_slots = _first_true(tops < _NEVER, width=self._width)
        # With forks ascending, the costs of all ends below one are final when it is offered.
        for k in range(1, len(here.segment)):
            rights = tops[k - 1 :, lowest_slots[k - 1] :, k - 1]
            self._offer_fork(here.segment[k:, ..., :k], here.segment[k - 1, ..., :k], rights)
            self._offer_fork(here.kept[k:], here.kept[k - 1], rights, slot_axis=-1)
            if self._held.leaves_out(i, i + k):
                self._offer_kept_holds(i, i + k, after, here)
        return here

    def _offer_keeps(self, i: int, index: int, after: _Costs, due: _Ticks) -> None:
        """Offer to keep block `i`, to the costs of a set for `low = i`."""
        for keep in self._held.keeps(i, index, left_bytes=self._relaxed.left_bytes):
            first, shift = self._first_slot(keep.need_bytes), self._shift(keep.held_bytes)
            alone = due[0, first:]
            np.minimum(alone, np.int32(self._ticks(keep.replay_s + keep.backward_s)), out=alone)
            first = max(first, shift)
            if first >= self._width:
                continue
            kept = self._forward[i] + self._ticks(keep.backward_s)
            part = self._later(after.due(keep.target), shift, kept)[:, first - shift :]
            rest = due[1:, first:]
            np.minimum(rest, part, out=rest)

    def _offer_kept_holds(self, i: int, fork: int, after: _Costs, here: _Costs) -> None:
        """Offer to hold boundary `i` with less than all its storages, for ends that are all kept when they are due."""
        ways = self._held.all_kept(i, fork, left_bytes=self._relaxed.left_bytes)
        if not ways:
            return
        num_passing, num_ends = self._held.num_passing(i), self._relaxed.num_blocks - fork + 1
        counted = frozenset[int].intersection(*(way.counted for way in ways))
        lefts = np.full((self._width, len(ways)), _NEVER, np.int32)
        for column, way in enumerate(reversed(ways)):
            lefts[self._first_slot(way.need_bytes) :, column] = self._ticks(way.seconds)
        lows, is_due = slice(ways[-1].low - i, fork - i), ways[-1].low == i
        for index in range(self._held.count(i) if is_due else num_passing):
            target, held_bytes = self._held.after_pass(i, index, counted)
            ends = after.segment[-num_ends:, target, :, fork - i - 1]
            ends = self._later(ends, self._shift(held_bytes), self._forward[i])
            ends = ends[:, _first_true((ends < _NEVER)[..., None], width=self._width)[0] :]
            if index < num_passing:
                self._offer_fork(here.segment[-num_ends:, index, :, lows], lefts, ends)
            else:
                self._offer_fork(here.kept[-num_ends:, index - num_passing], lefts[:, 0], ends, slot_axis=-1)

    def _offer_fork(self, costs: _Ticks, lefts: _Ticks, ends: _Ticks, *, slot_axis: int = -2) -> None:
        """Offer to serve the lower ends at `lefts`, one for each column, after what follows has served the others.

        `ends`: its costs, for all ends of `costs` and the highest slots; with fewer they are infinite. `slot_axis`: of
        `costs` and `lefts`.
        """
        width = ends.shape[1]
        if not lefts.size or not width:
            return
        slots = (..., slice(-width, None), *(slice(None),) * (-1 - slot_axis))
        lefts, offered = lefts[slots], costs[slots]
        shape = [len(ends), *(1,) * lefts.ndim]
        shape[slot_axis] = width
        rights = ends.reshape(shape)
        step = max(1, len(self._buffer) // lefts.size)
        for k in range(0, len(rights), step):
            part = offered[k : k + step]
            if part.size > len(self._buffer):
                self._buffer = np.empty(part.size, np.int32)
            through = self._buffer[: part.size]
            if slot_axis == -2:
                through = through.reshape(*part.shape[:-2], part.shape[-1], width).swapaxes(-1, -2)
            else:
                through = through.reshape(part.shape)
            np.add(lefts, rights[k : k + step], out=through)
            np.minimum(part, through, out=part)


def _first_true(found: NDArray[np.bool_], *, width: int) -> list[int]:
    """Return by place on the last axis of `found` the first on axis 1 that is true anywhere; `width` where none is."""
    anywhere: NDArray[np.bool_] = np.logical_or.reduce(found, axis=0)
    if not len(anywhere):
        return [width] * anywhere.shape[1]
    return np.where(anywhere.any(axis=0), anywhere.argmax(axis=0), width).tolist()
