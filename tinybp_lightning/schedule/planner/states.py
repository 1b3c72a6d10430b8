"""Model a chain for the planner: the states of a persistent schedule, the moves between them, and their exact bytes.

# Note [Bytes left]
A *segment* reverses blocks `i .. j-1` from boundary `i`, which is at hand: stored, or the cursor. What it may use, its
*bytes left*, is the budget less all storages and private bytes that earlier decisions keep alive, except the storages
of boundary `i` itself, which count inside. So a storage that many boundaries share is paid for when the planning leaves
the last boundary that contains it, and never twice. From boundary `i` there are two moves:

- *split* at `k`: run to `k`, reverse `k .. j-1` with `bytes(S_i - S_k)` less, then `i .. k-1` with all bytes left.
  By the chain's invariant (a storage belongs to consecutive boundaries) what is alive and lies in `S_k` lies in `S_i`.
- *keep* block `i` with an option: reverse `i+1 .. j-1`, with less by the option's private bytes and by the storages
  outside `S_(i+1)` that the option or an earlier decision keeps alive; boundary `i` itself is released.

What earlier decisions keep alive is part of the state: a state is a boundary and the subset of its storages that is
live from outside. There are few such subsets: after a split at `k` it is `S_i & S_k`, whatever came before.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain, SavedSet

__all__ = ["Keep", "State", "StateModel", "storable_boundaries"]

_MANY_STATES = 400
"""About how many states a long chain may have; short ones have up to 8 subsets at a boundary, enough to be exact."""
_MAX_WINDOW = 4


@dataclass(frozen=True, slots=True)
class Keep:
    """The move that keeps a block's saved set: where it leads, what stays alive, and what must be left for it.

    `save_need_bytes` and `replay_need_bytes` come on top of `StateModel.baseline_bytes` of the segment's end;
    `backward_need_bytes` includes it.
    """

    option: int
    next_state: int
    kept_bytes: int
    save_need_bytes: int
    replay_need_bytes: int
    backward_need_bytes: int
    replay_s: float
    backward_s: float


@dataclass(frozen=True, slots=True)
class State:
    """Boundary `boundary` is at hand and some of its storages are live from outside.

    The split arrays have one entry for each cut after the boundary, the last boundary excepted, in ascending order.
    """

    boundary: int
    forward_s: float
    keeps: tuple[Keep, ...]
    split_states: NDArray[np.int64]
    split_kept_bytes: NDArray[np.int64]
    split_need_bytes: NDArray[np.int64]
    split_forward_s: NDArray[np.float64]


class StateModel:
    """A chain's states in order of their boundaries; a step starts from state 0.

    `cuts` are the boundaries a segment may end at, the last included.

    **Arguments:** `cuts`: ascending interior boundaries where a plan may store; it only passes the others.
    """

    def __init__(self, chain: Chain, *, cuts: tuple[int, ...]) -> None:
        self.chain = chain
        self.num_blocks = len(chain.blocks)
        self.cuts = (*cuts, self.num_blocks)
        size = chain.storage_bytes
        self._first_cuts = [int(x) for x in np.searchsorted(self.cuts, range(self.num_blocks + 1), side="right")]
        self._sets = [frozenset(int(s) for s in b.storages if size[s]) for b in chain.boundaries]
        self._overlap = self._overlaps()
        self.boundary_bytes = [int(x) for x in np.diagonal(self._overlap)]
        self.baseline_bytes = self._baseline_bytes()
        # What must be left at the last boundary for the caller's code after the last block.
        self.tail_need_bytes = self.boundary_bytes[-1] + chain.tail_peak_bytes
        first, self._index = 0, list[dict[frozenset[int], int]]()
        subsets_of = self._find_subsets()
        for subsets in subsets_of:
            self._index.append({subset: first + k for k, subset in enumerate(subsets)})
            first += len(subsets)
        # Segments are numbered: `segment_offset[state] + end`, with `end` an index in `cuts`.
        counts = [len(self.cuts) - self._first_cuts[i] for i, subsets in enumerate(subsets_of) for _ in subsets]
        firsts = [self._first_cuts[i] for i, subsets in enumerate(subsets_of) for _ in subsets]
        self.segment_offset = np.cumsum([0, *counts[:-1]]) - np.array(firsts)
        self.num_segments = sum(counts)
        self._run_need = self._run_needs()
        self._forward_s = np.array([block.forward_s for block in chain.blocks])
        self.states = [self._state(i, outside) for i, subsets in enumerate(subsets_of) for outside in subsets]

    def run_out(self, boundary: int) -> tuple[int, float]:
        """Return what must be left at `boundary`, and the seconds, to run to the end and through the tail."""
        last_bytes = self.boundary_bytes[-1] - int(self._overlap[boundary, self.num_blocks])
        tail_bytes = self.boundary_bytes[boundary] + last_bytes + self.chain.tail_peak_bytes
        need_bytes = max(int(self._run_need[boundary, self.num_blocks]), tail_bytes)
        return need_bytes, float(self._forward_s[boundary:].sum())

    def first_cut(self, boundary: int) -> int:
        """Return the index in `cuts` of the first one after `boundary`."""
        return self._first_cuts[boundary]

    def first_segment(self, state: int) -> int:
        """Return the number of the segment from `state` to the first cut after it."""
        return int(self.segment_offset[state]) + self.first_cut(self.states[state].boundary)

    def _overlaps(self) -> NDArray[np.int64]:
        size = np.array(self.chain.storage_bytes, np.int64)
        member = np.zeros((self.num_blocks + 1, len(size)), np.float64)
        for i, storages in enumerate(self._sets):
            member[i, sorted(storages)] = 1
        # Products of bytes up to 2**53 are exact in float64, and float64 products are fast.
        return np.rint((member * size) @ member.T).astype(np.int64)

    def _baseline_bytes(self) -> list[int]:
        """Bytes alive for other reasons while segments that end at boundary `j` are reversed."""
        chain, gradients, baseline = self.chain, 0, [0] * (self.num_blocks + 1)
        for j in reversed(range(self.num_blocks + 1)):
            baseline[j] = chain.tail_live_bytes + chain.boundaries[j].gradient_bytes + gradients
            gradients += chain.blocks[j - 1].parameter_gradient_bytes if j else 0
        return baseline

    def _run_needs(self) -> NDArray[np.int64]:
        """`[i, k]`: what must be left at `i` to run forward to `k` with boundary `i` kept."""
        n, own = self.num_blocks, np.array(self.boundary_bytes)
        peaks = np.array([block.forward_peak_bytes for block in self.chain.blocks])
        during = own[:, None] + own[None, :n] - self._overlap[:, :n] + peaks[None, :]
        during[np.arange(n)[None, :] < np.arange(n + 1)[:, None]] = 0
        need = np.zeros((n + 1, n + 1), np.int64)
        need[:, 1:] = np.maximum.accumulate(during, axis=1)
        return need

    def _find_subsets(self) -> list[tuple[frozenset[int], ...]]:
        """The subsets that can be live from outside at every boundary. The union replaces rare ones, which is safe."""
        most = int(np.clip(_MANY_STATES // self.num_blocks, 2, 8))
        found: list[dict[frozenset[int], None]] = [{} for _ in self._sets]
        found[0][self._sets[0]] = None
        for i, storages in enumerate(self._sets):
            found[i] = self._fewer(found[i], most)
            if i < self.num_blocks:
                for outside in found[i]:
                    for option in self.chain.blocks[i].options:
                        found[i + 1][self._after_keep(i, outside, option)] = None
            for cut in self.cuts[self.first_cut(i) : -1]:
                found[cut][storages & self._sets[cut]] = None
        return [tuple(subsets) for subsets in found]

    def _fewer(self, subsets: dict[frozenset[int], None], max_subsets: int) -> dict[frozenset[int], None]:
        if len(subsets) <= max_subsets:
            return subsets
        smallest = sorted(subsets, key=lambda s: (self._bytes(s), sorted(s)))[: max_subsets - 1]
        return dict.fromkeys([*smallest, frozenset[int]().union(*subsets)])

    def _locate(self, boundary: int, outside: frozenset[int]) -> int:
        """The state of `outside`, or the cheapest one that includes all of it."""
        index = self._index[boundary]
        if outside in index:
            return index[outside]
        covers: list[frozenset[int]] = [subset for subset in index if outside <= subset]
        return index[min(covers, key=lambda s: (self._bytes(s), sorted(s)))]

    def _after_keep(self, i: int, outside: frozenset[int], option: SavedSet) -> frozenset[int]:
        return (outside | self._saved(option)) & self._sets[i + 1]

    def _saved(self, option: SavedSet) -> frozenset[int]:
        return frozenset(int(s) for s in option.storages if self.chain.storage_bytes[s])

    def _bytes(self, storages: frozenset[int]) -> int:
        return sum(self.chain.storage_bytes[s] for s in storages)

    def _state(self, i: int, outside: frozenset[int]) -> State:
        if i == self.num_blocks:
            nothing = np.zeros(0, np.int64)
            return State(i, 0.0, (), nothing, nothing, nothing, np.zeros(0))
        interior = self.cuts[self.first_cut(i) : -1]
        cuts = np.array(interior, np.int64)
        targets = [self._locate(k, self._sets[i] & self._sets[k]) for k in interior]
        return State(
            boundary=i,
            forward_s=self.chain.blocks[i].forward_s,
            keeps=tuple(self._keep(i, outside, o) for o in range(len(self.chain.blocks[i].options))),
            split_states=np.array(targets, np.int64),
            split_kept_bytes=self.boundary_bytes[i] - self._overlap[i, cuts],
            split_need_bytes=self._run_need[i, cuts],
            # Summed from here, not as a difference of totals: equal layers get equal sums, to the last bit.
            split_forward_s=np.cumsum(self._forward_s[i:])[cuts - i - 1],
        )

    def _keep(self, i: int, outside: frozenset[int], index: int) -> Keep:
        block = self.chain.blocks[i]
        option, here, after = block.options[index], self._sets[i], self._sets[i + 1]
        saved = self._saved(option)
        alive_bytes = self._bytes(outside | saved) + option.saved_bytes
        backward_bytes = option.backward_peak_bytes + block.parameter_gradient_bytes
        return Keep(
            option=index,
            next_state=self._locate(i + 1, self._after_keep(i, outside, option)),
            kept_bytes=self._bytes((outside | saved) - after) + option.saved_bytes,
            save_need_bytes=max(
                self.boundary_bytes[i] + option.save_peak_bytes,
                self._bytes(here | saved | after) + option.saved_bytes,
            ),
            replay_need_bytes=max(
                self.boundary_bytes[i] + option.replay_peak_bytes, self._bytes(here | saved) + option.saved_bytes
            ),
            backward_need_bytes=alive_bytes + backward_bytes + self.baseline_bytes[i + 1],
            replay_s=option.replay_s,
            backward_s=option.backward_s,
        )


def storable_boundaries(chain: Chain, *, limit: int) -> tuple[int, ...]:
    """Return the interior boundaries where a plan may store: all of them on short chains, else the narrow ones.

    **Arguments:** `limit`: the most boundaries to return. A window widens until those that are narrowest in theirs,
    ties included, are few enough; where all are alike, every second or third one is as good.
    """
    num_blocks = len(chain.blocks)
    size = [sum(chain.storage_bytes[s] for s in boundary.storages) for boundary in chain.boundaries]
    cuts = tuple(range(1, num_blocks))
    for window in range(1, _MAX_WINDOW + 1):
        if len(cuts) > limit:
            cuts = tuple(i for i in range(1, num_blocks) if size[i] <= min(size[max(1, i - window) : i + window + 1]))
    return cuts[:: -(-len(cuts) // limit) or 1]
