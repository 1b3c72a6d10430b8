"""Find the smallest peak that any persistent schedule reaches, to the byte, and a schedule that keeps any such budget.

`MinMemory` is the recursion of `table` with "bytes needed" in place of time: a move needs the most of what its parts
need. Nothing is rounded, so a schedule for exactly this many bytes exists. `feasible_schedule` finds one within any
number of bytes at or above it: it only takes moves whose parts still fit, the fastest of them by the rounded table.
"""

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.extract import extract_schedule
from tinybp_lightning.schedule.planner.states import StateModel
from tinybp_lightning.schedule.planner.table import RowIndex, Table

__all__ = ["MinMemory", "feasible_schedule"]

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_NEVER = np.int64(2**62)
_LONG_S = 1e15
"""More seconds than any step takes: a part that fits, but for which the rounded table has no schedule."""


class MinMemory:
    """The least bytes that every segment, and every rest of the first sweep, needs to be left."""

    def __init__(self, model: StateModel, index: RowIndex) -> None:
        self.model = model
        self._rows = index.rows
        self._needs = np.full(index.num_rows, _NEVER)
        self.sweeps = np.full(len(model.states), _NEVER)
        for state in reversed(range(len(model.states))):
            for k in index.own[state]:
                self._needs[self._rows[model.first_segment(state) + k]] = self._segment_need(state, k)
            self.sweeps[state] = self._sweep_need(state)

    @property
    def smallest_bytes(self) -> int:
        """The least bytes that a whole step needs, unmodelled bytes left out."""
        return int(self.sweeps[0])

    def segments(self, segments: _Ints) -> _Ints:
        """Return the least bytes of segments, which are numbered as in `StateModel`."""
        return self._needs[self._rows[segments]]

    def _segment_need(self, index: int, k: int) -> int:
        """The least bytes of the segment from a state to the `k`-th cut after it."""
        model, state = self.model, self.model.states[index]
        end, needs = model.first_cut(state.boundary) + k, list[int]()
        baseline_bytes = model.baseline_bytes[model.cuts[end]]
        for keep in state.keeps:
            if model.cuts[end] == state.boundary + 1:
                needs.append(max(keep.replay_need_bytes + baseline_bytes, keep.backward_need_bytes))
                continue
            rest_bytes = int(self._needs[self._rows[model.segment_offset[keep.next_state] + end]]) + keep.kept_bytes
            needs.append(max(rest_bytes, keep.save_need_bytes + baseline_bytes, keep.backward_need_bytes))
        if k:
            rights = self.segments(model.segment_offset[state.split_states[:k]] + end) + state.split_kept_bytes[:k]
            start = model.first_segment(index)
            run = state.split_need_bytes[:k] + baseline_bytes
            needs.append(int(np.maximum(np.maximum(rights, self._needs[self._rows[start : start + k]]), run).min()))
        return min(needs)

    def _sweep_need(self, index: int) -> int:
        model, state = self.model, self.model.states[index]
        if state.boundary == model.num_blocks:
            return model.tail_need_bytes
        start = model.first_segment(index)
        lefts = self.segments(np.arange(start, start + len(state.split_states) + 1))
        needs = [max(model.run_out(state.boundary)[0], int(lefts[-1]))]
        for keep in state.keeps:
            rest_bytes = int(self.sweeps[keep.next_state]) + keep.kept_bytes
            needs.append(max(rest_bytes, keep.save_need_bytes, keep.backward_need_bytes))
        if len(state.split_states):
            rights = self.sweeps[state.split_states] + state.split_kept_bytes
            needs.append(int(np.maximum(np.maximum(rights, lefts[:-1]), state.split_need_bytes).min()))
        return min(needs)


def feasible_schedule(min_memory: MinMemory, table: Table, *, left_bytes: int) -> Schedule:
    """Return a schedule whose peak, unmodelled bytes left out, is at most `left_bytes`, which may be the smallest."""
    return extract_schedule(min_memory.model, _Feasible(min_memory, table), unit_bytes=1, left=left_bytes)


class _Feasible:
    """Seconds by the table where the bytes left are enough, counted exactly; the least need first where it has none."""

    def __init__(self, min_memory: MinMemory, table: Table) -> None:
        self._min_memory = min_memory
        self._table = table

    def segment_s(self, segments: _Ints, left: _Ints | int) -> _Floats:
        return self._seconds(
            self._min_memory.segments(segments), self._table.segment_s(segments, self._units(left)), left
        )

    def sweep_s(self, states: _Ints, left: _Ints | int) -> _Floats:
        return self._seconds(self._min_memory.sweeps[states], self._table.sweep_s(states, self._units(left)), left)

    def _units(self, left: _Ints | int) -> _Ints | int:
        return -(-left // self._table.unit_bytes)

    def _seconds(self, needs: _Ints, table_s: NDArray[np.float32], left: _Ints | int) -> _Floats:
        known_s = np.where(np.isfinite(table_s), table_s.astype(np.float64), _LONG_S + needs)
        return np.where(needs <= left, known_s, np.inf)
