"""Which interval tree is fastest for every number of bytes left? The heterogeneous-chain dynamic program.

After Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, *Optimal checkpointing for heterogeneous chains* (rotor), with
per-block options (Rockmate) and shared storages (Note [Bytes left] in `tables`). `T[state][end, m]` is the least time
to reverse the segment with `m` slots of `unit_bytes` left; all `m` and all ends are computed at once.

# Note [Rounding]
What a move holds is rounded to whole slots. The slot size is one, out of some near the wanted size, that makes the
errors of all blocks cancel best. A schedule's true peak may still be off by some slots in either direction; the planner
asks the exact simulator and takes the best that fits. With a slot of one byte nothing is rounded.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.sharing import Sharing
from tinybp_lightning.schedule.tables import State, Tables
from tinybp_lightning.schedule.unfold import KeepHere, Node, RunOut, SplitAt, unfold

__all__ = ["IntervalTree"]

_Times = NDArray[np.float32]
_INFINITE = float(np.inf)


@dataclass(frozen=True, slots=True)
class _Splits:
    """The splits of one segment: `right_table[rights[k]]` and the segment rows `lefts[k]` are the two parts' rows."""

    right_table: _Times
    right_lowest: NDArray[np.int64]
    rights: NDArray[np.int64]
    lefts: NDArray[np.int64]


class IntervalTree:
    """The filled table for `num_slots` slots; `seconds[m]` is the least time of a whole step with `m` of them."""

    def __init__(self, tables: Tables, sharing: Sharing, *, unit_bytes: int, num_slots: int) -> None:
        self._tables = tables
        self._sharing = sharing
        self._unit = unit_bytes
        self.num_slots = num_slots
        self._width = num_slots + 1
        num_states = len(tables.states)
        self._rows = np.empty((sharing.num_rows, self._width), np.float32)
        self._lowest = np.full(sharing.num_rows, self._width, np.int64)
        self._sweeps = np.empty((num_states, self._width), np.float32)
        self._sweep_lowest = np.full(num_states, self._width, np.int64)
        for index in reversed(range(num_states)):
            if tables.states[index].boundary < tables.num_blocks:
                self._fill_segments(index)
            self._fill_sweep(index)
        self.seconds = self._sweeps[tables.start]

    def schedule(self, slots: int) -> Schedule:
        """Return the fastest schedule for `slots`, in the table's rounded bytes."""
        return unfold(self._tables, self, Node(self._tables.start, None, slots))

    def choose(self, node: Node) -> KeepHere | SplitAt | RunOut:
        """Return the best move at `node` (`Chooser`)."""
        if node.end is None:
            return self._choose_sweep(node)
        return self._choose_segment(node, node.end)

    def rest_s(self, node: Node) -> float:
        """Return the least time from `node` on; infinite where nothing fits."""
        slots = min(node.left, self._width - 1)
        if slots < 0:
            return _INFINITE
        if node.end is None:
            return float(self._sweeps[node.state][slots])
        row = node.end - self._tables.first_cut(self._tables.states[node.state].boundary)
        return float(self._rows[self._sharing.rows[node.state][row], slots])

    def held_slots(self, held_bytes: int) -> int:
        """Return `held_bytes` in slots. See Note [Rounding]."""
        return (2 * held_bytes + self._unit) // (2 * self._unit)

    def _slots(self, need_bytes: int) -> int:
        return min(self._width, -(-need_bytes // self._unit))

    def _fill_segments(self, index: int) -> None:
        """Fill the rows that no later state has."""
        tables, state, sharing = self._tables, self._tables.states[index], self._sharing
        first = tables.first_cut(state.boundary)
        for k, rights in zip(sharing.own[index], sharing.rights[index], strict=True):
            end = tables.cuts[first + k]
            times = np.full(self._width, _INFINITE, np.float32)
            self._keep(times, state, end, None if end == state.boundary + 1 else self._keep_rows(state, end))
            if k:
                self._split(times, state, _Splits(self._rows, self._lowest, rights, sharing.rows[index][:k]), end)
            row = int(sharing.rows[index][k])
            self._rows[row] = times
            self._lowest[row] = _first_finite(times)

    def _keep_rows(self, state: State, end: int) -> list[_Times]:
        """The rows that keeping the state's block leads to, one for each option."""
        tables = self._tables
        k = tables.cuts.index(end) - tables.first_cut(state.boundary + 1)
        return [self._rows[self._sharing.rows[keep.next_state][k]] for keep in state.keeps]

    def _fill_sweep(self, index: int) -> None:
        tables, state = self._tables, self._tables.states[index]
        times = self._sweeps[index]
        times[:] = _INFINITE
        if state.boundary == tables.num_blocks:
            times[self._slots(tables.tail_need_bytes) :] = 0
            self._sweep_lowest[index] = _first_finite(times)
            return
        self._keep(times, state, None, [self._sweeps[keep.next_state] for keep in state.keeps])
        rows = self._sharing.rows[index]
        if len(state.split_states):
            splits = _Splits(self._sweeps, self._sweep_lowest, state.split_states, rows[: len(state.split_states)])
            self._split(times, state, splits, None)
        need_bytes, forward_s = tables.run_out(state.boundary)
        low = self._slots(need_bytes)
        np.minimum(times[low:], self._rows[rows[-1], low:] + np.float32(forward_s), out=times[low:])
        self._sweep_lowest[index] = _first_finite(times)

    def _keep(self, times: _Times, state: State, end: int | None, rests: list[_Times] | None) -> None:
        """Offer to keep the state's block; `rests` are the rows of what follows, `None` when nothing does."""
        standing_bytes = 0 if end is None else self._tables.standing_bytes[end]
        for option, keep in enumerate(state.keeps):
            if rests is None:
                low = self._slots(max(keep.replay_need_bytes + standing_bytes, keep.backward_need_bytes))
                np.minimum(times[low:], np.float32(keep.replay_s + keep.backward_s), out=times[low:])
                continue
            shift = self.held_slots(keep.held_bytes)
            low = max(shift, self._slots(max(keep.save_need_bytes + standing_bytes, keep.backward_need_bytes)))
            if low < self._width:
                rest = rests[option][low - shift : self._width - shift]
                np.minimum(times[low:], rest + np.float32(state.forward_s + keep.backward_s), out=times[low:])

    def _split(self, times: _Times, state: State, splits: "_Splits", end: int | None) -> None:
        """Offer all splits at once, those that hold the same number of slots together."""
        count = len(splits.lefts)
        standing_bytes = 0 if end is None else self._tables.standing_bytes[end]
        need_slots = -(-(state.split_need_bytes[:count] + standing_bytes) // self._unit)
        shifts = (2 * state.split_held_bytes[:count] + self._unit) // (2 * self._unit)
        lowest = np.maximum(splits.right_lowest[splits.rights] + shifts, self._lowest[splits.lefts])
        for shift in np.unique(shifts).tolist():
            group = np.flatnonzero((shifts == shift) & (np.maximum(lowest, need_slots) < self._width))
            if not len(group):
                continue
            start = int(lowest[group].min())
            through = splits.right_table[splits.rights[group], start - shift : self._width - shift]
            through += self._rows[splits.lefts[group], start:]
            through += state.split_forward_s[group, None].astype(np.float32)
            for k in np.flatnonzero(need_slots[group] > np.maximum(lowest[group], start)):
                through[k, : need_slots[group[k]] - start] = _INFINITE
            np.minimum(times[start:], through.min(axis=0), out=times[start:])

    def _choose_sweep(self, node: Node) -> KeepHere | SplitAt | RunOut:
        tables, state = self._tables, self._tables.states[node.state]
        best_s, best = _INFINITE, None
        for option, keep in enumerate(state.keeps):
            rest = Node(keep.next_state, None, node.left - self.held_slots(keep.held_bytes))
            total_s = state.forward_s + keep.backward_s + self.rest_s(rest)
            if node.left >= self._slots(max(keep.save_need_bytes, keep.backward_need_bytes)) and total_s < best_s:
                best_s, best = total_s, KeepHere(option, rest)
        need_bytes, forward_s = tables.run_out(state.boundary)
        left = Node(node.state, len(tables.cuts) - 1, node.left)
        total_s = forward_s + self.rest_s(left)
        if node.left >= self._slots(need_bytes) and total_s < best_s:
            best_s, best = total_s, RunOut(left)
        return self._best_split(node, len(state.split_states), best_s, best)

    def _choose_segment(self, node: Node, end: int) -> KeepHere | SplitAt | RunOut:
        tables, state = self._tables, self._tables.states[node.state]
        standing_bytes = tables.standing_bytes[tables.cuts[end]]
        best_s, best = _INFINITE, None
        for option, keep in enumerate(state.keeps):
            if tables.cuts[end] == state.boundary + 1:
                rest, forward_s, need_bytes = None, keep.replay_s, keep.replay_need_bytes
            else:
                rest = Node(keep.next_state, end, node.left - self.held_slots(keep.held_bytes))
                forward_s, need_bytes = state.forward_s, keep.save_need_bytes
            total_s = forward_s + keep.backward_s + (self.rest_s(rest) if rest else 0.0)
            needs = max(need_bytes + standing_bytes, keep.backward_need_bytes)
            if node.left >= self._slots(needs) and total_s < best_s:
                best_s, best = total_s, KeepHere(option, rest)
        return self._best_split(node, end - tables.first_cut(state.boundary), best_s, best)

    def _best_split(
        self, node: Node, count: int, best_s: float, best: KeepHere | SplitAt | RunOut | None
    ) -> KeepHere | SplitAt | RunOut:
        """Compare the first `count` splits of a node with the best other move."""
        tables, state = self._tables, self._tables.states[node.state]
        standing_bytes = 0 if node.end is None else tables.standing_bytes[tables.cuts[node.end]]
        shifts = (2 * state.split_held_bytes[:count] + self._unit) // (2 * self._unit)
        rows = self._sharing.rows[node.state][:count]
        through_s = self._rows[rows, node.left] + state.split_forward_s[:count]
        fits = (state.split_need_bytes[:count] + standing_bytes <= node.left * self._unit) & (shifts <= node.left)
        for number in np.flatnonzero(fits & (through_s < best_s)):
            right = Node(int(state.split_states[number]), node.end, int(node.left - shifts[number]))
            total_s = float(through_s[number]) + self.rest_s(right)
            if total_s < best_s:
                column = tables.first_cut(state.boundary) + int(number)
                left = Node(node.state, column, node.left)
                best_s, best = total_s, SplitAt(tables.cuts[column], right, left)
        assert best is not None, f"no move at {node}: the table said that one fits"
        return best


def _first_finite(times: _Times) -> int:
    """Return the first finite column, or the number of columns."""
    finite = np.isfinite(times)
    first = int(finite.argmax())
    return first if finite[first] else len(times)
