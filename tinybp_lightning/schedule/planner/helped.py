"""Does it pay to store a boundary for a while and make it again later? The interval tree with *helpers*, by arrays.

The tree of `tree` is *persistent*: a stored boundary stays until its own block is reversed. Beaumont et al. (named
there) show that the best schedule need not be: a boundary may help to reach later blocks several times, be released
where bytes are short, and be made again for its own block. Here a segment has three boundaries: from `i` at hand,
reverse the blocks `low .. end`, and then `i` is needed no more. A split may give a boundary as helper for the blocks
`q .. end` only; the rest, `low .. q-1`, starts from `i` again.

A split to a far boundary is here a chain of small ones: *hold* boundary `i`, run block `i`, go on from `i + 1`; or
*pass*, and release `i`. So all moves lead to `i` or `i + 1`, a table is filled from the one behind it, and filling
takes `n^4 / 24` times the number of slots and states in steps. For chains of some dozens of blocks, where budgets are
tight.

It leaves out runs that come before the backward of a block that is due first. They pay where a gradient weighs more
than the saved set it replaces, or beside a heavy skip: of 825 plans for 275 random chains of 6 to 10 blocks, 8 were
slower than the optimum of `milp`, by 8.3 % at most. `exact` finds these on very short chains.
"""

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.extract import KeepHere, Move, Node, PassBy, RunOut, SplitAt, unfold
from tinybp_lightning.schedule.planner.rows import INFINITE, Slots, Times
from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = ["HelperTree", "helper_rows"]


def helper_rows(tables: Tables) -> int:
    """Return how many rows, one for each segment, the table of a chain has."""
    n = tables.num_blocks
    lefts = [(s, n - s.boundary) for s in tables.states]
    return sum((left + 1) * left // 2 if s.is_passing else left for s, left in lefts) + len(tables.states)


class HelperTree:
    """The filled table; `seconds[m]` is the least time of a whole step with `m` slots of `unit_bytes` left.

    **Arguments:** `tables`: with every interior boundary a cut, and `passing`.
    """

    def __init__(self, tables: Tables, *, unit_bytes: int, num_slots: int) -> None:
        self.tables = tables
        self._slots = Slots(unit_bytes, num_slots + 1)
        self.num_slots = num_slots
        # Rows of `(low, end)` with `boundary <= low < end`, and rows of `low` for the rest of the first sweep; where no
        # block may be passed only those of `low = boundary`.
        self._segments: list[Times] = [np.empty((0, 0), np.float32)] * len(tables.states)
        self._sweeps: list[Times] = [np.empty((0, 0), np.float32)] * len(tables.states)
        after: dict[int, Times] = {}
        for boundary in reversed(range(tables.num_blocks + 1)):
            here = [k for k, state in enumerate(tables.states) if state.boundary == boundary]
            held = self._held(tables.states[here[0]], after)
            after = {k: self._fill(k, held, after) for k in here}
        self.seconds = self._sweeps[tables.start][0]

    def schedule(self, slots: int) -> Schedule:
        """Return the fastest schedule for `slots`, in the table's rounded bytes."""
        return unfold(self.tables, self, Node(self.tables.start, None, slots))

    def choose(self, node: Node) -> Move:
        """Return the best move at `node` (`Chooser`)."""
        state = self.tables.states[node.state]
        low = state.boundary if node.low is None else node.low
        moves = self._keeps(node, state) if low == state.boundary else [self._pass(node, state, low)]
        if node.end is None:
            need_bytes, forward_s = self.tables.run_out(state.boundary)
            left = Node(node.state, self.tables.num_blocks - 1, node.left, low)
            if node.left >= self._slots.need(need_bytes):
                moves.append((forward_s + self.rest_s(left), RunOut(left)))
        moves += self._hold(node, state, low)
        best_s, best = min(moves, key=lambda move: move[0])
        assert best_s < INFINITE, f"no move at {node}: the table said that one fits"
        return best

    def _fill(self, index: int, held: tuple[Times, Times] | None, after: dict[int, Times]) -> Times:
        """Fill the rows of one state from the unpacked rows of the states at the next boundary.

        `held` are those of the state where holding the boundary leads. A state that no block is passed with has the
        rows of its own boundary alone.
        """
        tables, state, slots = self.tables, self.tables.states[index], self._slots
        i, count = state.boundary, tables.num_blocks - state.boundary
        num_lows = max(1, count) if state.is_passing else 1
        segment = np.full((num_lows, count, slots.width), INFINITE, np.float32)
        sweep = np.full((num_lows, slots.width), INFINITE, np.float32)
        self._sweeps[index] = sweep
        if not count:
            sweep[0, slots.need(tables.tail_need_bytes) :] = 0
            return segment
        self._fill_keeps(state, segment, sweep, after)
        if held is not None:
            if state.is_passing:
                need_bytes = tables.boundary_bytes[i] + tables.chain.blocks[i].forward_peak_bytes
                passed = self._moved(state, state.pass_state, state.pass_held_bytes, need_bytes, after)
                segment[1:, 1:], sweep[1:] = passed
            for q in range(1, count):
                lefts, lows = segment[:q, q - 1], segment[:q, q:]
                np.minimum(lows, lefts[:, None] + held[0][q - 1, q - 1 :], out=lows)
                np.minimum(sweep[:q], lefts + held[1][q - 1], out=sweep[:q])
        need_bytes, forward_s = tables.run_out(i)
        start = slots.need(need_bytes)
        through = segment[:, count - 1, start:] + np.float32(forward_s)
        np.minimum(sweep[:, start:], through, out=sweep[:, start:])
        self._segments[index] = segment[np.triu_indices(count)] if state.is_passing else segment[0]
        return segment

    def _held(self, state: State, after: dict[int, Times]) -> tuple[Times, Times] | None:
        """The rows where holding a state's boundary leads, the same for all states there; `None` for the last two."""
        if not len(state.split_states):
            return None
        held_bytes, need_bytes = int(state.split_held_bytes[0]), int(state.split_need_bytes[0])
        return self._moved(state, int(state.split_states[0]), held_bytes, need_bytes, after)

    def _fill_keeps(self, state: State, segment: Times, sweep: Times, after: dict[int, Times]) -> None:
        slots, standing, i = self._slots, self.tables.standing_bytes, state.boundary
        for keep in state.keeps:
            start = slots.need(max(keep.replay_need_bytes + standing[i + 1], keep.backward_need_bytes))
            alone = segment[0, 0, start:]
            np.minimum(alone, np.float32(keep.replay_s + keep.backward_s), out=alone)
            shift, kept_s = slots.held(keep.held_bytes), np.float32(state.forward_s + keep.backward_s)
            for k in range(1, segment.shape[1]):
                needs = max(keep.save_need_bytes + standing[i + 1 + k], keep.backward_need_bytes)
                self._offer(segment[0, k], after[keep.next_state][0, k - 1], shift, slots.need(needs), kept_s)
            needs = max(keep.save_need_bytes, keep.backward_need_bytes)
            self._offer(sweep[0], self._sweeps[keep.next_state][0], shift, slots.need(needs), kept_s)

    def _offer(self, times: Times, rest: Times, shift: int, need: int, seconds: np.float32) -> None:
        start, width = max(shift, need), self._slots.width
        if start < width:
            np.minimum(times[start:], rest[start - shift : width - shift] + seconds, out=times[start:])

    def _moved(
        self, state: State, target: int, held_bytes: int, need_bytes: int, after: dict[int, Times]
    ) -> tuple[Times, Times]:
        """The rows at the next boundary as seen from here: with what is held, and what running the block needs."""
        slots, i = self._slots, state.boundary
        shift, forward_s = min(slots.held(held_bytes), slots.width), np.float32(state.forward_s)
        segment, sweep = np.full_like(after[target], INFINITE), np.full_like(self._sweeps[target], INFINITE)
        segment[:, :, shift:] = after[target][:, :, : slots.width - shift] + forward_s
        sweep[:, shift:] = self._sweeps[target][:, : slots.width - shift] + forward_s
        for k in range(segment.shape[1]):
            segment[:, k, : slots.need(need_bytes + self.tables.standing_bytes[i + 2 + k])] = INFINITE
        sweep[:, : slots.need(need_bytes)] = INFINITE
        return segment, sweep

    def _standing_bytes(self, node: Node) -> int:
        return 0 if node.end is None else self.tables.standing_bytes[node.end + 1]

    def _keeps(self, node: Node, state: State) -> list[tuple[float, Move]]:
        moves, standing_bytes = list[tuple[float, Move]](), self._standing_bytes(node)
        for option, keep in enumerate(state.keeps):
            rest, seconds, need_bytes = None, keep.replay_s + keep.backward_s, keep.replay_need_bytes
            if node.end is None or node.end > state.boundary:
                rest = Node(keep.next_state, node.end, node.left - self._slots.held(keep.held_bytes))
                seconds, need_bytes = state.forward_s + keep.backward_s, keep.save_need_bytes
            if node.left >= self._slots.need(max(need_bytes + standing_bytes, keep.backward_need_bytes)):
                moves.append((seconds + (self.rest_s(rest) if rest else 0.0), KeepHere(option, rest)))
        return moves

    def _pass(self, node: Node, state: State, low: int) -> tuple[float, Move]:
        i, tables = state.boundary, self.tables
        rest = Node(state.pass_state, node.end, node.left - self._slots.held(state.pass_held_bytes), low)
        need_bytes = tables.boundary_bytes[i] + tables.chain.blocks[i].forward_peak_bytes + self._standing_bytes(node)
        fits = node.left >= self._slots.need(need_bytes)
        return (state.forward_s + self.rest_s(rest) if fits else INFINITE), PassBy(rest)

    def _hold(self, node: Node, state: State, low: int) -> list[tuple[float, Move]]:
        """Return the best way to hold the boundary, if there is one."""
        last = self.tables.num_blocks - 1 if node.end is None else node.end
        if last <= low:
            return []
        need_bytes = int(state.split_need_bytes[0]) + self._standing_bytes(node)
        slots, target = node.left - self._slots.held(int(state.split_held_bytes[0])), int(state.split_states[0])
        if node.left < self._slots.need(need_bytes) or slots < 0:
            return []
        # Ends are numbered by their last block: the parts are `low .. q-1` and `q .. end`.
        q = np.arange(low + 1, last + 1)
        lefts, rights = self._lefts_s(node, low, q), self._rights_s(target, q, node.end, slots)
        total_s = lefts + rights
        k = int(total_s.argmin())
        right = Node(target, node.end, slots, int(q[k]))
        left = Node(node.state, int(q[k]) - 1, node.left, low)
        return [(state.forward_s + float(total_s[k]), SplitAt(state.boundary + 1, right, left))]

    def _lefts_s(self, node: Node, low: int, forks: NDArray[np.int64]) -> NDArray[np.float32]:
        """The least times of `low .. q-1` from a node, for many `q`."""
        return self._segments[node.state][self._rows(node.state, np.full_like(forks, low), forks - 1), node.left]

    def _rights_s(self, target: int, forks: NDArray[np.int64], end: int | None, slots: int) -> NDArray[np.float32]:
        """The least times of `q .. end` from a state, for many `q`."""
        if end is None:
            return self._sweeps[target][forks - self.tables.states[target].boundary, slots]
        return self._segments[target][self._rows(target, forks, np.full_like(forks, end)), slots]

    def _rows(self, index: int, lows: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """The packed rows of segments `low .. end`."""
        i = self.tables.states[index].boundary
        count, low = self.tables.num_blocks - i, lows - i
        return low * count - low * (low - 1) // 2 + ends - lows

    def rest_s(self, node: Node) -> float:
        """Return the least time from `node` on; infinite where nothing fits."""
        if node.left < 0:
            return INFINITE
        boundary = self.tables.states[node.state].boundary
        low = boundary if node.low is None else node.low
        if node.end is None:
            return float(self._sweeps[node.state][low - boundary, node.left])
        row = self._rows(node.state, np.array([low]), np.array([node.end]))
        return float(self._segments[node.state][row[0], node.left])
