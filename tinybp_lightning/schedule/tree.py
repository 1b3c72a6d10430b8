"""Which interval tree is fastest for every number of bytes left? The heterogeneous-chain dynamic program.

After Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, *Optimal checkpointing for heterogeneous chains* (rotor), with
per-block options (Rockmate) and shared storages (Note [Bytes left] in `tables`). `T[state][end, m]` is the least time
to reverse the segment with `m` slots of `unit_bytes` left; all `m` and all ends are computed at once.

# Note [Rounding]
What a move holds is rounded to slots so that errors do not add up: a running total along the chain is rounded, not each
block's bytes. A schedule's true peak may so be off by a few slots in either direction; the planner asks the exact
simulator and takes the best that fits. With a unit of one byte nothing is rounded.
"""

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.tables import Tables
from tinybp_lightning.schedule.unfold import KeepHere, Node, RunOut, SplitAt, unfold

__all__ = ["IntervalTree"]

_Times = NDArray[np.float32]
_INFINITE = float(np.inf)


class IntervalTree:
    """The filled table for `num_slots` slots; `seconds[m]` is the least time of a whole step with `m` of them."""

    def __init__(self, tables: Tables, *, unit_bytes: int, num_slots: int) -> None:
        self._tables = tables
        self._unit = unit_bytes
        self.num_slots = num_slots
        self._width = num_slots + 1
        self._offsets = self._keep_offsets()
        num_states = len(tables.states)
        self._segments: list[_Times] = [np.empty((0, 0), np.float32)] * num_states
        self._lowest: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * num_states
        self._sweeps: list[_Times] = [np.empty(0, np.float32)] * num_states
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
        return float(self._segments[node.state][row, slots])

    def held_slots(self, state: int, held_bytes: int) -> int:
        """Return `held_bytes` in slots, as rounded at `state`. See Note [Rounding]."""
        offset = self._offsets[self._tables.states[state].boundary]
        return int((offset + held_bytes) // self._unit - offset // self._unit)

    def _keep_offsets(self) -> list[int]:
        total, offsets = self._unit // 2, list[int]()
        held = {state.boundary: state.keeps[0].held_bytes for state in reversed(self._tables.states) if state.keeps}
        for boundary in range(self._tables.num_blocks + 1):
            offsets.append(total)
            total += held.get(boundary, 0)
        return offsets

    def _slots(self, need_bytes: int) -> int:
        return min(self._width, -(-need_bytes // self._unit))

    def _fill_segments(self, index: int) -> None:
        tables, state = self._tables, self._tables.states[index]
        first = tables.first_cut(state.boundary)
        times = np.full((len(tables.cuts) - first, self._width), _INFINITE, np.float32)
        ends = np.array([tables.standing_bytes[cut] for cut in tables.cuts[first:]], np.int64)
        self._relax_keeps(index, times, ends)
        for number, target in enumerate(state.split_states):
            self._relax_split(index, number, int(target), times, ends)
        self._segments[index] = times
        self._lowest[index] = _first_finite(times)

    def _relax_keeps(self, index: int, times: _Times, ends: NDArray[np.int64]) -> None:
        tables, state = self._tables, self._tables.states[index]
        ends_here = tables.cuts[tables.first_cut(state.boundary)] == state.boundary + 1
        for keep in state.keeps:
            if ends_here:
                need = max(keep.replay_need_bytes + int(ends[0]), keep.backward_need_bytes)
                low = self._slots(need)
                np.minimum(times[0, low:], np.float32(keep.replay_s + keep.backward_s), out=times[0, low:])
            needs = np.maximum(keep.save_need_bytes + ends[int(ends_here) :], keep.backward_need_bytes)
            self._relax(
                times[int(ends_here) :],
                keep.next_state,
                shift=self.held_slots(index, keep.held_bytes),
                needs=needs,
                seconds=state.forward_s + keep.backward_s,
            )

    def _relax_split(self, index: int, number: int, target: int, times: _Times, ends: NDArray[np.int64]) -> None:
        """Offer every end after the split's cut the way through it; the row of the cut itself is final by now."""
        state = self._tables.states[index]
        row = times[number]
        low = int(_first_finite(row[None])[0])
        self._relax(
            times[number + 1 :],
            target,
            shift=self.held_slots(index, int(state.split_held_bytes[number])),
            needs=int(state.split_need_bytes[number]) + ends[number + 1 :],
            seconds=float(state.split_forward_s[number]),
            beside=row,
            low=low,
        )

    def _relax(
        self,
        times: _Times,
        target: int,
        *,
        shift: int,
        needs: NDArray[np.int64],
        seconds: float,
        beside: _Times | None = None,
        low: int = 0,
    ) -> None:
        """`times[j, m] = min(itself, T[target][j, m - shift] + seconds + beside[m])` where `m` covers `needs[j]`."""
        if not len(times):
            return
        child, lowest = self._segments[target], self._lowest[target] + shift
        start = max(shift, low, int(lowest.min()))
        if start >= self._width:
            return
        shifted: _Times = child[:, start - shift : self._width - shift]
        through = shifted + (np.float32(seconds) if beside is None else beside[start:] + np.float32(seconds))
        need_slots = -(-needs // self._unit)
        for row in np.flatnonzero(need_slots > np.maximum(lowest, start)):
            through[row, : need_slots[row] - start] = _INFINITE
        np.minimum(times[:, start:], through, out=times[:, start:])

    def _fill_sweep(self, index: int) -> None:
        tables, state = self._tables, self._tables.states[index]
        times = np.full(self._width, _INFINITE, np.float32)
        self._sweeps[index] = times
        if state.boundary == tables.num_blocks:
            times[self._slots(tables.tail_need_bytes) :] = 0
            return
        for keep in state.keeps:
            self._relax_sweep(
                times,
                self._sweeps[int(keep.next_state)],
                shift=self.held_slots(index, keep.held_bytes),
                need_bytes=max(keep.save_need_bytes, keep.backward_need_bytes),
                seconds=state.forward_s + keep.backward_s,
            )
        for number, target in enumerate(state.split_states):
            self._relax_sweep(
                times,
                self._sweeps[int(target)],
                shift=self.held_slots(index, int(state.split_held_bytes[number])),
                need_bytes=int(state.split_need_bytes[number]),
                seconds=float(state.split_forward_s[number]),
                beside=self._segments[index][number],
            )
        need_bytes, forward_s = tables.run_out(state.boundary)
        low = self._slots(need_bytes)
        np.minimum(times[low:], self._segments[index][-1, low:] + np.float32(forward_s), out=times[low:])

    def _relax_sweep(
        self, times: _Times, child: _Times, *, shift: int, need_bytes: int, seconds: float, beside: _Times | None = None
    ) -> None:
        low = max(shift, self._slots(need_bytes))
        if low < self._width:
            shifted: _Times = child[low - shift : self._width - shift]
            through = shifted + (np.float32(seconds) if beside is None else beside[low:] + np.float32(seconds))
            np.minimum(times[low:], through, out=times[low:])

    def _choose_sweep(self, node: Node) -> KeepHere | SplitAt | RunOut:
        tables, state = self._tables, self._tables.states[node.state]
        best_s, best = _INFINITE, None
        for option, keep in enumerate(state.keeps):
            rest = Node(keep.next_state, None, node.left - self.held_slots(node.state, keep.held_bytes))
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
                rest = Node(keep.next_state, end, node.left - self.held_slots(node.state, keep.held_bytes))
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
        offset = self._offsets[state.boundary]
        shifts = (offset + state.split_held_bytes[:count]) // self._unit - offset // self._unit
        through_s = self._segments[node.state][:count, node.left] + state.split_forward_s[:count]
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


def _first_finite(times: _Times) -> NDArray[np.int64]:
    """Return, for each row, the first finite column, or the number of columns."""
    finite: NDArray[np.bool_] = np.isfinite(times)
    first: NDArray[np.int64] = finite.argmax(axis=1)
    first[~finite.any(axis=1)] = times.shape[1]
    return first
