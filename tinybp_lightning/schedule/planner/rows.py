"""How is the table of all segments filled, fast? Row by row where layers are equal, split by split where none are.

A row belongs to a segment (`sharing`) and holds its least time for every number of slots left. A split adds two rows,
one of them shifted by the slots it holds; the work is additions and minima over long arrays, and what counts is how
many arrays are touched at once: all splits of one row, or all rows of one split, whichever are more.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.planner.sharing import Sharing
from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = [
    "INFINITE",
    "SegmentRows",
    "Slots",
    "Splits",
    "Times",
    "first_finite",
    "first_true",
    "offer_keeps",
    "offer_splits",
]

Times = NDArray[np.float32]
"""Seconds for 0, 1, 2, … slots left."""
INFINITE = float(np.inf)
_MANY_ROWS = 12
"""A state with more rows of its own is filled split by split."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Bytes in whole slots: `width` columns of `unit_bytes` each, from 0 slots on."""

    unit_bytes: int
    width: int

    def need(self, need_bytes: int) -> int:
        """Return the fewest slots that cover `need_bytes`; `width` where none do."""
        return min(self.width, -(-need_bytes // self.unit_bytes))

    def needs(self, need_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `need` of many, not limited to the width."""
        return -(-need_bytes // self.unit_bytes)

    def held(self, held_bytes: int) -> int:
        """Return `held_bytes` rounded to whole slots."""
        return (2 * held_bytes + self.unit_bytes) // (2 * self.unit_bytes)

    def helds(self, held_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `held` of many."""
        return (2 * held_bytes + self.unit_bytes) // (2 * self.unit_bytes)


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of one segment, by the rows of their two parts: `left_table[lefts]` and `right_table[rights]`."""

    right_table: Times
    right_lowest: NDArray[np.int64]
    rights: NDArray[np.int64]
    left_table: Times
    left_lowest: NDArray[np.int64]
    lefts: NDArray[np.int64]


def offer_keeps(times: Times, state: State, standing_bytes: int, rests: list[Times] | None, slots: Slots) -> None:
    """Offer to keep the state's block; `rests` are the rows of what follows, `None` when nothing does."""
    for option, keep in enumerate(state.keeps):
        if rests is None:
            low = slots.need(max(keep.replay_need_bytes + standing_bytes, keep.backward_need_bytes))
            np.minimum(times[low:], np.float32(keep.replay_s + keep.backward_s), out=times[low:])
            continue
        shift = slots.held(keep.held_bytes)
        low = max(shift, slots.need(max(keep.save_need_bytes + standing_bytes, keep.backward_need_bytes)))
        if low < slots.width:
            rest = rests[option][low - shift : slots.width - shift]
            np.minimum(times[low:], rest + np.float32(state.forward_s + keep.backward_s), out=times[low:])


def offer_splits(times: Times, state: State, standing_bytes: int, splits: Splits, slots: Slots) -> None:
    """Offer all splits of one row, those that hold the same number of slots together."""
    count = len(splits.lefts)
    need_slots = slots.needs(state.split_need_bytes[:count] + standing_bytes)
    shifts = slots.helds(state.split_held_bytes[:count])
    lowest = np.maximum(splits.right_lowest[splits.rights] + shifts, splits.left_lowest[splits.lefts])
    useful = np.maximum(lowest, need_slots) < slots.width
    for shift in np.unique(shifts[useful]).tolist():
        group = np.flatnonzero(useful & (shifts == shift))
        start = int(lowest[group].min())
        through = splits.right_table[splits.rights[group], start - shift : slots.width - shift]
        left = splits.left_table[splits.lefts[group], start:]
        left += state.split_forward_s[group, None].astype(np.float32)
        through += left
        for k in np.flatnonzero(need_slots[group] > np.maximum(lowest[group], start)):
            through[k, : need_slots[group[k]] - start] = INFINITE
        np.minimum(times[start:], through.min(axis=0), out=times[start:])


class SegmentRows:
    """All rows of a chain, filled: `values[sharing.rows[state][k]]` from `lowest[…]` on."""

    def __init__(self, tables: Tables, sharing: Sharing, slots: Slots) -> None:
        self._tables = tables
        self._sharing = sharing
        self._slots = slots
        self.values = np.empty((sharing.num_rows, slots.width), np.float32)
        self.lowest = np.full(sharing.num_rows, slots.width, np.int64)
        for index in reversed(range(len(tables.states))):
            if len(sharing.own[index]) > _MANY_ROWS:
                self._fill_by_split(index)
            else:
                self._fill_by_row(index)

    def _standing_bytes(self, index: int) -> list[int]:
        """What stands at the end of each own row."""
        tables = self._tables
        first = tables.first_cut(tables.states[index].boundary)
        return [tables.standing_bytes[tables.cuts[first + k]] for k in self._sharing.own[index]]

    def _finish(self, times: Times, row: int) -> None:
        self.values[row] = times
        self.lowest[row] = first_finite(times)

    def _offer_keeps(self, times: Times, index: int, k: int, standing_bytes: int) -> None:
        tables, state = self._tables, self._tables.states[index]
        leaf = int(tables.cuts[tables.first_cut(state.boundary)] == state.boundary + 1)
        rests = None
        if k >= leaf:
            rests = [self.values[self._sharing.rows[keep.next_state][k - leaf]] for keep in state.keeps]
        offer_keeps(times, state, standing_bytes, rests, self._slots)

    def _fill_by_row(self, index: int) -> None:
        state, sharing = self._tables.states[index], self._sharing
        for k, standing_bytes in zip(sharing.own[index], self._standing_bytes(index), strict=True):
            times = np.full(self._slots.width, INFINITE, np.float32)
            self._offer_keeps(times, index, k, standing_bytes)
            if k:
                rights = sharing.rights(self._tables, index, k)
                lefts = sharing.rows[index][:k]
                splits = Splits(self.values, self.lowest, rights, self.values, self.lowest, lefts)
                offer_splits(times, state, standing_bytes, splits, self._slots)
            self._finish(times, int(sharing.rows[index][k]))

    def _fill_by_split(self, index: int) -> None:
        state, sharing = self._tables.states[index], self._sharing
        own, rows = np.array(sharing.own[index], np.int64), sharing.rows[index]
        times = np.full((len(own), self._slots.width), INFINITE, np.float32)
        standing = np.array(self._standing_bytes(index), np.int64)
        for position, k in enumerate(own.tolist()):
            self._offer_keeps(times[position], index, k, int(standing[position]))
        position = 0
        for number, target in enumerate(state.split_states[: int(own[-1])]):
            # All splits left of this one are done: the row that ends at its cut is final, and the split reads it.
            if position < len(own) and own[position] == number:
                self._finish(times[position], int(rows[number]))
                position += 1
            rights = sharing.rows[int(target)][own[position:] - number - 1]
            self._offer_split(times[position:], state, number, standing[position:], rights, int(rows[number]))
        for k in range(position, len(own)):
            self._finish(times[k], int(rows[own[k]]))

    def _offer_split(
        self,
        times: Times,
        state: State,
        number: int,
        standing_bytes: NDArray[np.int64],
        rights: NDArray[np.int64],
        left: int,
    ) -> None:
        """Offer one split to many rows."""
        shift = self._slots.held(int(state.split_held_bytes[number]))
        lowest = self.lowest[rights] + shift
        start = max(int(lowest.min()), int(self.lowest[left]))
        if start >= self._slots.width:
            return
        through = self.values[rights, start - shift : self._slots.width - shift]
        through += self.values[left, start:] + np.float32(state.split_forward_s[number])
        need_slots = self._slots.needs(int(state.split_need_bytes[number]) + standing_bytes)
        for k in np.flatnonzero(need_slots > np.maximum(lowest, start)):
            through[k, : need_slots[k] - start] = INFINITE
        np.minimum(times[:, start:], through, out=times[:, start:])


def first_true(found: NDArray[np.bool_], *, width: int) -> list[int]:
    """Return by place on the last axis of `found` the first on axis 1 that is true anywhere; `width` where none is."""
    anywhere: NDArray[np.bool_] = np.logical_or.reduce(found, axis=0)
    if not len(anywhere):
        return [width] * anywhere.shape[1]
    return np.where(anywhere.any(axis=0), anywhere.argmax(axis=0), width).tolist()


def first_finite(times: Times) -> int:
    """Return the first finite column, or the number of columns."""
    finite = np.isfinite(times)
    first = int(finite.argmax())
    return first if finite[first] else len(times)
