"""Below which time can no schedule go when bytes come in whole pieces? A second bound, for tight budgets.

Prices (`bound`) let a schedule be a mixture: three quarters of it store a boundary, one quarter does not. Where only
a few boundaries fit, that is far from what can be done. This program instead gives every segment the bytes left, and
what is held from below (`held`), and counts each storage exactly once. Bytes left are rounded up to slots and what is
held down, and times down to whole ticks, so the result stays a lower bound. It takes `n^4 / 24` times the number of
slots and of held sets in steps.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.held import HeldSets, KeptEnds
from tinybp_lightning.schedule.relaxed import RelaxedChain

__all__ = ["Resolution", "affordable", "capped_bound_s"]

_Ticks = NDArray[np.int32]
_NEVER = 2**30 - 1
"""Two of these still add up."""
_TICKS = 2**28
"""In `limit_s`."""
_SAFE = 1e-9
"""Slots and ticks that a quotient may be off by rounding: always in favour of a lower bound."""
_BUFFER = 2**16
"""Costs that are offered at once: what stays near the processor."""
_COUNTS = 3
"""How many ways to count less than a whole boundary are told apart, for one boundary and fork."""
_UNITS_TRIED = 400
_WORK = 2.5e9
"""About how many elementary steps a bound may take: two or three seconds."""
_SETS = (128, 64, 32, 16, 8, 4, 2)
_MIN_SLOTS, _ENOUGH_SLOTS, _MAX_SLOTS = 24, 100, 600


@dataclass(frozen=True, slots=True)
class Resolution:
    """How finely `capped_bound_s` counts: about `num_slots` pieces of the bytes left, and at most `max_sets` held sets
    at each boundary. Finer is slower and closer.
    """

    num_slots: int
    max_sets: int


def affordable(relaxed: RelaxedChain) -> Resolution | None:
    """Return the resolution that a bound of this chain can have in a few seconds; `None` if too few for a useful one.

    Held sets are worth more than slots, beyond a number of slots that tells the budget from the next.
    """
    if relaxed.num_blocks**4 / 24 * _MIN_SLOTS > _WORK:
        return None
    coarsest, most = None, max(_SETS) + 1
    for max_sets in _SETS:
        if max_sets >= most:
            continue  # there are no more: the sets would be the same
        held = HeldSets(relaxed.chain, max_sets=max_sets)
        most = max(held.count(i) for i in range(held.num_blocks))
        num_slots = min(_MAX_SLOTS, int(_WORK / _num_forks(held)))
        if num_slots >= _ENOUGH_SLOTS:
            return Resolution(num_slots, max_sets)
        coarsest = Resolution(num_slots, max_sets)
    return coarsest if coarsest and coarsest.num_slots >= _MIN_SLOTS else None


def _num_forks(held: HeldSets) -> float:
    """At each boundary and for each of its held sets: every end with every fork before it, from every low."""
    num_forks = 1.0
    for i in range(held.num_blocks):
        left, passing = held.num_blocks - i + 1, held.num_passing(i)
        forks = passing * left**3 / 6 + (held.count(i) - passing) * left**2 / 2
        num_forks += forks * (2 if held.leaves_out(i, min(i + 2, held.num_blocks)) else 1)
    return num_forks


def capped_bound_s(relaxed: RelaxedChain, resolution: Resolution, *, limit_s: float) -> float:
    """Return a lower bound on the seconds of every legal schedule within the budget.

    **Arguments:** `limit_s`: about the time of a schedule within the budget; times are counted in whole fractions of
    it. Bounds far above it, and that of a budget no schedule meets, are infinite.
    """
    held = HeldSets(relaxed.chain, max_sets=resolution.max_sets)
    return _Capped(relaxed, held, num_slots=resolution.num_slots, limit_s=limit_s).bound_s()


@dataclass(frozen=True, slots=True)
class _Costs:
    """Least ticks from boundary `i` on, by held set and slots left.

    `segment[a, s, b]`: for the ends `i + a .. i + b`; `sweep[a, s]`: for those from `i + a` to the loss; `s`: a set
    that blocks are passed with. `kept_segment[s, b]` and `kept_sweep[s]`: of the other sets, for `a = 0`.
    """

    segment: _Ticks
    sweep: _Ticks
    kept_segment: _Ticks
    kept_sweep: _Ticks

    def due(self, index: int) -> tuple[_Ticks, _Ticks]:
        """Return the costs of a set where the next end is the boundary's own block."""
        num_passing = self.segment.shape[1]
        if index < num_passing:
            return self.segment[0, index], self.sweep[0, index]
        return self.kept_segment[index - num_passing], self.kept_sweep[index - num_passing]


class _Capped:
    """Arrays end in an axis of slots; the last slot has all bytes left, the first what the cheapest backward needs."""

    def __init__(self, relaxed: RelaxedChain, held: HeldSets, *, num_slots: int, limit_s: float) -> None:
        lowest_bytes = min([held.loss_need_bytes, *held.lowest_need_bytes])
        span_bytes = relaxed.left_bytes - lowest_bytes
        self._relaxed = relaxed
        self._held = held
        self._tick_s = limit_s / _TICKS
        self._forward = [self._ticks(seconds) for seconds in relaxed.forward_s.tolist()]
        self._unit = _unit_bytes(held, span_bytes, num_slots)
        self._width = max(0, int(span_bytes / self._unit) + 1) + 1
        self._buffer = np.empty(_BUFFER, np.int32)

    def bound_s(self) -> float:
        n = self._relaxed.num_blocks
        after = self._nothing(n)
        first = self._first_slot(self._held.loss_need_bytes)
        after.sweep[..., first:], after.kept_sweep[..., first:] = 0, 0
        for i in reversed(range(n)):
            after = self._costs(i, after)
        ticks = int(after.sweep[0, 0, -1])
        return ticks * self._tick_s if ticks < _NEVER else float("inf")

    def _nothing(self, i: int) -> _Costs:
        left, passing = self._relaxed.num_blocks - i, self._held.num_passing(i)
        kept = self._held.count(i) - passing
        return _Costs(
            self._never(max(1, left), passing, left),
            self._never(left + 1, passing),
            self._never(kept, left),
            self._never(kept),
        )

    def _never(self, *shape: int) -> _Ticks:
        return np.full((*shape, self._width), _NEVER, np.int32)

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
        """What follows, as seen from here: with `shift` slots held, and `ticks` to get there."""
        return np.minimum(costs[..., : self._width - shift] + np.int32(ticks), np.int32(_NEVER))

    def _costs(self, i: int, after: _Costs) -> _Costs:
        """The costs from boundary `i`, given those from boundary `i + 1`."""
        here, forward = self._nothing(i), self._forward[i]
        left, num_passing = self._relaxed.num_blocks - i, self._held.num_passing(i)
        for index in range(num_passing):
            target, held_bytes = self._held.after_pass(i, index)
            shift = self._shift(held_bytes)
            here.segment[1:, index, 1:, shift:] = self._later(after.segment[: left - 1, target], shift, forward)
            here.sweep[1:, index, shift:] = self._later(after.sweep[:, target], shift, forward)
        for index in range(self._held.count(i)):
            self._offer_keeps(i, index, after, *here.due(index))
        target, held_bytes = self._held.after_store(i)
        shift = self._shift(held_bytes)
        tops = self._later(after.segment[:, target], shift, forward)
        top_sweeps = self._later(after.sweep[:, target], shift, forward)
        for fork in range(1, left + 1):
            ends = tops[fork - 1, fork - 1 :] if fork < left else tops[0, :0]
            lefts, kept_lefts = here.segment[:fork, :, fork - 1, shift:], here.kept_segment[:, fork - 1, shift:]
            self._offer_fork(here.segment[:fork], here.sweep[:fork], lefts, ends, top_sweeps[fork - 1])
            self._offer_fork(here.kept_segment, here.kept_sweep, kept_lefts, ends, top_sweeps[fork - 1])
            if self._held.leaves_out(i, i + fork):
                self._offer_kept_holds(i, fork, after, here)
        return here

    def _offer_keeps(self, i: int, index: int, after: _Costs, segment: _Ticks, sweep: _Ticks) -> None:
        """Offer to keep block `i`, to the costs of a set for `low = i`."""
        for keep in self._held.keeps(i, index, left_bytes=self._relaxed.left_bytes):
            first, shift = self._first_slot(keep.need_bytes), self._shift(keep.held_bytes)
            alone = segment[0, first:]
            np.minimum(alone, np.int32(self._ticks(keep.replay_s + keep.backward_s)), out=alone)
            first = max(first, shift)
            if first >= self._width:
                continue
            kept = self._forward[i] + self._ticks(keep.backward_s)
            rest, rest_sweep = after.due(keep.target)
            part = self._later(rest, shift, kept)[:, first - shift :]
            np.minimum(segment[1:, first:], part, out=segment[1:, first:])
            part = self._later(rest_sweep, shift, kept)[first - shift :]
            np.minimum(sweep[first:], part, out=sweep[first:])

    def _offer_kept_holds(self, i: int, fork: int, after: _Costs, here: _Costs) -> None:
        """Offer to hold boundary `i` with less than all its storages, for ends that are all kept when they are due."""
        ways = self._held.all_kept(i, i + fork, left_bytes=self._relaxed.left_bytes)
        num_passing = self._held.num_passing(i)
        for counted, same in _alike(ways):
            lefts = self._never(len(same))
            for row, way in zip(lefts, same, strict=True):
                row[self._first_slot(way.need_bytes) :] = self._ticks(way.seconds)
            lows, is_due = slice(same[0].low - i, same[-1].low - i + 1), same[0].low == i
            for index in range(self._held.count(i) if is_due else num_passing):
                target, held_bytes = self._held.after_hold(i, index, counted)
                shift = self._shift(held_bytes)
                ends = self._later(after.segment[fork - 1 : fork, target, fork - 1 :], shift, self._forward[i])
                sweep = self._later(after.sweep[fork - 1, target], shift, self._forward[i])
                if index < num_passing:
                    rows = here.segment[lows, index], here.sweep[lows, index], lefts[:, shift:]
                else:
                    own = slice(index - num_passing, index - num_passing + 1)
                    rows = here.kept_segment[own], here.kept_sweep[own], lefts[:1, shift:]
                self._offer_fork(*rows, ends.reshape(-1, ends.shape[-1]), sweep)

    def _offer_fork(self, segment: _Ticks, sweep: _Ticks, lefts: _Ticks, ends: _Ticks, end_sweep: _Ticks) -> None:
        """Offer to serve the lower ends at `lefts`, one for each row, after what follows has served the others.

        `ends`: its costs for the further ends, the last ones of `segment`; `end_sweep`: to the loss.
        """
        num_ends, width = ends.shape
        if not width:
            return
        swept = sweep[..., -width:]
        np.minimum(swept, lefts + end_sweep, out=swept)
        if not num_ends or not len(lefts):
            return
        offered = segment[..., -num_ends:, -width:]
        step = max(1, len(self._buffer) // offered[0].size)
        for k in range(0, len(lefts), step):
            part = offered[k : k + step]
            if part.size > len(self._buffer):
                self._buffer = np.empty(part.size, np.int32)
            through = self._buffer[: part.size].reshape(part.shape)
            np.add(lefts[k : k + step, ..., None, :], ends, out=through)
            np.minimum(part, through, out=part)


def _alike(ways: list[KeptEnds]) -> list[tuple[frozenset[int], list[KeptEnds]]]:
    """Group neighbours that count the same, with ascending lows; beyond some groups what all the rest count."""
    groups = [(counted, list(same)[::-1]) for counted, same in groupby(ways, key=lambda way: way.counted)]
    rest = groups[_COUNTS - 1 :]
    if len(rest) < 2:
        return groups
    counted = frozenset[int].intersection(*(counted for counted, _ in rest))
    return [*groups[: _COUNTS - 1], (counted, [way for _, same in reversed(rest) for way in same])]


def _unit_bytes(held: HeldSets, span_bytes: float, num_slots: int) -> float:
    """Return a slot near `span / num_slots` bytes in which what is held is just above whole slots."""
    wanted = max(1, int(0.75 * span_bytes / num_slots))
    sizes, counts = np.unique(np.array(held.sizes_bytes, np.int64), return_counts=True)
    units = np.unique(np.linspace(wanted, 3 * wanted, _UNITS_TRIED).astype(np.int64))
    lost = (sizes % units[:, None] * counts).sum(axis=1)
    return float(units[int(lost.argmin())])
