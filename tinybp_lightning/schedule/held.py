"""Which storages are held from below, when a segment starts? The sets that `capped` tells apart.

# Note [Counting each storage once]
`relaxed` shows how to uncross any schedule. This bound counts what is held then as a union of storages, not as a sum
of weights, and needs another argument for being lazy. What it counts of a boundary `i`, held for the ends `q .. j-1`,
is `S_i` without those storages of it that are part of `S_j` too and that no block in `q .. j-1` is bound to save (it
has no alias of them in some option). Of a saved set it counts the private bytes and the aliases that all the block's
options have. Both can only count less than there is.

Take the first run that is not on the way to the end next due. It replaces a boundary `X = (i, q .. j-1)`, `j` not yet
due, by things `Y` for the same ends. Below is `L`, for ends under `q`; above is `U`, for ends from `j` on, which by
uncrossing stands behind all of `Y` from the last time on that its path ran those blocks. Let `f` be the bytes counted
with `Y` less those with `X`, as time goes on. No storage enters `U` again: it moves on through the chain, a storage
lies in consecutive boundaries, and what a thing leaves out its parts leave out. A storage that leaves `U` and is
counted in `X` is counted in `Y` too: it is in every boundary of `Y`, and if it is left out of each and saved by none,
it is in `S_j` and no block in `q .. j-1` is bound to save it, so `X` left it out. In the same way no storage of `S_i`
leaves `L`, and one of `Y` that enters `L` is counted in `X`. So `f` never falls. If `f <= 0` when the run is made,
`Y` weighed no more since `U` last ran those blocks: make it then, at no run. If `f > 0`, it stays so: make it at the
next change or when `j` is due. Either way no more is counted at any moment, and no time is lost. Repeat: every run is
on the way to the end next due.

So walking from boundary 0 on, all that matters of the things below is their union cut with the boundary at hand: the
*held set*. Leaving a boundary pays for what of the held set does not go on. Where there are too many held sets at a
boundary, some give way to their largest known subset, which counts less.
"""

from dataclasses import dataclass

from tinybp_lightning.graph.chain import Chain, SavedSet

__all__ = ["HeldKeep", "HeldSets"]

_Set = frozenset[int]


@dataclass(frozen=True, slots=True)
class HeldKeep:
    """Keeping a block with an option that fits at all: the set it leads to, what is paid, and its backward's need."""

    target: int
    held_bytes: int
    need_bytes: int
    backward_s: float
    replay_s: float


class HeldSets:
    """The held sets of every boundary, by index, and where each move leads; set 0 of boundary 0 is the start."""

    def __init__(self, chain: Chain, *, max_sets: int) -> None:
        size = chain.storage_bytes
        self._size = size
        self._chain = chain
        self._boundary = [frozenset(int(s) for s in b.storages if size[s]) for b in chain.boundaries]
        self._saved = [self._bound_to_save(b) for b in range(len(chain.blocks))]
        self._last = self._last_boundaries()
        self._standing = self._standing_bytes()
        self._holds: list[list[list[_Set]]] = [
            [self._counted(i, q) for q in range(len(chain.blocks) + 1)] for i in range(len(chain.blocks))
        ]
        self._sets = self._find(max_sets)
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
        return [1, *keeps, *holds, *(self._bytes(s - self._boundary[i + 1]) for i in range(n) for s in self._sets[i])]

    def count(self, boundary: int) -> int:
        """Return the number of held sets of `boundary`."""
        return len(self._sets[boundary])

    def after_pass(self, i: int, index: int) -> tuple[int, int]:
        """Return where running block `i` and releasing boundary `i` leads, and the bytes paid."""
        return self._go(i, self._sets[i][index])

    def after_hold(self, i: int, index: int, q: int) -> list[tuple[int, int]]:
        """Return the same for holding boundary `i` for `low .. q-1`, for `low` from `i` to `q - 1`."""
        held, known = self._sets[i][index], dict[_Set, tuple[int, int]]()
        found: list[tuple[int, int]] = []
        for counted in self._holds[i][q]:
            if counted not in known:
                known[counted] = self._go(i, held | counted)
            found.append(known[counted])
        return found

    def keeps(self, i: int, index: int, *, left_bytes: int) -> list[HeldKeep]:
        """Return what keeping block `i` costs, for each of its options that fits into `left_bytes` by itself."""
        held, keeps = self._sets[i][index], list[HeldKeep]()
        for option in self._chain.blocks[i].options:
            target, _ = self._go(i, held | self._saved[i])
            own_bytes = option.saved_bytes + self._standing[i] + option.backward_peak_bytes
            if own_bytes + sum(self._size[s] for s in option.storages) > left_bytes:
                continue
            held_bytes, need_bytes = self._kept_bytes(i, held, option), own_bytes + self._bytes(held | self._saved[i])
            keeps.append(HeldKeep(target, held_bytes, need_bytes, option.backward_s, option.replay_s))
        return keeps

    def _kept_bytes(self, i: int, held: _Set, option: SavedSet) -> int:
        return self._bytes((held | self._saved[i]) - self._boundary[i + 1]) + option.saved_bytes

    def _go(self, i: int, held: _Set) -> tuple[int, int]:
        after = held & self._boundary[i + 1]
        return self._locate(i + 1, after), self._bytes(held - after)

    def _locate(self, boundary: int, held: _Set) -> int:
        """The index of `held`, or of its largest known subset."""
        index = self._index[boundary]
        if held not in index:
            held = max((s for s in index if s <= held), key=lambda s: (self._bytes(s), sorted(s)))
        return index[held]

    def _bytes(self, storages: _Set) -> int:
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

    def _counted(self, i: int, q: int) -> list[_Set]:
        """What is counted of boundary `i` held for `low .. q-1`, for `low` from `i` to `q - 1`."""
        left_out = {s for s in self._boundary[i] if self._last[s] >= q}
        found: list[_Set] = []
        for low in reversed(range(i, q)):
            left_out -= self._saved[low]
            found.append(self._boundary[i] - left_out)
        return found[::-1]

    def _find(self, max_sets: int) -> list[tuple[_Set, ...]]:
        """The held sets that can occur at each boundary; of too many, the largest in bytes are kept, and none."""
        found: list[dict[_Set, None]] = [{} for _ in self._boundary]
        found[0][self._boundary[0]] = None
        for i in range(len(self._boundary)):
            if len(found[i]) > max_sets:
                ordered = sorted(found[i], key=lambda s: (self._bytes(s), sorted(s)))
                found[i] = dict.fromkeys([frozenset(), *ordered[len(ordered) - max_sets + 1 :]])
            if i == len(self._boundary) - 1:
                break
            reached = {counted for row in self._holds[i] for counted in row}
            for held in found[i]:
                found[i + 1][held & self._boundary[i + 1]] = None
                found[i + 1][(held | self._saved[i]) & self._boundary[i + 1]] = None
                for counted in reached:
                    found[i + 1][(held | counted) & self._boundary[i + 1]] = None
        return [tuple(sets) for sets in found]
