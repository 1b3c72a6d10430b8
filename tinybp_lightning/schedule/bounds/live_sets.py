"""List what can be held from below when a segment starts: the *held sets* of the dynamic-programming bound.

Walking from boundary 0 on, what matters of the things below is their union cut with the boundary at hand. Leaving a
boundary pays for what of the held set does not go on. A boundary is held in one of two ways (proof P9): with all its
storages, or, where the ends that it serves are all kept when the last of them is due, without what may be left out.
Where a boundary has too many held sets, some give way to their largest known subset, which counts less.
"""

from collections.abc import Set
from dataclasses import dataclass

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain, standing_bytes

__all__ = ["HeldKeep", "HeldSets", "KeptEnds", "Resolution", "affordable"]

_Set = frozenset[int]
_WORK = 5e9
"""About how many elementary steps a bound may take: a few seconds."""
_SETS = (64, 32, 16, 8, 4, 2)
"""The limits on held sets that are tried, from the closest bound to the fastest."""
_MIN_SLOTS, _MAX_SLOTS = 48, 600
"""With fewer slots the bound is too loose to be worth its time; more are not used."""


@dataclass(frozen=True, slots=True)
class HeldKeep:
    """Keeping a block with an option that fits at all: the set it leads to, what is paid, and its backward's need."""

    target: int
    held_bytes: int
    need_bytes: int
    backward_s: float
    replay_s: float


@dataclass(frozen=True, slots=True)
class KeptEnds:
    """Blocks from `low` on, all kept when the last is due: what of their boundary counts, and the least they need."""

    low: int
    counted: frozenset[int]
    need_bytes: int
    seconds: float


class HeldSets:
    """The held sets of every boundary, by index, and where each move leads; set 0 of boundary 0 is the start."""

    def __init__(self, chain: Chain, *, max_sets: int) -> None:
        size = chain.storage_bytes
        self._size = size
        self._chain = chain
        self._boundary = [frozenset(int(s) for s in b.storages if size[s]) for b in chain.boundaries]
        self._saved = [self._bound_to_save(b) for b in range(len(chain.blocks))]
        self._private_bytes = [min(option.saved_bytes for option in block.options) for block in chain.blocks]
        self._last = {s: i for i, boundary in enumerate(self._boundary) for s in boundary}
        self._last_left_out = [max((self._last[s] for s in boundary), default=0) for boundary in self._boundary]
        self._standing = standing_bytes(chain)
        self.num_blocks = len(chain.blocks)
        # What must be left at the last boundary for the code after the last block.
        self.loss_need_bytes = self._bytes(self._boundary[-1]) + chain.tail_peak_bytes
        self._passing, kept = self._find(max_sets)
        self._sets = [(*passing, *kept[i]) for i, passing in enumerate(self._passing)]
        self._index = [{held: k for k, held in enumerate(sets)} for sets in self._sets]

    @property
    def lowest_need_bytes(self) -> int:
        """The least that must be left anywhere: for the loss, or for a backward beside which nothing is held."""
        needs = (
            option.saved_bytes + self._standing[b] + option.backward_peak_bytes
            for b, block in enumerate(self._chain.blocks)
            for option in block.options
        )
        return min(self.loss_need_bytes, *needs)

    def count(self, boundary: int) -> int:
        """Return the number of held sets of `boundary`."""
        return len(self._sets[boundary])

    def num_passing(self, boundary: int) -> int:
        """Return how many of them, the first ones, a block may be passed with; with others the next end is due."""
        return len(self._passing[boundary])

    def leaves_out(self, i: int, q: int) -> bool:
        """Whether boundary `i`, held for ends below `q` that are all kept, may count with less than all its storages.

        If so, then for block `q-1` alone: more blocks have more that is private to them.
        """
        if q > self._last_left_out[i]:
            return False
        left_out = {s for s in self._boundary[i] if self._last[s] >= q} - self._saved[q - 1]
        spare_bytes = self._private_bytes[q - 1] - self._bytes(self._boundary[i] - self._saved[q - 1])
        return bool(left_out) and spare_bytes < 0

    def after_pass(self, i: int, index: int, counted: _Set = frozenset()) -> tuple[int, int]:
        """Return where running block `i` leads while `counted` of boundary `i` stays held, and the bytes paid."""
        return self._go(i, self._sets[i][index] | counted, passing=True)

    def after_store(self, i: int) -> tuple[int, int]:
        """Return the same for holding all of boundary `i`, whatever for."""
        return self._go(i, self._boundary[i], passing=True)

    def all_kept(self, i: int, q: int, *, left_bytes: int) -> list[KeptEnds]:
        """Return the ways to serve `low .. q-1` from boundary `i`, all kept, for `low` from `q - 1` down to `i`.

        The list ends where they no longer fit, or where all storages of the boundary count. Of what may be left out
        some counts nevertheless: as much as is private to the saved sets that the boundary is replaced by.
        """
        blocks, size, boundary = self._chain.blocks, self._size, self._boundary[i]
        left_out = {s for s in boundary if self._last[s] >= q}
        aliases, uncounted_bytes, private_bytes = set[int](), self._bytes(boundary), 0
        need_bytes = self._standing[q - 1] + min(option.backward_peak_bytes for option in blocks[q - 1].options)
        seconds = sum(block.forward_s for block in blocks[i : q - 1])
        found: list[KeptEnds] = []
        for low in reversed(range(i, q)):
            for storage in self._saved[low] - aliases:
                aliases.add(storage)
                need_bytes += size[storage]
                uncounted_bytes -= size[storage] if storage in boundary else 0
            left_out -= self._saved[low]
            private_bytes += self._private_bytes[low]
            need_bytes += self._private_bytes[low]
            if need_bytes > left_bytes or private_bytes >= uncounted_bytes:
                break
            spare_bytes = private_bytes - uncounted_bytes + self._bytes(left_out)
            really = set(left_out)
            for storage in sorted(left_out, key=lambda s: (-size[s], s)):
                if size[storage] <= spare_bytes:
                    really.remove(storage)
                    spare_bytes -= size[storage]
            options = blocks[low].options
            replay_s = (option.replay_s if low == q - 1 else 0.0 for option in options)
            seconds += min(s + option.backward_s for s, option in zip(replay_s, options, strict=True))
            found.append(KeptEnds(low, boundary - really, need_bytes, seconds))
        return found

    def keeps(self, i: int, index: int, *, left_bytes: int) -> list[HeldKeep]:
        """Return what keeping block `i` costs, for each of its options that fits into `left_bytes` by itself."""
        held, keeps = self._sets[i][index] | self._saved[i], list[HeldKeep]()
        target, paid_bytes = self._go(i, held, passing=False)
        for option in self._chain.blocks[i].options:
            own_bytes = option.saved_bytes + self._standing[i] + option.backward_peak_bytes
            if own_bytes + sum(self._size[s] for s in option.storages) > left_bytes:
                continue
            held_bytes, need_bytes = paid_bytes + option.saved_bytes, own_bytes + self._bytes(held)
            keeps.append(HeldKeep(target, held_bytes, need_bytes, option.backward_s, option.replay_s))
        return keeps

    def _go(self, i: int, held: _Set, *, passing: bool) -> tuple[int, int]:
        """The index of `held` at the next boundary, or of its largest known subset, and the bytes paid."""
        after = held & self._boundary[i + 1]
        known, found = self._index[i + 1], after
        if after not in known or (passing and known[after] >= len(self._passing[i + 1])):
            sets = self._passing[i + 1] if passing else self._sets[i + 1]
            found = max((s for s in sets if s <= after), key=lambda s: (self._bytes(s), sorted(s)))
        return known[found], self._bytes(held - after)

    def _bytes(self, storages: Set[int]) -> int:
        return sum(self._size[s] for s in storages)

    def _bound_to_save(self, b: int) -> _Set:
        """The boundary storages beside block `b` that all its options alias."""
        beside = self._boundary[b] | self._boundary[b + 1]
        return beside.intersection(*({int(s) for s in option.storages} for option in self._chain.blocks[b].options))

    def _find(self, max_sets: int) -> tuple[list[tuple[_Set, ...]], list[tuple[_Set, ...]]]:
        """The held sets that can occur at each boundary, with which a block may be passed, and the others.

        Once a block is kept, the next ones are kept or their boundary is held, which makes all of it part of the set:
        no block is passed by. Boundaries held with less than all their storages lead to a known subset, and for them
        there is the empty set. Of too many sets the largest in bytes stay, and the empty one.
        """
        passed: list[dict[_Set, None]] = [{} for _ in self._boundary]
        kept: list[dict[_Set, None]] = [{} for _ in self._boundary]
        passed[0][self._boundary[0]] = None
        for i, boundary in enumerate(self._boundary):
            if i and any(self.leaves_out(i - 1, q) for q in range(i, len(self._boundary))):
                passed[i][frozenset()] = None
            kept[i] = {s: None for s in kept[i] if s not in passed[i]}
            if len(passed[i]) + len(kept[i]) > max_sets:
                ordered = sorted(passed[i] | kept[i], key=lambda s: (self._bytes(s), sorted(s)))
                largest = set(ordered[len(ordered) - max_sets + 1 :])
                passed[i] = {s: None for s in passed[i] if s in largest} | {frozenset(): None}
                kept[i] = {s: None for s in kept[i] if s in largest}
            if i < len(self._boundary) - 1:
                after = self._boundary[i + 1]
                passed[i + 1][boundary & after] = None
                passed[i + 1] |= {held & after: None for held in passed[i]}
                kept[i + 1] |= {(held | self._saved[i]) & after: None for held in passed[i] | kept[i]}
        return [tuple(sets) for sets in passed], [tuple(sets) for sets in kept]


@dataclass(frozen=True, slots=True)
class Resolution:
    """How finely `dp_bound_s` counts: in how many pieces of the bytes left, and held sets of a boundary."""

    num_slots: int
    max_sets: int


def affordable(relaxed: RelaxedChain) -> Resolution | None:
    """Return the resolution that a bound of this chain can have in a few seconds; `None` if it has too few slots.

    Held sets are worth more than slots, beyond a number of slots that tells the budget from the next.
    """
    for max_sets in _SETS:
        num_slots = int(_WORK / _num_forks(HeldSets(relaxed.chain, max_sets=max_sets)))
        if num_slots >= _MIN_SLOTS:
            return Resolution(min(_MAX_SLOTS, num_slots), max_sets)
    return None


def _num_forks(held: HeldSets) -> float:
    """Count, at each boundary and for each of its held sets, every end with every fork before it, from every low."""
    num_forks = 1.0
    for i in range(held.num_blocks):
        left = held.num_blocks - i + 1
        found = held.num_passing(i) * left**3 / 6 + (held.count(i) - held.num_passing(i)) * left**2 / 2
        num_forks += found * (2 if held.leaves_out(i, min(i + 2, held.num_blocks)) else 1)
    return num_forks
