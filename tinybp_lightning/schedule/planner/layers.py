"""Where does a chain repeat itself? The blocks of equal layers, by which tables are shared.

Block `i` and block `i + period` do the same when all their moves have equal bytes and seconds and lead to states of the
same rank. What a segment costs depends on the moves of its blocks alone, so inside the run of equal layers segments
that are whole periods apart cost the same, to the last bit.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = ["Layers", "find_layers", "move_signatures"]

_LONGEST_PERIOD = 48


@dataclass(frozen=True, slots=True)
class Layers:
    """Blocks `first .. end - 1` repeat with `period`; `first == end` where nothing does.

    Ends are numbered by their last block. Boundaries of equal layers share what belongs to ends in these.
    """

    first: int
    end: int
    period: int

    def first_new(self, boundary: int) -> int:
        """Return the first end that a boundary does not share with a later one."""
        return max(boundary, self.end - self.period) if boundary >= self.first else boundary

    def first_own(self, boundary: int) -> int:
        """Return the first end that a boundary shares with none."""
        return self.end if self.first <= boundary < self.end else boundary

    def place(self, boundary: int) -> int:
        """Return where in its layer a boundary is."""
        return (boundary - self.first) % self.period


def find_layers(signatures: Sequence[Hashable]) -> Layers:
    """Return the longest run of equal layers: `signatures` are equal for blocks that do the same."""
    num_blocks, best, best_length = len(signatures), Layers(0, 0, 1), 0
    for period in range(1, min(_LONGEST_PERIOD, num_blocks // 2) + 1):
        length = 0
        for i in range(num_blocks - period + 1):
            if i < num_blocks - period and signatures[i] == signatures[i + period]:
                length += 1
                continue
            if length > best_length:
                best, best_length = Layers(i - length, i + period, period), length
            length = 0
    return best


def move_signatures(tables: Tables) -> list[Hashable]:
    """Return for every block of `tables`, which have `passing`, all that its moves are made of."""
    starts = dict[int, int]()
    for index, state in enumerate(tables.states):
        starts.setdefault(state.boundary, index)
    return [
        (
            tables.boundary_bytes[i],
            tables.standing_bytes[i + 1],
            tables.chain.blocks[i].forward_peak_bytes,
            *(_moves(state, starts[i + 1]) for state in tables.states[starts[i] : starts[i + 1]]),
        )
        for i in range(tables.num_blocks)
    ]


def _moves(state: State, after: int) -> Hashable:
    keeps = tuple(
        (
            keep.next_state - after,
            keep.held_bytes,
            keep.save_need_bytes,
            keep.replay_need_bytes,
            keep.backward_need_bytes,
            keep.replay_s,
            keep.backward_s,
        )
        for keep in state.keeps
    )
    hold: tuple[int, ...] = ()
    if len(state.split_states):
        hold = (
            int(state.split_states[0]) - after,
            int(state.split_held_bytes[0]),
            int(state.split_need_bytes[0]),
        )
    passes = (state.pass_state - after, state.pass_held_bytes) if state.pass_state >= 0 else ()
    return state.forward_s, state.is_passing, keeps, hold, passes
