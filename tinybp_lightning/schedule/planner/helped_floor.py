"""What is the smallest peak any schedule with helpers reaches, to the byte, and which one is fast within so many bytes?

As `floor` is to `tree`, so this is to `helped`: the same recursion with "bytes needed" in place of time. Nothing is
rounded, so a walk that only takes moves whose parts still fit ends in a schedule that keeps the budget; of those it
takes the fastest by the rounded table.
"""

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.extract import KeepHere, Move, Node, PassBy, RunOut, SplitAt, unfold
from tinybp_lightning.schedule.planner.helped import HelperTree
from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = ["HelperFloor", "ThriftyHelper"]

_Needs = NDArray[np.int64]
_NEVER = np.int64(2**62)
_SHARES = (1.0, 1.0005, 1.001, 1.002, 1.005, 1.01, 1.02, 1.03, 1.04, 1.06, 1.08, 1.12, 1.16, 1.2, 1.3, 1.4)


class HelperFloor:
    """The least bytes that every segment, and every rest of the first sweep, needs to be left.

    **Arguments:** `tables`: with every interior boundary a cut, and `passing`.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        num_states = len(tables.states)
        # `[low, end]`, both from the state's boundary on, as in `HelperTree` but not packed.
        self.segments: list[_Needs] = [np.empty((0, 0), np.int64)] * num_states
        self.sweeps: list[_Needs] = [np.empty(0, np.int64)] * num_states
        for index in reversed(range(num_states)):
            self._fill(index)
        self.smallest_bytes = int(self.sweeps[tables.start][0])

    def need_bytes(self, node: Node) -> int:
        """Return the least bytes that must be left at `node`, whatever `node.left` says."""
        boundary = self.tables.states[node.state].boundary
        low = 0 if node.low is None else node.low - boundary
        if node.end is None:
            return int(self.sweeps[node.state][low])
        return int(self.segments[node.state][low, node.end - boundary])

    def _fill(self, index: int) -> None:
        tables, state = self.tables, self.tables.states[index]
        i, count = state.boundary, tables.num_blocks - state.boundary
        num_lows = max(1, count) if state.is_passing else 1
        segment, sweep = np.full((num_lows, count), _NEVER), np.full(num_lows, _NEVER)
        self.segments[index], self.sweeps[index] = segment, sweep
        if not count:
            sweep[0] = tables.tail_need_bytes
            return
        standing = np.array(tables.standing_bytes[i + 1 :], np.int64)
        for keep in state.keeps:
            alone = max(keep.replay_need_bytes + int(standing[0]), keep.backward_need_bytes)
            segment[0, 0] = min(segment[0, 0], alone)
            if count > 1:
                rest = self.segments[keep.next_state][0] + keep.held_bytes
                need = np.maximum(keep.save_need_bytes + standing[1:], keep.backward_need_bytes)
                segment[0, 1:] = np.minimum(segment[0, 1:], np.maximum(rest, need))
            need_bytes = max(keep.save_need_bytes, keep.backward_need_bytes)
            sweep[0] = min(sweep[0], max(self.sweeps[keep.next_state][0] + keep.held_bytes, need_bytes))
        if count > 1:
            if state.is_passing:
                need_bytes = tables.boundary_bytes[i] + tables.chain.blocks[i].forward_peak_bytes
                segment[1:, 1:], sweep[1:] = self._moved(
                    state.pass_state, state.pass_held_bytes, need_bytes, standing[1:]
                )
            held_bytes, need_bytes = int(state.split_held_bytes[0]), int(state.split_need_bytes[0])
            held, held_sweep = self._moved(int(state.split_states[0]), held_bytes, need_bytes, standing[1:])
            for q in range(1, count):
                lefts = segment[:q, q - 1]
                forked = np.maximum(lefts[:, None], held[q - 1, q - 1 :])
                segment[:q, q:] = np.minimum(segment[:q, q:], forked)
                sweep[:q] = np.minimum(sweep[:q], np.maximum(lefts, held_sweep[q - 1]))
        need_bytes, _ = tables.run_out(i)
        np.minimum(sweep, np.maximum(segment[:, count - 1], need_bytes), out=sweep)

    def _moved(self, target: int, held_bytes: int, need_bytes: int, standing: _Needs) -> tuple[_Needs, _Needs]:
        """What is needed at the next boundary as seen from here, with what is held and what running the block needs."""
        segment = np.maximum(self.segments[target] + held_bytes, need_bytes + standing)
        return segment, np.maximum(self.sweeps[target] + held_bytes, need_bytes)


class ThriftyHelper:
    """A chooser that never exceeds the bytes left, counted exactly; `tree` says what is fast."""

    def __init__(self, floor: HelperFloor, tree: HelperTree, *, unit_bytes: int) -> None:
        self._floor = floor
        self._tables = floor.tables
        self._tree = tree
        self._unit = unit_bytes

    def steps(self, most_bytes: int) -> list[int]:
        """Return the bytes left of schedules worth having: the floor's, and closer above it than further up."""
        steps = [int(self._floor.smallest_bytes * share) for share in _SHARES]
        return [left_bytes for left_bytes in steps if left_bytes <= most_bytes]

    def schedule(self, left_bytes: int) -> Schedule:
        """Return a schedule whose peak, workspace left out, is at most `left_bytes`, at least the floor's."""
        return unfold(self._tables, self, Node(self._tables.start, None, left_bytes))

    def choose(self, node: Node) -> Move:
        """Return the fastest move at `node` that surely fits (`Chooser`)."""
        state = self._tables.states[node.state]
        low = state.boundary if node.low is None else node.low
        moves = self._keeps(node, state) if low == state.boundary else [self._pass(node, state, low)]
        if node.end is None:
            need_bytes, forward_s = self._tables.run_out(state.boundary)
            left = Node(node.state, self._tables.num_blocks - 1, node.left, low)
            moves.append((need_bytes, forward_s, RunOut(left), [left]))
        moves += self._holds(node, state, low)
        fitting = [
            (seconds + sum(self._rest_s(part) for part in parts), k)
            for k, (need_bytes, seconds, _, parts) in enumerate(moves)
            if need_bytes <= node.left and all(self._floor.need_bytes(part) <= part.left for part in parts)
        ]
        assert fitting, f"no move at {node}: it was entered with less than it needs"
        return moves[min(fitting)[1]][2]

    def _standing_bytes(self, node: Node) -> int:
        return 0 if node.end is None else self._tables.standing_bytes[node.end + 1]

    def _keeps(self, node: Node, state: State) -> list[tuple[int, float, Move, list[Node]]]:
        moves, standing_bytes = list[tuple[int, float, Move, list[Node]]](), self._standing_bytes(node)
        for option, keep in enumerate(state.keeps):
            if node.end == state.boundary:
                need_bytes = max(keep.replay_need_bytes + standing_bytes, keep.backward_need_bytes)
                moves.append((need_bytes, keep.replay_s + keep.backward_s, KeepHere(option, None), []))
                continue
            need_bytes = max(keep.save_need_bytes + standing_bytes, keep.backward_need_bytes)
            rest = Node(keep.next_state, node.end, node.left - keep.held_bytes)
            moves.append((need_bytes, state.forward_s + keep.backward_s, KeepHere(option, rest), [rest]))
        return moves

    def _pass(self, node: Node, state: State, low: int) -> tuple[int, float, Move, list[Node]]:
        rest = Node(state.pass_state, node.end, node.left - state.pass_held_bytes, low)
        own_bytes = self._tables.boundary_bytes[state.boundary]
        need_bytes = own_bytes + self._tables.chain.blocks[state.boundary].forward_peak_bytes
        return need_bytes + self._standing_bytes(node), state.forward_s, PassBy(rest), [rest]

    def _holds(self, node: Node, state: State, low: int) -> list[tuple[int, float, Move, list[Node]]]:
        """Return the ways to hold the boundary, those that do not fit left out."""
        last = self._tables.num_blocks - 1 if node.end is None else node.end
        if last <= low:
            return []
        i, target = state.boundary, int(state.split_states[0])
        left_bytes = node.left - int(state.split_held_bytes[0])
        forks = np.arange(low + 1, last + 1)
        lefts = self._floor.segments[node.state][low - i, forks - 1 - i]
        if node.end is None:
            rights = self._floor.sweeps[target][forks - i - 1]
        else:
            rights = self._floor.segments[target][forks - i - 1, node.end - i - 1]
        need_bytes = int(state.split_need_bytes[0]) + self._standing_bytes(node)
        moves = list[tuple[int, float, Move, list[Node]]]()
        for q in forks[(lefts <= node.left) & (rights <= left_bytes)].tolist():
            right = Node(target, node.end, left_bytes, q)
            left = Node(node.state, q - 1, node.left, low)
            moves.append((need_bytes, state.forward_s, SplitAt(i + 1, right, left), [right, left]))
        return moves

    def _rest_s(self, node: Node) -> float:
        slots = min(-(-node.left // self._unit), self._tree.num_slots)
        return self._tree.rest_s(Node(node.state, node.end, slots, node.low))
