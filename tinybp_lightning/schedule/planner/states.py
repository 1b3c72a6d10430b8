"""What does the interval tree need to know about a chain? Its states, the moves between them, and their exact bytes.

# Note [Bytes left]
A segment of the tree reverses blocks `i .. j-1` from boundary `i`, which is at hand (stored, or the cursor). What it
may use, its *bytes left*, is the budget less all storages and private bytes held by earlier decisions, except the
storages of boundary `i` itself: those are inside. So a storage that many boundaries share is paid for when the planning
leaves the last boundary that contains it, and never twice. From boundary `i` there are two moves:

- *split* at `k`: run to `k`, reverse `k .. j-1` with `bytes(S_i - S_k)` less, then `i .. k-1` with all bytes left.
  By the chain's invariant (a storage belongs to consecutive boundaries) what is held and lies in `S_k` lies in `S_i`.
- *keep* block `i` with an option: reverse `i+1 .. j-1`, with less by the option's private bytes and by the storages
  outside `S_(i+1)` that the option or an earlier decision holds; boundary `i` itself is released.

"An earlier decision holds" is part of the state: a state is a boundary and the subset `H` of its storages that is held
from before. There are few such subsets: after a split at `k`, `H` is `S_i & S_k`, whatever came before.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain, SavedSet

__all__ = ["Keep", "State", "Tables"]

_MANY_STATES = 400
"""About how many states a long chain may have; short ones have up to 8 subsets at a boundary, enough to be exact."""
_MANY_PASSED, _MANY_KEPT = 5, 64
"""How many subsets of each kind a boundary may have with `passing`: skips make many, the first kind is expensive."""


@dataclass(frozen=True, slots=True)
class Keep:
    """The move that keeps a block's saved set: where it leads, what it holds and what it needs to be left.

    `save_need_bytes` and `replay_need_bytes` come on top of `Tables.standing_bytes` of the segment's end;
    `backward_need_bytes` includes it.
    """

    option: int
    next_state: int
    held_bytes: int
    save_need_bytes: int
    replay_need_bytes: int
    backward_need_bytes: int
    replay_s: float
    backward_s: float


@dataclass(frozen=True, slots=True)
class State:
    """Boundary `boundary` is at hand and the storages `held` of it are held from before.

    The split arrays have one entry for each cut after the boundary, the last boundary excepted, in ascending order.
    """

    boundary: int
    held: frozenset[int]
    forward_s: float
    keeps: tuple[Keep, ...]
    split_states: NDArray[np.int64]
    split_held_bytes: NDArray[np.int64]
    split_need_bytes: NDArray[np.int64]
    split_forward_s: NDArray[np.float64]
    is_passing: bool
    """Whether blocks may be run and left for a later part from here: not after a block was kept, since the next end is
    due then; holding the boundary comes first.
    """
    pass_state: int
    """Where running the block and releasing the boundary leads; -1 where that may not be."""
    pass_held_bytes: int


class Tables:
    """A chain's states in order of their boundaries; `cuts` are the boundaries a segment may end at, the last included.

    **Arguments:** `cuts`: ascending interior boundaries where a plan may store; others are only passed.
    `passing`: also find the states that `helped` needs, where a boundary is released with its block not kept.
    """

    def __init__(self, chain: Chain, *, cuts: tuple[int, ...], passing: bool = False) -> None:
        self.chain = chain
        self.num_blocks = len(chain.blocks)
        self._passing = passing
        self.cuts = (*cuts, self.num_blocks)
        size = chain.storage_bytes
        self._first_cuts = [int(x) for x in np.searchsorted(self.cuts, range(self.num_blocks + 1), side="right")]
        self._sets = [frozenset(int(s) for s in b.storages if size[s]) for b in chain.boundaries]
        self._overlap = self._overlaps()
        self.boundary_bytes = [int(x) for x in np.diagonal(self._overlap)]
        self.standing_bytes = self._standing_bytes()
        self._passed, kept = self._find_subsets()
        self._subsets = [(*passed, *others) for passed, others in zip(self._passed, kept, strict=True)]
        first, self._index = 0, list[dict[frozenset[int], int]]()
        for subsets in self._subsets:
            self._index.append({subset: first + k for k, subset in enumerate(subsets)})
            first += len(subsets)
        self._run_need = self._run_needs()
        self._forward_s = np.array([block.forward_s for block in chain.blocks])
        self.states = [self._state(i, held) for i, subsets in enumerate(self._subsets) for held in subsets]

    @property
    def start(self) -> int:
        """The state before block 0."""
        return 0

    @cached_property
    def tail_need_bytes(self) -> int:
        """What must be left at the last boundary for the caller's code after the last block."""
        return self.boundary_bytes[-1] + self.chain.tail_peak_bytes

    def run_out(self, boundary: int) -> tuple[int, float]:
        """Return what must be left at `boundary`, and the seconds, to run to the end and through the tail."""
        union_bytes = self.union_bytes(boundary, self.num_blocks)
        need_bytes = max(int(self._run_need[boundary, self.num_blocks]), union_bytes + self.chain.tail_peak_bytes)
        return need_bytes, float(self._forward_s[boundary:].sum())

    def union_bytes(self, first: int, second: int) -> int:
        """Return the bytes of two boundaries held at once."""
        return self.boundary_bytes[first] + self.boundary_bytes[second] - int(self._overlap[first, second])

    def first_cut(self, boundary: int) -> int:
        """Return the index in `cuts` of the first one after `boundary`."""
        return self._first_cuts[boundary]

    def _overlaps(self) -> NDArray[np.int64]:
        size = np.array(self.chain.storage_bytes, np.int64)
        member = np.zeros((self.num_blocks + 1, len(size)), np.float64)
        for i, storages in enumerate(self._sets):
            member[i, sorted(storages)] = 1
        # Products of bytes up to 2**53 are exact in float64, and float64 products are fast.
        return np.rint((member * size) @ member.T).astype(np.int64)

    def _standing_bytes(self) -> list[int]:
        """Bytes alive for other reasons while segments that end at boundary `j` are reversed."""
        chain, gradients, standing = self.chain, 0, [0] * (self.num_blocks + 1)
        for j in reversed(range(self.num_blocks + 1)):
            standing[j] = chain.tail_live_bytes + chain.boundaries[j].gradient_bytes + gradients
            gradients += chain.blocks[j - 1].parameter_gradient_bytes if j else 0
        return standing

    def _run_needs(self) -> NDArray[np.int64]:
        """`[i, k]`: what must be left at `i` to run forward to `k` with boundary `i` kept."""
        n, own = self.num_blocks, np.array(self.boundary_bytes)
        peaks = np.array([block.forward_peak_bytes for block in self.chain.blocks])
        during = own[:, None] + own[None, :n] - self._overlap[:, :n] + peaks[None, :]
        during[np.arange(n)[None, :] < np.arange(n + 1)[:, None]] = 0
        need = np.zeros((n + 1, n + 1), np.int64)
        need[:, 1:] = np.maximum.accumulate(during, axis=1)
        return need

    def _find_subsets(self) -> tuple[list[tuple[frozenset[int], ...]], list[tuple[frozenset[int], ...]]]:
        """The held subsets that can occur at every boundary: those a block may be passed with, and the others.

        Without `passing` all are of the first kind. Rare ones give way to their union, which is safe.
        """
        most = int(np.clip(_MANY_STATES // self.num_blocks, 2, 8))
        most_passed, most_kept = (_MANY_PASSED, _MANY_KEPT) if self._passing else (most, 0)
        passed: list[dict[frozenset[int], None]] = [{} for _ in self._sets]
        kept: list[dict[frozenset[int], None]] = [{} for _ in self._sets]
        passed[0][self._sets[0]] = None
        for i, storages in enumerate(self._sets):
            passed[i] = self._fewer(passed[i], most_passed)
            kept[i] = self._fewer({s: None for s in kept[i] if s not in passed[i]}, most_kept)
            if i < self.num_blocks:
                after_keep = kept[i + 1] if self._passing else passed[i + 1]
                for held in passed[i] | kept[i]:
                    for option in self.chain.blocks[i].options:
                        after_keep[self._after_keep(i, held, option)] = None
                if self._passing:
                    passed[i + 1] |= {held & self._sets[i + 1]: None for held in passed[i]}
            for cut in self.cuts[self.first_cut(i) : -1]:
                passed[cut][storages & self._sets[cut]] = None
        return [tuple(subsets) for subsets in passed], [tuple(subsets) for subsets in kept]

    def _fewer(self, subsets: dict[frozenset[int], None], max_subsets: int) -> dict[frozenset[int], None]:
        if len(subsets) <= max_subsets:
            return subsets
        smallest = sorted(subsets, key=lambda s: (self._bytes(s), sorted(s)))[: max_subsets - 1]
        return dict.fromkeys([*smallest, frozenset[int]().union(*subsets)])

    def _locate(self, boundary: int, held: frozenset[int], *, passing: bool) -> int:
        """The state of `held`, or the cheapest one that holds all of it; a passing one if it has to be."""
        index, passed = self._index[boundary], self._passed[boundary]
        if held in index and (not passing or held in passed):
            return index[held]
        covers = [subset for subset in (passed if passing else index) if held <= subset]
        return index[min(covers, key=lambda s: (self._bytes(s), sorted(s)))]

    def _after_keep(self, i: int, held: frozenset[int], option: SavedSet) -> frozenset[int]:
        return (held | self._saved(option)) & self._sets[i + 1]

    def _saved(self, option: SavedSet) -> frozenset[int]:
        return frozenset(int(s) for s in option.storages if self.chain.storage_bytes[s])

    def _bytes(self, storages: frozenset[int]) -> int:
        return sum(self.chain.storage_bytes[s] for s in storages)

    def _state(self, i: int, held: frozenset[int]) -> State:
        if i == self.num_blocks:
            nothing = np.zeros(0, np.int64)
            return State(i, held, 0.0, (), nothing, nothing, nothing, np.zeros(0), held in self._passed[i], -1, 0)
        cuts = np.array(self.cuts[self.first_cut(i) : -1], np.int64)
        targets = [self._locate(int(k), self._sets[i] & self._sets[int(k)], passing=True) for k in cuts]
        is_passing = held in self._passed[i]
        passes = self._passing and is_passing
        return State(
            boundary=i,
            held=held,
            forward_s=self.chain.blocks[i].forward_s,
            keeps=tuple(self._keep(i, held, o) for o in range(len(self.chain.blocks[i].options))),
            split_states=np.array(targets, np.int64),
            split_held_bytes=self.boundary_bytes[i] - self._overlap[i, cuts],
            split_need_bytes=self._run_need[i, cuts],
            # Summed from here, not as a difference of totals: equal layers get equal sums, to the last bit.
            split_forward_s=np.cumsum(self._forward_s[i:])[cuts - i - 1],
            is_passing=is_passing,
            pass_state=self._locate(i + 1, held & self._sets[i + 1], passing=True) if passes else -1,
            pass_held_bytes=self._bytes(held - self._sets[i + 1]),
        )

    def _keep(self, i: int, held: frozenset[int], index: int) -> Keep:
        block = self.chain.blocks[i]
        option, here, after = block.options[index], self._sets[i], self._sets[i + 1]
        saved = self._saved(option)
        kept_bytes = self._bytes(held | saved) + option.saved_bytes
        backward_bytes = option.backward_peak_bytes + block.parameter_gradient_bytes
        return Keep(
            option=index,
            next_state=self._locate(i + 1, self._after_keep(i, held, option), passing=False),
            held_bytes=self._bytes((held | saved) - after) + option.saved_bytes,
            save_need_bytes=max(
                self.boundary_bytes[i] + option.save_peak_bytes,
                self._bytes(here | saved | after) + option.saved_bytes,
            ),
            replay_need_bytes=max(
                self.boundary_bytes[i] + option.replay_peak_bytes, self._bytes(here | saved) + option.saved_bytes
            ),
            backward_need_bytes=kept_bytes + backward_bytes + self.standing_bytes[i + 1],
            replay_s=option.replay_s,
            backward_s=option.backward_s,
        )
