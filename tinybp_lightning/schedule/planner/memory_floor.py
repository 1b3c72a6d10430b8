"""What is the smallest peak any interval tree reaches, to the byte, and which tree reaches it?

The recursion of `tree` with "bytes needed" in place of time: a move needs the most of what its parts need. No rounding,
so a plan for exactly this many bytes exists. `Thrifty` walks a tree within any number of bytes at or above it: it only
takes moves whose parts still fit, and among those the fastest by the (rounded) time table.
"""

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.extract import KeepHere, Move, Node, PassBy, RunOut, SplitAt, unfold
from tinybp_lightning.schedule.planner.states import Tables
from tinybp_lightning.schedule.planner.tree import IntervalTree

__all__ = ["Floor", "Thrifty"]

_Needs = NDArray[np.int64]
_NEVER = np.int64(2**62)


class Floor:
    """The least bytes every segment (`segments[state][end]`) and every rest of the first sweep needs to be left."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        num_states = len(tables.states)
        self._segments: list[_Needs] = [np.empty(0, np.int64)] * num_states
        self._sweeps = [0] * num_states
        for index in reversed(range(num_states)):
            if tables.states[index].boundary < tables.num_blocks:
                self._segments[index] = self._segment_needs(index)
            self._sweeps[index] = self._sweep_need(index)
        self.smallest_bytes = self._sweeps[tables.start]

    def need_bytes(self, node: Node) -> int:
        """Return the least bytes that must be left at `node`, whatever `node.left` says."""
        if node.end is None:
            return self._sweeps[node.state]
        return int(self._segments[node.state][node.end - self.tables.first_cut(self._boundary(node.state))])

    def _boundary(self, state: int) -> int:
        return self.tables.states[state].boundary

    def _segment_needs(self, index: int) -> _Needs:
        tables, state = self.tables, self.tables.states[index]
        first = tables.first_cut(state.boundary)
        ends = np.array([tables.standing_bytes[cut] for cut in tables.cuts[first:]], np.int64)
        needs = np.full(len(ends), _NEVER)
        leaf = int(tables.cuts[first] == state.boundary + 1)
        for keep in state.keeps:
            if leaf:
                needs[0] = min(needs[0], max(keep.replay_need_bytes + ends[0], keep.backward_need_bytes))
            rest = self._segments[keep.next_state] + keep.held_bytes
            through = np.maximum(rest, np.maximum(keep.save_need_bytes + ends[leaf:], keep.backward_need_bytes))
            needs[leaf:] = np.minimum(needs[leaf:], through)
        for number, target in enumerate(state.split_states):
            right = self._segments[int(target)] + state.split_held_bytes[number]
            run = state.split_need_bytes[number] + ends[number + 1 :]
            needs[number + 1 :] = np.minimum(needs[number + 1 :], np.maximum(np.maximum(right, run), needs[number]))
        return needs

    def _sweep_need(self, index: int) -> int:
        tables, state = self.tables, self.tables.states[index]
        if state.boundary == tables.num_blocks:
            return tables.tail_need_bytes
        need_bytes, _ = tables.run_out(state.boundary)
        needs = [max(need_bytes, int(self._segments[index][-1]))]
        for keep in state.keeps:
            rest = self._sweeps[keep.next_state] + keep.held_bytes
            needs.append(max(rest, keep.save_need_bytes, keep.backward_need_bytes))
        for number, target in enumerate(state.split_states):
            right = self._sweeps[int(target)] + int(state.split_held_bytes[number])
            left = int(self._segments[index][number])
            needs.append(max(right, left, int(state.split_need_bytes[number])))
        return min(needs)


class Thrifty:
    """A chooser that never exceeds the bytes left, counted exactly."""

    def __init__(self, floor: Floor, tree: IntervalTree, *, unit_bytes: int) -> None:
        self._floor = floor
        self._tables = floor.tables
        self._tree = tree
        self._unit = unit_bytes

    def schedule(self, left_bytes: int) -> Schedule:
        """Return a schedule whose peak, workspace left out, is at most `left_bytes`."""
        return unfold(self._tables, self, Node(self._tables.start, None, left_bytes))

    def choose(self, node: Node) -> Move:
        """Return the fastest move at `node` that surely fits (`Chooser`)."""
        moves = [*self._keeps(node), *self._splits(node)]
        if node.end is None:
            need_bytes, forward_s = self._tables.run_out(self._tables.states[node.state].boundary)
            left = Node(node.state, len(self._tables.cuts) - 1, node.left)
            moves.append((need_bytes, forward_s, RunOut(left)))
        fitting = [
            (self._seconds(seconds, move), max([0, *(self._floor.need_bytes(part) for part in _parts(move))]), k)
            for k, (need_bytes, seconds, move) in enumerate(moves)
            if need_bytes <= node.left and all(self._floor.need_bytes(part) <= part.left for part in _parts(move))
        ]
        assert fitting, f"no move at {node}: it was entered with less than it needs"
        return moves[min(fitting)[2]][2]

    def _keeps(self, node: Node) -> list[tuple[int, float, Move]]:
        state = self._tables.states[node.state]
        standing_bytes = 0 if node.end is None else self._tables.standing_bytes[self._tables.cuts[node.end]]
        is_leaf = node.end is not None and self._tables.cuts[node.end] == state.boundary + 1
        moves: list[tuple[int, float, Move]] = []
        for option, keep in enumerate(state.keeps):
            need_bytes = (keep.replay_need_bytes if is_leaf else keep.save_need_bytes) + standing_bytes
            seconds = (keep.replay_s if is_leaf else state.forward_s) + keep.backward_s
            rest = None if is_leaf else Node(keep.next_state, node.end, node.left - keep.held_bytes)
            moves.append((max(need_bytes, keep.backward_need_bytes), seconds, KeepHere(option, rest)))
        return moves

    def _splits(self, node: Node) -> list[tuple[int, float, Move]]:
        tables, state = self._tables, self._tables.states[node.state]
        first = tables.first_cut(state.boundary)
        count = len(state.split_states) if node.end is None else node.end - first
        standing_bytes = 0 if node.end is None else tables.standing_bytes[tables.cuts[node.end]]
        moves: list[tuple[int, float, Move]] = []
        for number in range(count):
            right = Node(int(state.split_states[number]), node.end, node.left - int(state.split_held_bytes[number]))
            move = SplitAt(tables.cuts[first + number], right, Node(node.state, first + number, node.left))
            need_bytes = int(state.split_need_bytes[number]) + standing_bytes
            moves.append((need_bytes, float(state.split_forward_s[number]), move))
        return moves

    def _seconds(self, seconds: float, move: Move) -> float:
        slots = [Node(part.state, part.end, -(-part.left // self._unit)) for part in _parts(move)]
        return seconds + sum(self._tree.rest_s(part) for part in slots)


def _parts(move: Move) -> list[Node]:
    match move:
        case KeepHere(_, rest):
            return [] if rest is None else [rest]
        case SplitAt(_, right, left):
            return [right, left]
        case PassBy(rest):
            return [rest]
        case RunOut(left):
            return [left]
