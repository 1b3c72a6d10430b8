"""List what can be held from below when a segment starts: the *held sets* of the dynamic-programming bound.

Walking from boundary 0 on, what matters of the things below is their union cut with the boundary at hand. Leaving a
boundary pays for what of the held set does not go on. A boundary is held in one of two ways (proof P9): with all its
storages, or, where the ends that it serves are all kept when the last of them is due, without what may be left out.
Where a boundary has too many held sets, some give way to their largest known subset, which counts less.

The bound computes equal layers once. Moves are compared as they are, not by keys, so its value does not change.
"""

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from tinybp_lightning.graph.chain import Chain, SavedSet
from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain

__all__ = [
    "HeldKeep",
    "HeldSets",
    "KeptEnds",
    "Layers",
    "Resolution",
    "affordable",
    "alike",
    "find_layers",
    "held_layers",
]

_Set = frozenset[int]
_WORK = 2.5e9
"""About how many elementary steps a bound may take: two or three seconds."""
_MOST_WORK = 7e9
"""And one with the fewest slots: hardly more, since where few fit most costs are infinite."""
_MAX_BLOCKS = 420
_SETS = (128, 64, 32, 16, 8, 4, 2)
_MIN_SLOTS, _ENOUGH_SLOTS, _MAX_SLOTS = 32, 100, 600
_COUNTS = 3
"""How many ways to count less than a whole boundary are told apart, for one boundary and fork."""
_LONGEST_PERIOD = 48


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
    """Blocks from `low` on that are all kept when the last is due, served from one boundary: what is counted of that
    before, the bytes that they need at least, and their least seconds.
    """

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
        self._last = self._last_boundaries()
        self._last_left_out = [max((self._last[s] for s in boundary), default=0) for boundary in self._boundary]
        self._known: dict[tuple[int, int, _Set], tuple[int, int]] = {}
        self._standing = self._standing_bytes()
        self._passing, kept = self._find(max_sets)
        self._sets = [(*passing, *kept[i]) for i, passing in enumerate(self._passing)]
        self._index = [{held: k for k, held in enumerate(sets)} for sets in self._sets]

    @property
    def loss_need_bytes(self) -> int:
        """What must be left at the last boundary for the code after the last block."""
        return self._bytes(self._boundary[-1]) + self._chain.tail_peak_bytes

    @property
    def lowest_need_bytes(self) -> list[int]:
        """For every block and option, a need of its backward that is not above any."""
        return [
            option.saved_bytes + self._standing[b] + option.backward_peak_bytes
            for b, block in enumerate(self._chain.blocks)
            for option in block.options
        ]

    @property
    def sizes_bytes(self) -> list[int]:
        """The bytes that moves hold, as often as there are moves."""
        n = len(self._chain.blocks)
        keeps = [self._kept_bytes(i, frozenset(), option) for i in range(n) for option in self._chain.blocks[i].options]
        holds = [self._bytes(self._boundary[i] - self._boundary[i + 1]) for i in range(n)]
        passes = [self._bytes(s - self._boundary[i + 1]) for i in range(n) for s in self._passing[i]]
        return [1, *keeps, *holds, *passes]

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the chain."""
        return len(self._chain.blocks)

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

    def after_pass(self, i: int, index: int) -> tuple[int, int]:
        """Return where running block `i` and releasing boundary `i` leads, and the bytes paid."""
        return self._go(i, self._sets[i][index], passing=True)

    def after_store(self, i: int) -> tuple[int, int]:
        """Return the same for holding boundary `i`, whatever for."""
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

    def after_hold(self, i: int, index: int, counted: frozenset[int]) -> tuple[int, int]:
        """Return where holding boundary `i` with only `counted` of it leads, and the bytes paid."""
        if (i, index, counted) not in self._known:
            self._known[i, index, counted] = self._go(i, self._sets[i][index] | counted, passing=True)
        return self._known[i, index, counted]

    def keeps(self, i: int, index: int, *, left_bytes: int) -> list[HeldKeep]:
        """Return what keeping block `i` costs, for each of its options that fits into `left_bytes` by itself."""
        held, keeps = self._sets[i][index], list[HeldKeep]()
        for option in self._chain.blocks[i].options:
            target, _ = self._go(i, held | self._saved[i], passing=False)
            own_bytes = option.saved_bytes + self._standing[i] + option.backward_peak_bytes
            if own_bytes + sum(self._size[s] for s in option.storages) > left_bytes:
                continue
            held_bytes, need_bytes = self._kept_bytes(i, held, option), own_bytes + self._bytes(held | self._saved[i])
            keeps.append(HeldKeep(target, held_bytes, need_bytes, option.backward_s, option.replay_s))
        return keeps

    def _kept_bytes(self, i: int, held: _Set, option: SavedSet) -> int:
        return self._bytes((held | self._saved[i]) - self._boundary[i + 1]) + option.saved_bytes

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

    def _last_boundaries(self) -> list[int]:
        last = [0] * len(self._size)
        for i, storages in enumerate(self._boundary):
            for storage in storages:
                last[storage] = i
        return last

    def _standing_bytes(self) -> list[int]:
        """What is alive at each block's backward whatever is held, its own peak left out."""
        chain, gradients, standing = self._chain, 0, list[int]()
        for b in reversed(range(len(chain.blocks))):
            gradients += chain.blocks[b].parameter_gradient_bytes
            standing.append(chain.tail_live_bytes + chain.boundaries[b + 1].gradient_bytes + gradients)
        return standing[::-1]

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


def held_layers(relaxed: RelaxedChain, held: HeldSets) -> Layers:
    """Return the longest run of blocks that repeat themselves in what `capped` may do at them."""
    forward_s = relaxed.forward_s.tolist()
    few = find_layers([(forward_s[i], held.after_store(i)) for i in range(held.num_blocks)])
    if few.end - few.first < 2 * few.period + held.num_blocks // 4:
        return Layers(0, 0, 1)  # a short run saves little, and to compare all moves takes time
    return find_layers([_moves(relaxed, held, i) for i in range(held.num_blocks)])


def alike(ways: list[KeptEnds]) -> list[tuple[frozenset[int], list[KeptEnds]]]:
    """Group neighbours that count the same, with ascending lows; beyond some groups what all the rest count."""
    groups = [(counted, list(same)[::-1]) for counted, same in groupby(ways, key=lambda way: way.counted)]
    rest = groups[_COUNTS - 1 :]
    if len(rest) < 2:
        return groups
    counted = frozenset[int].intersection(*(counted for counted, _ in rest))
    return [*groups[: _COUNTS - 1], (counted, [way for _, same in reversed(rest) for way in same])]


def _moves(relaxed: RelaxedChain, held: HeldSets, i: int) -> Hashable:
    """All that the costs of boundary `i` depend on besides the next ones."""
    passes = tuple(held.after_pass(i, index) for index in range(held.num_passing(i)))
    keeps = tuple(tuple(held.keeps(i, index, left_bytes=relaxed.left_bytes)) for index in range(held.count(i)))
    forks = [fork for fork in range(i + 1, held.num_blocks + 1) if held.leaves_out(i, fork)]
    kept_holds = tuple((fork - i, _kept_holds(relaxed, held, i, fork)) for fork in forks)
    return float(relaxed.forward_s[i]), passes, keeps, held.after_store(i), kept_holds


def _kept_holds(relaxed: RelaxedChain, held: HeldSets, i: int, fork: int) -> Hashable:
    """The holds of boundary `i` for ends before `fork` that are all kept."""
    found: list[Hashable] = []
    for counted, same in alike(held.all_kept(i, fork, left_bytes=relaxed.left_bytes)):
        ways = tuple((way.low - i, way.need_bytes, way.seconds) for way in same)
        num_sets = held.count(i) if same[0].low == i else held.num_passing(i)
        found.append((ways, tuple(held.after_hold(i, index, counted) for index in range(num_sets))))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Resolution:
    """How finely `dp_bound_s` counts: about `num_slots` pieces of the bytes left, and at most `max_sets` held sets
    at each boundary. Finer is slower and closer.
    """

    num_slots: int
    max_sets: int


def affordable(relaxed: RelaxedChain) -> Resolution | None:
    """Return the resolution that a bound of this chain can have in a few seconds; `None` if too few for a useful one.

    Held sets are worth more than slots, beyond a number of slots that tells the budget from the next.
    """
    if relaxed.num_blocks > _MAX_BLOCKS:
        return None
    best, most = None, max(_SETS) + 1
    for max_sets in _SETS:
        if max_sets >= most:
            continue  # there are no more: the sets would be the same
        held = HeldSets(relaxed.chain, max_sets=max_sets)
        most = max(held.count(i) for i in range(held.num_blocks))
        layers = held_layers(relaxed, held)
        num_forks = _num_forks(held, layers)
        num_slots = min(_MAX_SLOTS, int(_WORK / num_forks))
        if num_slots >= _ENOUGH_SLOTS:
            return Resolution(num_slots, max_sets)
        if not best and _MOST_WORK / num_forks >= _MIN_SLOTS:
            best = Resolution(max(num_slots, _MIN_SLOTS), max_sets)
            if layers.end > layers.first:
                return best
    return best


def _num_forks(held: HeldSets, layers: Layers) -> float:
    """At each boundary and for each of its held sets: every end of its own with every fork before it, from every low.

    The loss is one more end.
    """
    num_forks = 1.0
    for i in range(held.num_blocks):
        left, passing = held.num_blocks - i + 1, held.num_passing(i)
        new = held.num_blocks - layers.first_new(i) + 1
        # Of `left` ends the last `new` ones have each fork before them.
        forks = sum((left - k) ** 2 / 2 for k in range(new))
        found = passing * forks + (held.count(i) - passing) * sum(left - k for k in range(new))
        num_forks += found * (2 if held.leaves_out(i, min(i + 2, held.num_blocks)) else 1)
    return num_forks
