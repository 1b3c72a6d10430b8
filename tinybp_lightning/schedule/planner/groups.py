"""Which blocks of a long chain may be kept and reversed as one, at little loss? Groups for `merged`, few enough.

The widest boundaries are the least worth storing: they go first, as long as the group around them needs no more bytes
than the neediest block does, which no schedule avoids. Among boundaries equally wide those stay longest that are next
to one that has to stay: what lies between is run again most. Equal layers get equal groups.
"""

from collections import Counter
from itertools import pairwise

from tinybp_lightning.graph.chain import Block, Boundary, Chain
from tinybp_lightning.schedule.planner.merged import merge

__all__ = ["group_starts", "neediest_bytes", "small_bytes", "without_small"]

_SMALL = 64
"""What is smaller than such a part of the neediest block hardly weighs in."""
_WIDESPREAD = 8
"""A storage that is in more than such a part of the boundaries tells none from another."""


def without_small(chain: Chain) -> Chain:
    """Return `chain` with the storages that hardly weigh in weighing nothing, which leaves its layers more alike."""
    least_bytes = small_bytes(chain)
    sizes = tuple(size if size >= least_bytes else 0 for size in chain.storage_bytes)
    boundaries = tuple(
        Boundary(tuple(s for s in boundary.storages if sizes[s]), boundary.gradient_bytes)
        for boundary in chain.boundaries
    )
    return Chain(sizes, chain.blocks, boundaries, chain.tail_peak_bytes, chain.tail_live_bytes, chain.workspace_bytes)


def small_bytes(chain: Chain) -> int:
    """Return the bytes below which something hardly weighs in."""
    return neediest_bytes(chain) // _SMALL


def neediest_bytes(chain: Chain) -> int:
    """Return the bytes that the backward of the neediest block takes, whatever else is alive left out."""
    return max(_need_bytes(chain, b, block) for b, block in enumerate(chain.blocks))


def group_starts(chain: Chain, *, most_groups: int) -> tuple[int, ...]:
    """Return where groups of blocks start, and the number of blocks; more than `most_groups` where bytes forbid."""
    num_blocks, most_bytes = len(chain.blocks), neediest_bytes(chain)
    starts, widths = list(range(num_blocks + 1)), _widths(chain)
    needs = dict[tuple[int, int], int]()
    while len(starts) - 1 > most_groups:
        triples = list(zip(starts, starts[1:], starts[2:], strict=False))
        for before, _, after in triples:
            if (before, after) not in needs:
                needs[before, after] = _group_need_bytes(chain, before, after)
        fixed = {start for before, start, after in triples if needs[before, after] > most_bytes}
        ranked = {
            start: (widths[start], before not in fixed and after not in fixed, needs[before, after])
            for before, start, after in triples
            if start not in fixed
        }
        if not ranked:
            break
        first, gone = max(ranked.values()), set[int]()
        for before, start in pairwise(starts):
            if ranked.get(start) == first and before not in gone:
                gone.add(start)
        starts = [start for start in starts if start not in gone]
    return tuple(starts)


def _widths(chain: Chain) -> list[int]:
    """The bytes of every boundary, without what most layers share."""
    counts = Counter(s for boundary in chain.boundaries for s in boundary.storages)
    most = len(chain.boundaries) // _WIDESPREAD
    return [
        sum(chain.storage_bytes[s] for s in boundary.storages if counts[s] <= most) for boundary in chain.boundaries
    ]


def _group_need_bytes(chain: Chain, first: int, end: int) -> int:
    merged = merge(_part(chain, first, end), (0, end - first)).chain
    return _need_bytes(merged, 0, merged.blocks[0])


def _part(chain: Chain, first: int, end: int) -> Chain:
    return Chain(chain.storage_bytes, chain.blocks[first:end], chain.boundaries[first : end + 1])


def _need_bytes(chain: Chain, b: int, block: Block) -> int:
    standing_bytes = chain.boundaries[b + 1].gradient_bytes + block.parameter_gradient_bytes
    return standing_bytes + min(
        option.saved_bytes + sum(chain.storage_bytes[s] for s in option.storages) + option.backward_peak_bytes
        for option in block.options
    )
