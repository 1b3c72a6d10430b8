"""Find the fastest persistent schedule for every number of bytes left: the dynamic program for heterogeneous chains.

After Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, *Optimal checkpointing for heterogeneous chains* (rotor), with
per-block options (Rockmate) and shared storages (Note [Bytes left] in `states`). A row belongs to a segment and holds
its least time for every number of memory units left. A split adds two rows, one of them shifted by the units that it
keeps alive, so the work is additions and minima over long arrays. What counts is how many arrays are touched at once:
all splits of one row, or all rows of one split, whichever are more.

# Note [Memoised rows]
A row depends on the segment's own moves and on the rows they lead to, so two segments whose moves have equal bytes and
seconds, and lead to equal rows, have equal rows: in a chain of equal layers, all segments that span the same blocks of
a layer. Equality is found by 64-bit keys, built from the last block to the first. Keys of unequal segments agree with a
probability of about 1e-10; a schedule is then worse than it might be, not wrong, because the simulator judges it.

# Note [Rounding]
What a move keeps alive is rounded to whole units. A schedule's true peak may be off by some units in either direction;
the planner asks the exact simulator and takes the best that fits. With a unit of one byte nothing is rounded.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.extract import extract_schedule, whole_units
from tinybp_lightning.schedule.planner.states import Keep, State, StateModel

__all__ = ["RowIndex", "Table", "fitting_unit_bytes", "share_rows"]

_Times = NDArray[np.float32]
"""Seconds for 0, 1, 2, … units left."""
_Keys = NDArray[np.uint64]
_INFINITE = float(np.inf)
_MANY_ROWS = 12
"""A state with more rows of its own is filled split by split."""
_UNITS_TRIED = 2000
_MASK = 2**64 - 1
_ODD, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True, slots=True)
class RowIndex:
    """`rows[segment]` is the row of a segment, which `StateModel` numbers.

    `own[state]` are the places after the state's first cut of the ends whose row no later state has. `num_rows` counts
    all rows and `num_splits` their splits.
    """

    rows: NDArray[np.int64]
    own: tuple[tuple[int, ...], ...]
    num_rows: int
    num_splits: int


def share_rows(model: StateModel) -> RowIndex:
    """Return which segments share a row. See Note [Memoised rows]."""
    num_states = len(model.states)
    keys: list[_Keys] = [np.empty(0, np.uint64)] * num_states
    rows, own = np.empty(model.num_segments, np.int64), [tuple[int, ...]()] * num_states
    known: dict[int, int] = {}
    num_splits = 0
    for index in reversed(range(num_states)):
        state = model.states[index]
        if state.boundary == model.num_blocks:
            continue
        keys[index] = _segment_keys(model, state, keys)
        new: list[int] = []
        found: list[int] = []
        for k, key in enumerate(keys[index].tolist()):
            if key not in known:
                known[key] = len(known)
                new.append(k)
            found.append(known[key])
        start = model.first_segment(index)
        rows[start : start + len(found)], own[index] = found, tuple(new)
        num_splits += sum(new)
    return RowIndex(rows, tuple(own), len(known), num_splits)


def _segment_keys(model: StateModel, state: State, keys: list[_Keys]) -> _Keys:
    first = model.first_cut(state.boundary)
    leaf = int(model.cuts[first] == state.boundary + 1)
    ends = [model.baseline_bytes[cut] for cut in model.cuts[first:]]
    found = np.array([hash((end_bytes, leaf and k == 0)) & _MASK for k, end_bytes in enumerate(ends)], np.uint64)
    for keep in state.keeps:
        moves = (keep.kept_bytes, keep.save_need_bytes, keep.replay_need_bytes, keep.backward_need_bytes)
        scalar = _scalar((*moves, keep.replay_s, keep.backward_s, state.forward_s))
        if leaf:
            found[:1] = _mixed(found[:1], found[:1], scalar)
        found[leaf:] = _mixed(found[leaf:], keys[keep.next_state], scalar)
    for number, target in enumerate(state.split_states):
        kept_bytes, need_bytes = int(state.split_kept_bytes[number]), int(state.split_need_bytes[number])
        scalar = _scalar((kept_bytes, need_bytes, float(state.split_forward_s[number]), int(found[number])))
        found[number + 1 :] = _mixed(found[number + 1 :], keys[int(target)], scalar)
    return found


def _scalar(move: tuple[float, ...]) -> np.uint64:
    return np.uint64(hash(move) & _MASK)


def _mixed(keys: _Keys, others: _Keys, scalar: np.uint64) -> _Keys:
    mixed = (keys ^ (others * _OTHER + scalar)) * _ODD
    return mixed ^ (mixed >> np.uint64(29))


def fitting_unit_bytes(model: StateModel, *, wanted_bytes: int) -> int:
    """Return a unit of `wanted_bytes` to a quarter more, in which what moves keep alive is close to whole units."""
    if wanted_bytes <= 1:
        return 1
    kept = [keep.kept_bytes for state in model.states for keep in state.keeps]
    kept += [int(state.split_kept_bytes[0]) for state in model.states if len(state.split_kept_bytes)]
    sizes, counts = np.unique(np.array(kept, np.int64), return_counts=True)
    units = np.unique(np.linspace(wanted_bytes, wanted_bytes + wanted_bytes // 4, _UNITS_TRIED).astype(np.int64))
    error = (2 * sizes + units[:, None]) // (2 * units[:, None]) - sizes / units[:, None]
    return int(units[(np.abs(error) * counts).sum(axis=1).argmin()])


class Table:
    """The filled table for up to `num_units` units; `seconds[m]` is the least time of a whole step with `m` of them."""

    def __init__(self, model: StateModel, index: RowIndex, *, unit_bytes: int, num_units: int) -> None:
        self._model = model
        self._index = index
        self._width = num_units + 1
        self.num_units = num_units
        self.unit_bytes = unit_bytes
        self._rows = np.empty((index.num_rows, self._width), np.float32)
        self._lowest = np.full(index.num_rows, self._width, np.int64)
        for state in reversed(range(len(model.states))):
            if len(index.own[state]) > _MANY_ROWS:
                self._fill_by_split(state)
            else:
                self._fill_by_row(state)
        num_states = len(model.states)
        self._sweeps = np.full((num_states, self._width), _INFINITE, np.float32)
        self._sweeps_lowest = np.full(num_states, self._width, np.int64)
        for state in reversed(range(num_states)):
            self._fill_sweep(state, self._sweeps[state])
            self._sweeps_lowest[state] = _first_finite(self._sweeps[state])
        self.seconds = self._sweeps[0]

    def schedule(self, num_units: int) -> Schedule:
        """Return the fastest schedule for `num_units`, in the table's rounded bytes."""
        return extract_schedule(self._model, self, unit_bytes=self.unit_bytes, left=num_units)

    def segment_s(self, segments: NDArray[np.int64], left: NDArray[np.int64] | int) -> _Times:
        """Return the least seconds of segments with some units left (`LeastSeconds`)."""
        return self._rows[self._index.rows[segments], np.minimum(left, self.num_units)]

    def sweep_s(self, states: NDArray[np.int64], left: NDArray[np.int64] | int) -> _Times:
        """Return the least seconds of rests of the first sweep with some units left (`LeastSeconds`)."""
        return self._sweeps[states, np.minimum(left, self.num_units)]

    # ---- filling -----------------------------------------------------------------------------------------------

    def _baselines(self, index: int) -> list[int]:
        """Baseline bytes at the end of each own row."""
        model = self._model
        first = model.first_cut(model.states[index].boundary)
        return [model.baseline_bytes[model.cuts[first + k]] for k in self._index.own[index]]

    def _row_numbers(self, index: int) -> NDArray[np.int64]:
        """The rows of all segments from one state, in order of their ends."""
        model = self._model
        start = model.first_segment(index)
        return self._index.rows[start : start + len(model.cuts) - model.first_cut(model.states[index].boundary)]

    def _rights(self, targets: NDArray[np.int64] | int, ends: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """The rows of what splits leave to the right."""
        return self._index.rows[self._model.segment_offset[targets] + ends]

    def _need(self, need_bytes: int) -> int:
        """Return the fewest units that cover `need_bytes`; the width where none do."""
        return min(self._width, -(-need_bytes // self.unit_bytes))

    def _needs(self, need_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `_need` of many, not limited to the width."""
        return -(-need_bytes // self.unit_bytes)

    def _finish(self, times: _Times, row: int) -> None:
        self._rows[row] = times
        self._lowest[row] = _first_finite(times)

    def _offer_segment_keeps(self, times: _Times, index: int, k: int, baseline_bytes: int) -> None:
        model, state = self._model, self._model.states[index]
        leaf = int(model.cuts[model.first_cut(state.boundary)] == state.boundary + 1)
        for keep in state.keeps:
            if k >= leaf:
                rest = self._rows[self._row_numbers(keep.next_state)[k - leaf]]
                self._offer_keep(times, state, keep, rest, baseline_bytes)
                continue
            low = self._need(max(keep.replay_need_bytes + baseline_bytes, keep.backward_need_bytes))
            np.minimum(times[low:], np.float32(keep.replay_s + keep.backward_s), out=times[low:])

    def _offer_keep(self, times: _Times, state: State, keep: Keep, rest: _Times, baseline_bytes: int) -> None:
        """Offer to keep the state's block; `rest` is the row of what follows."""
        shift, width = whole_units(keep.kept_bytes, self.unit_bytes), self._width
        low = max(shift, self._need(max(keep.save_need_bytes + baseline_bytes, keep.backward_need_bytes)))
        if low < width:
            through = rest[low - shift : width - shift] + np.float32(state.forward_s + keep.backward_s)
            np.minimum(times[low:], through, out=times[low:])

    def _fill_by_row(self, index: int) -> None:
        model, state, rows = self._model, self._model.states[index], self._row_numbers(index)
        for k, baseline_bytes in zip(self._index.own[index], self._baselines(index), strict=True):
            times = np.full(self._width, _INFINITE, np.float32)
            self._offer_segment_keeps(times, index, k, baseline_bytes)
            if k:
                rights = self._rights(state.split_states[:k], model.first_cut(state.boundary) + k)
                self._offer_splits(times, state, baseline_bytes, rows[:k], (self._rows, self._lowest, rights))
            self._finish(times, int(rows[k]))

    def _offer_splits(
        self,
        times: _Times,
        state: State,
        baseline_bytes: int,
        lefts: NDArray[np.int64],
        right: tuple[_Times, NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        """Offer all splits of one row, those that keep the same number of units together.

        **Arguments:** `right`: the rows of the parts to the right, as a table, its lowest finite columns and which.
        """
        table, table_lowest, rights = right
        count, width = len(lefts), self._width
        need_units = self._needs(state.split_need_bytes[:count] + baseline_bytes)
        shifts = whole_units(state.split_kept_bytes[:count], self.unit_bytes)
        lowest = np.maximum(table_lowest[rights] + shifts, self._lowest[lefts])
        useful = np.maximum(lowest, need_units) < width
        for shift in np.unique(shifts[useful]).tolist():
            group = np.flatnonzero(useful & (shifts == shift))
            start = int(lowest[group].min())
            through = table[rights[group], start - shift : width - shift]
            left = self._rows[lefts[group], start:]
            left += state.split_forward_s[group, None].astype(np.float32)
            through += left
            for k in np.flatnonzero(need_units[group] > np.maximum(lowest[group], start)):
                through[k, : need_units[group[k]] - start] = _INFINITE
            np.minimum(times[start:], through.min(axis=0), out=times[start:])

    def _fill_by_split(self, index: int) -> None:
        state, rows = self._model.states[index], self._row_numbers(index)
        own = np.array(self._index.own[index], np.int64)
        times = np.full((len(own), self._width), _INFINITE, np.float32)
        baselines = np.array(self._baselines(index), np.int64)
        first = self._model.first_cut(state.boundary)
        for position, k in enumerate(own.tolist()):
            self._offer_segment_keeps(times[position], index, k, int(baselines[position]))
        position = 0
        for number, target in enumerate(state.split_states[: int(own[-1])]):
            # All splits left of this one are done: the row that ends at its cut is final, and the split reads it.
            if position < len(own) and own[position] == number:
                self._finish(times[position], int(rows[number]))
                position += 1
            rights = self._rights(target, first + own[position:])
            self._offer_split(times[position:], state, number, baselines[position:], rights, int(rows[number]))
        for k in range(position, len(own)):
            self._finish(times[k], int(rows[own[k]]))

    def _offer_split(
        self,
        times: _Times,
        state: State,
        number: int,
        baselines: NDArray[np.int64],
        rights: NDArray[np.int64],
        left: int,
    ) -> None:
        """Offer one split to many rows."""
        shift = whole_units(int(state.split_kept_bytes[number]), self.unit_bytes)
        lowest = self._lowest[rights] + shift
        start = max(int(lowest.min()), int(self._lowest[left]))
        if start >= self._width:
            return
        through = self._rows[rights, start - shift : self._width - shift]
        through += self._rows[left, start:] + np.float32(state.split_forward_s[number])
        need_units = self._needs(int(state.split_need_bytes[number]) + baselines)
        for k in np.flatnonzero(need_units > np.maximum(lowest, start)):
            through[k, : need_units[k] - start] = _INFINITE
        np.minimum(times[:, start:], through, out=times[:, start:])

    def _fill_sweep(self, index: int, times: _Times) -> None:
        model, state = self._model, self._model.states[index]
        if state.boundary == model.num_blocks:
            times[self._need(model.tail_need_bytes) :] = 0
            return
        for keep in state.keeps:
            self._offer_keep(times, state, keep, self._sweeps[keep.next_state], 0)
        rows = self._row_numbers(index)
        if len(state.split_states):
            right = (self._sweeps, self._sweeps_lowest, state.split_states)
            self._offer_splits(times, state, 0, rows[: len(state.split_states)], right)
        need_bytes, forward_s = model.run_out(state.boundary)
        low = self._need(need_bytes)
        np.minimum(times[low:], self._rows[rows[-1], low:] + np.float32(forward_s), out=times[low:])


def _first_finite(times: _Times) -> int:
    """Return the first finite column, or the number of columns."""
    finite = np.isfinite(times)
    first = int(finite.argmax())
    return first if finite[first] else len(times)
