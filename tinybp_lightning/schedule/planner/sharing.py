"""Which segments of a chain cost the same? Equal layers are planned once.

A segment is a state and an end. Its table row depends on its own moves and on the rows they lead to, so two segments
whose moves have equal bytes and seconds, and lead to equal rows, have equal rows: in a chain of equal layers, all
segments that span the same blocks of a layer. Equality is found by 64-bit keys, built from the last block to the first;
keys of unequal segments agree with a probability of about 1e-10, and then a schedule is worse than it might be, not
wrong: the simulator judges it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.planner.states import State, Tables

__all__ = ["Sharing", "share_segments"]

_Keys = NDArray[np.uint64]
_MASK = 2**64 - 1
_ODD, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True, slots=True)
class Sharing:
    """`rows[state][k]` is the row of the segment from `state` to the `k`-th cut after its boundary.

    `own[state]` are the `k` whose row no later state has. `num_rows` counts all rows and `work` their splits.
    """

    rows: tuple[NDArray[np.int64], ...]
    own: tuple[tuple[int, ...], ...]
    num_rows: int
    work: int

    def rights(self, tables: Tables, state: int, k: int) -> NDArray[np.int64]:
        """Return the rows of what the splits of the segment from `state` to its `k`-th cut leave to the right."""
        targets = tables.states[state].split_states[:k].tolist()
        return np.array([self.rows[target][k - number - 1] for number, target in enumerate(targets)], np.int64)


def share_segments(tables: Tables) -> Sharing:
    """Return which segments of `tables` share a row."""
    num_states = len(tables.states)
    nothing = np.empty(0, np.int64)
    keys: list[_Keys] = [np.empty(0, np.uint64)] * num_states
    rows, own = [nothing] * num_states, [tuple[int, ...]()] * num_states
    known: dict[int, int] = {}
    work = 0
    for index in reversed(range(num_states)):
        state = tables.states[index]
        if state.boundary == tables.num_blocks:
            continue
        keys[index] = _segment_keys(tables, state, keys)
        new: list[int] = []
        found: list[int] = []
        for k, key in enumerate(keys[index].tolist()):
            if key not in known:
                known[key] = len(known)
                new.append(k)
            found.append(known[key])
        rows[index], own[index] = np.array(found, np.int64), tuple(new)
        work += sum(new)
    return Sharing(tuple(rows), tuple(own), len(known), work)


def _segment_keys(tables: Tables, state: State, keys: list[_Keys]) -> _Keys:
    first = tables.first_cut(state.boundary)
    leaf = int(tables.cuts[first] == state.boundary + 1)
    ends = [tables.standing_bytes[cut] for cut in tables.cuts[first:]]
    found = np.array([hash((end_bytes, leaf and k == 0)) & _MASK for k, end_bytes in enumerate(ends)], np.uint64)
    for keep in state.keeps:
        moves = (keep.held_bytes, keep.save_need_bytes, keep.replay_need_bytes, keep.backward_need_bytes)
        scalar = _scalar((*moves, keep.replay_s, keep.backward_s, state.forward_s))
        if leaf:
            found[:1] = _mixed(found[:1], found[:1], scalar)
        found[leaf:] = _mixed(found[leaf:], keys[keep.next_state], scalar)
    for number, target in enumerate(state.split_states):
        held_bytes, need_bytes = int(state.split_held_bytes[number]), int(state.split_need_bytes[number])
        scalar = _scalar((held_bytes, need_bytes, float(state.split_forward_s[number]), int(found[number])))
        found[number + 1 :] = _mixed(found[number + 1 :], keys[int(target)], scalar)
    return found


def _scalar(move: tuple[float, ...]) -> np.uint64:
    return np.uint64(hash(move) & _MASK)


def _mixed(keys: _Keys, others: _Keys, scalar: np.uint64) -> _Keys:
    mixed = (keys ^ (others * _OTHER + scalar)) * _ODD
    return mixed ^ (mixed >> np.uint64(29))
