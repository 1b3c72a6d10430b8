"""Which schedule with helpers is fastest, on a chain of equal layers? The table of `helped`, each layer's rows once.

A segment that ends before the last of the equal layers has the row of the one that is a layer further on (`layers`).
New at a boundary are only the ends in the last equal layer and behind it: `n^3 / 6` times the blocks of a layer and of
what follows the equal ones, instead of `n^4 / 24`.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.planner.extract import Node
from tinybp_lightning.schedule.planner.helped import HelperTree
from tinybp_lightning.schedule.planner.layers import Layers
from tinybp_lightning.schedule.planner.rows import INFINITE, Slots, Times, first_true
from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = ["LayeredTree", "layered_cells", "layered_work"]

_BUFFER = 2**16
"""Times that are offered at once: what stays near the processor."""


def layered_work(tables: Tables, layers: Layers) -> float:
    """Return about how many additions a table takes for each slot."""
    work = 0.0
    for state in tables.states:
        left = tables.num_blocks - state.boundary
        num_ends = tables.num_blocks - layers.first_new(state.boundary) + 1
        work += num_ends * (left**2 / 2 if state.is_passing else left)
    return work


def layered_cells(tables: Tables, layers: Layers) -> int:
    """Return how many times a table keeps for each slot."""
    num_cells = 0
    for state in tables.states:
        left = tables.num_blocks - state.boundary
        num_cells += (tables.num_blocks - layers.first_own(state.boundary) + 1) * (left if state.is_passing else 1)
        if layers.first <= state.boundary < min(layers.end, layers.first + layers.period):
            shared = layers.end - state.boundary
            num_cells += shared * (shared if state.is_passing else 1)
    return num_cells


class LayeredTree(HelperTree):
    """A `HelperTree` that is filled and kept layer by layer.

    Ends are numbered by their last block; the rest of the first sweep is one more end, `num_blocks`. Arrays have the
    axes end, slots and low: forks run over lows, and over slots only where there is a finite time.

    **Arguments:** `tables`: with every interior boundary a cut, and `passing`. `layers`: where they repeat.
    """

    def __init__(self, tables: Tables, layers: Layers, *, unit_bytes: int, num_slots: int) -> None:
        self.tables = tables
        self._slots = Slots(unit_bytes, num_slots + 1)
        self.num_slots = num_slots
        self._layers = layers
        self._first_state = [0] * (tables.num_blocks + 1)
        for index in reversed(range(len(tables.states))):
            self._first_state[tables.states[index].boundary] = index
        # Rows that equal layers share, by the place in the layer and the rank of the state, and each state's others.
        self._shared = dict[tuple[int, int], Times]()
        self._own = dict[int, Times]()
        self._buffer = np.empty(_BUFFER, np.float32)
        for boundary in reversed(range(tables.num_blocks + 1)):
            self._fill_boundary(boundary)
        self.seconds = self._own[tables.start][-1, :, 0]

    def rest_s(self, node: Node) -> float:
        """Return the least time from `node` on; infinite where nothing fits."""
        if node.left < 0:
            return INFINITE
        low = self.tables.states[node.state].boundary if node.low is None else node.low
        end = self.tables.num_blocks if node.end is None else node.end
        return self._time_s(node.state, low, end, node.left)

    def _lefts_s(self, node: Node, low: int, forks: NDArray[np.int64]) -> NDArray[np.float32]:
        boundary, ends = self.tables.states[node.state].boundary, forks - 1
        first_own = self._first_own(node.state)
        num_shared = int(np.searchsorted(ends, first_own))
        found = self._own[node.state][ends[num_shared:] - first_own, node.left, low - boundary]
        if not num_shared:
            return found
        shared = self._shared[self._place(node.state)]
        return np.concatenate([shared[ends[:num_shared] - boundary, node.left, low - boundary], found])

    def _rights_s(self, target: int, forks: NDArray[np.int64], end: int | None, slots: int) -> NDArray[np.float32]:
        last = self.tables.num_blocks if end is None else end
        return self._end(target, last)[slots, forks - self.tables.states[target].boundary]

    def _time_s(self, index: int, low: int, end: int, slots: int) -> float:
        return float(self._end(index, end)[slots, low - self.tables.states[index].boundary])

    def _end(self, index: int, end: int) -> Times:
        """The rows of one end, by their lows."""
        boundary, first = self.tables.states[index].boundary, self._first_own(index)
        return self._own[index][end - first] if end >= first else self._shared[self._place(index)][end - boundary]

    def _first_own(self, index: int) -> int:
        return self._layers.first_own(self.tables.states[index].boundary)

    def _place(self, index: int) -> tuple[int, int]:
        boundary = self.tables.states[index].boundary
        return self._layers.place(boundary), index - self._first_state[boundary]

    def _ends(self, index: int, first: int) -> Times:
        """The rows of all ends from `first` on."""
        boundary, first_own = self.tables.states[index].boundary, self._first_own(index)
        if first >= first_own:
            return self._own[index][first - first_own :]
        num_lows = self._own[index].shape[2]
        shared = self._shared[self._place(index)][first - boundary : first_own - boundary]
        found = np.full((len(shared) + len(self._own[index]), self._slots.width, num_lows), INFINITE, np.float32)
        lows = min(num_lows, first_own - boundary)
        found[: len(shared), :, :lows] = shared[..., :lows]
        found[len(shared) :] = self._own[index]
        return found

    def _fill_boundary(self, boundary: int) -> None:
        tables, first = self.tables, self._layers.first_new(boundary)
        last = self._first_state[boundary + 1] if boundary < tables.num_blocks else len(tables.states)
        here = range(self._first_state[boundary], last)
        held, lowest_slots = None, list[int]()
        if boundary < tables.num_blocks - 1:
            held = self._held_ends(tables.states[here[0]], first)
            # With few slots left times are infinite: a fork is offered from where the first end is finite.
            lowest_slots = first_true(np.isfinite(held), width=self._slots.width)
        for index in here:
            rows = self._new_rows(index, first, held, lowest_slots)
            first_own = self._first_own(index)
            self._own[index] = rows[max(0, first_own - first) :]
            if first < first_own:
                self._share(index, rows[: first_own - first], first)

    def _share(self, index: int, rows: Times, first: int) -> None:
        boundary, place = self.tables.states[index].boundary, self._place(index)
        num_ends = self._layers.end - boundary
        num_lows = num_ends if rows.shape[2] > 1 else 1
        if place not in self._shared:
            # The first boundary of its place in the layers has the most ends.
            most = self._layers.end - self._layers.first - place[0]
            is_passing = self.tables.states[index].is_passing
            shape = (most, self._slots.width, most if is_passing else 1)
            self._shared[place] = np.full(shape, INFINITE, np.float32)
        self._shared[place][first - boundary : num_ends, :, :num_lows] = rows[..., :num_lows]

    def _new_rows(self, index: int, first: int, held: Times | None, lowest_slots: list[int]) -> Times:
        """The rows of a state for all ends from `first` on.

        `held`: where holding the boundary leads, for them; `lowest_slots`: where its times begin, by the next low.
        """
        tables, state, slots = self.tables, self.tables.states[index], self._slots
        i, n = state.boundary, tables.num_blocks
        num_lows = max(1, n - i) if state.is_passing else 1
        rows = np.full((n - first + 1, slots.width, num_lows), INFINITE, np.float32)
        if i == n:
            rows[0, slots.need(tables.tail_need_bytes) :] = 0
            return rows
        self._keep(state, rows[..., 0], first)
        if held is not None:
            later = max(first, i + 1)
            if state.is_passing:
                need_bytes = tables.boundary_bytes[i] + tables.chain.blocks[i].forward_peak_bytes
                passed = self._moved_ends(state, state.pass_state, state.pass_held_bytes, need_bytes, later)
                rows[later - first :, :, 1:] = passed[..., : num_lows - 1]
            for fork, lefts in self._forks(index, rows, first):
                start, lowest = max(first, fork), lowest_slots[fork - i - 1]
                if lowest < slots.width:
                    lows = rows[start - first :, lowest:, : lefts.shape[1]]
                    self._offer_fork(lows, lefts[lowest:], held[start - later :, lowest:, fork - i - 1])
        need_bytes, forward_s = tables.run_out(i)
        start = slots.need(need_bytes)
        np.minimum(rows[-1, start:], rows[-2, start:] + np.float32(forward_s), out=rows[-1, start:])
        return rows

    def _offer_fork(self, rows: Times, lefts: Times, rights: Times) -> None:
        step = max(1, len(self._buffer) // lefts.size)
        for k in range(0, len(rows), step):
            part = rows[k : k + step]
            if part.size > len(self._buffer):
                self._buffer = np.empty(part.size, np.float32)
            through = self._buffer[: part.size].reshape(part.shape)
            np.add(lefts, rights[k : k + step, :, None], out=through)
            np.minimum(part, through, out=part)

    def _forks(self, index: int, rows: Times, first: int) -> Iterator[tuple[int, Times]]:
        """Every fork with the rows of what is left to its left, final since forks before it have been offered."""
        state = self.tables.states[index]
        i, place = state.boundary, self._place(index)
        for fork in range(i + 1, self.tables.num_blocks):
            num_lows = min(fork - i, rows.shape[2])
            if fork - 1 >= first:
                yield fork, rows[fork - 1 - first, :, :num_lows]
            else:
                yield fork, self._shared[place][fork - 1 - i, :, :num_lows]

    def _keep(self, state: State, rows: Times, first: int) -> None:
        """Offer to keep a state's block; `rows` are those of its own boundary as low."""
        slots, tables, i = self._slots, self.tables, state.boundary
        for keep in state.keeps:
            if first == i:
                start = slots.need(max(keep.replay_need_bytes + tables.standing_bytes[i + 1], keep.backward_need_bytes))
                alone = rows[0, start:]
                np.minimum(alone, np.float32(keep.replay_s + keep.backward_s), out=alone)
            later, kept_s = max(first, i + 1), np.float32(state.forward_s + keep.backward_s)
            shift = slots.held(keep.held_bytes)
            for end, rest in enumerate(self._ends(keep.next_state, later)[..., 0], later):
                standing_bytes = tables.standing_bytes[end + 1] if end < tables.num_blocks else 0
                needs = max(keep.save_need_bytes + standing_bytes, keep.backward_need_bytes)
                self._offer(rows[end - first], rest, shift, slots.need(needs), kept_s)

    def _held_ends(self, state: State, first: int) -> Times:
        held_bytes, need_bytes = int(state.split_held_bytes[0]), int(state.split_need_bytes[0])
        later = max(first, state.boundary + 1)
        return self._moved_ends(state, int(state.split_states[0]), held_bytes, need_bytes, later)

    def _moved_ends(self, state: State, target: int, held_bytes: int, need_bytes: int, first: int) -> Times:
        """The rows at the next boundary as seen from here: with what is held, and what running the block needs."""
        slots, tables = self._slots, self.tables
        shift, rest = min(slots.held(held_bytes), slots.width), self._ends(target, first)
        moved = np.full_like(rest, INFINITE)
        moved[:, shift:] = rest[:, : slots.width - shift] + np.float32(state.forward_s)
        for end, rows in enumerate(moved, first):
            standing_bytes = tables.standing_bytes[end + 1] if end < tables.num_blocks else 0
            rows[: slots.need(need_bytes + standing_bytes)] = INFINITE
        return moved
