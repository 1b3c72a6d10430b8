"""Which interval tree is fastest for every number of bytes left? The heterogeneous-chain dynamic program.

After Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, *Optimal checkpointing for heterogeneous chains* (rotor), with
per-block options (Rockmate) and shared storages (Note [Bytes left] in `tables`). `T[state][end, m]` is the least time
to reverse the segment with `m` slots of `unit_bytes` left; all `m` and all ends are computed at once.

# Note [Rounding]
What a move holds is rounded to whole slots. The slot size is one, out of some near the wanted size, that makes the
errors of all blocks cancel best. A schedule's true peak may still be off by some slots in either direction; the planner
asks the exact simulator and takes the best that fits. With a slot of one byte nothing is rounded.
"""

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.extract import KeepHere, Node, RunOut, SplitAt, unfold
from tinybp_lightning.schedule.planner.rows import (
    INFINITE,
    SegmentRows,
    Slots,
    Splits,
    Times,
    first_finite,
    offer_keeps,
    offer_splits,
)
from tinybp_lightning.schedule.planner.sharing import Sharing
from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = ["IntervalTree"]


class IntervalTree:
    """The filled table for `num_slots` slots; `seconds[m]` is the least time of a whole step with `m` of them."""

    def __init__(self, tables: Tables, sharing: Sharing, *, unit_bytes: int, num_slots: int) -> None:
        self._tables = tables
        self._sharing = sharing
        self._slots = Slots(unit_bytes, num_slots + 1)
        self.num_slots = num_slots
        self._segments = SegmentRows(tables, sharing, self._slots)
        num_states = len(tables.states)
        self._sweeps = np.full((num_states, num_slots + 1), INFINITE, np.float32)
        self._lowest = np.full(num_states, num_slots + 1, np.int64)
        for index in reversed(range(num_states)):
            self._fill_sweep(index, self._sweeps[index])
            self._lowest[index] = first_finite(self._sweeps[index])
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
        slots = min(node.left, self._slots.width - 1)
        if slots < 0:
            return INFINITE
        if node.end is None:
            return float(self._sweeps[node.state][slots])
        row = node.end - self._tables.first_cut(self._tables.states[node.state].boundary)
        return float(self._segments.values[self._sharing.rows[node.state][row], slots])

    def _fill_sweep(self, index: int, times: Times) -> None:
        tables, state, slots = self._tables, self._tables.states[index], self._slots
        if state.boundary == tables.num_blocks:
            times[slots.need(tables.tail_need_bytes) :] = 0
            return
        offer_keeps(times, state, 0, [self._sweeps[keep.next_state] for keep in state.keeps], slots)
        rows, segments = self._sharing.rows[index], self._segments
        if len(state.split_states):
            lefts = rows[: len(state.split_states)]
            splits = Splits(self._sweeps, self._lowest, state.split_states, segments.values, segments.lowest, lefts)
            offer_splits(times, state, 0, splits, slots)
        need_bytes, forward_s = tables.run_out(state.boundary)
        low = slots.need(need_bytes)
        np.minimum(times[low:], segments.values[rows[-1], low:] + np.float32(forward_s), out=times[low:])

    def _choose_sweep(self, node: Node) -> KeepHere | SplitAt | RunOut:
        tables, state = self._tables, self._tables.states[node.state]
        best_s, best = INFINITE, None
        for option, keep in enumerate(state.keeps):
            rest = Node(keep.next_state, None, node.left - self._slots.held(keep.held_bytes))
            total_s = state.forward_s + keep.backward_s + self.rest_s(rest)
            if node.left >= self._slots.need(max(keep.save_need_bytes, keep.backward_need_bytes)) and total_s < best_s:
                best_s, best = total_s, KeepHere(option, rest)
        need_bytes, forward_s = tables.run_out(state.boundary)
        left = Node(node.state, len(tables.cuts) - 1, node.left)
        total_s = forward_s + self.rest_s(left)
        if node.left >= self._slots.need(need_bytes) and total_s < best_s:
            best_s, best = total_s, RunOut(left)
        return self._best_split(node, len(state.split_states), best_s, best)

    def _choose_segment(self, node: Node, end: int) -> KeepHere | SplitAt | RunOut:
        tables, state = self._tables, self._tables.states[node.state]
        standing_bytes = tables.standing_bytes[tables.cuts[end]]
        best_s, best = INFINITE, None
        for option, keep in enumerate(state.keeps):
            if tables.cuts[end] == state.boundary + 1:
                rest, forward_s, need_bytes = None, keep.replay_s, keep.replay_need_bytes
            else:
                rest = Node(keep.next_state, end, node.left - self._slots.held(keep.held_bytes))
                forward_s, need_bytes = state.forward_s, keep.save_need_bytes
            total_s = forward_s + keep.backward_s + (self.rest_s(rest) if rest else 0.0)
            needs = max(need_bytes + standing_bytes, keep.backward_need_bytes)
            if node.left >= self._slots.need(needs) and total_s < best_s:
                best_s, best = total_s, KeepHere(option, rest)
        return self._best_split(node, end - tables.first_cut(state.boundary), best_s, best)

    def _best_split(
        self, node: Node, count: int, best_s: float, best: KeepHere | SplitAt | RunOut | None
    ) -> KeepHere | SplitAt | RunOut:
        """Compare the first `count` splits of a node with the best other move."""
        tables, state = self._tables, self._tables.states[node.state]
        standing_bytes = 0 if node.end is None else tables.standing_bytes[tables.cuts[node.end]]
        shifts = self._slots.helds(state.split_held_bytes[:count])
        rows = self._sharing.rows[node.state][:count]
        through_s = self._segments.values[rows, node.left] + state.split_forward_s[:count]
        fits = (state.split_need_bytes[:count] + standing_bytes <= node.left * self._slots.unit_bytes) & (
            shifts <= node.left
        )
        numbers = np.flatnonzero(fits & (through_s < best_s))
        if len(numbers):
            total_s = through_s[numbers] + self._rights_s(node, state, numbers, node.left - shifts[numbers])
            k = int(total_s.argmin())
            if total_s[k] < best_s:
                number = int(numbers[k])
                right = Node(int(state.split_states[number]), node.end, int(node.left - shifts[number]))
                column = tables.first_cut(state.boundary) + number
                best = SplitAt(tables.cuts[column], right, Node(node.state, column, node.left))
        assert best is not None, f"no move at {node}: the table said that one fits"
        return best

    def _rights_s(
        self, node: Node, state: State, numbers: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The least times of what some splits of a node leave to the right."""
        targets = state.split_states[numbers]
        if node.end is None:
            return self._sweeps[targets, slots]
        last = node.end - self._tables.first_cut(state.boundary)
        rows = np.empty(len(numbers), np.int64)
        for k, (target, number) in enumerate(zip(targets.tolist(), numbers.tolist(), strict=True)):
            rows[k] = self._sharing.rows[target][last - number - 1]
        return self._segments.values[rows, slots]
