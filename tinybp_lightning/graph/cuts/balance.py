"""Which blocks are too light to be planned apart, and which too heavy to be planned whole?

*Light*: a block that makes next to nothing (a mask, the statistics of a norm) costs planning time and offers nothing to
keep or drop. It joins a neighbour across the costlier of its two cuts.

*Heavy*: no plan gets below the working set of its heaviest block's backward. Splitting that block at `p` makes two
smaller ones and a boundary: while the later one runs backward the boundary is held beside its saved set, and while the
earlier one does the boundary's gradient is. So the heaviest block is split where `max(saved before, saved after) +
bytes of the boundary` is least, as long as that is clearly below what it saves whole; then the next heaviest, until
the heaviest one gains nothing. Blocks lighter than that stay whole: more boundaries would lower no peak.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median

from tinybp_lightning.graph.cuts.valleys import MIN_OPS
from tinybp_lightning.graph.frontier import FrontierProfile
from tinybp_lightning.graph.ids import StorageId
from tinybp_lightning.graph.ir import Graph, StorageKind

__all__ = ["made_at", "merge_light_blocks", "split_heavy_blocks"]

# A block that makes less than this share of what the usual block makes is light: statistics of a norm are one value in
# a row, masks one byte for a pair of positions, and neither comes near it.
_LIGHT_SHARE = 1 / 16
# A split must leave at most this share of the block's saved bytes: less gain is not worth a boundary to plan for.
_WORTHWHILE_SHARE = 0.875


@dataclass(frozen=True, slots=True)
class _Saved:
    """A storage that a block saves: which node makes it, which saves it first, and its bytes."""

    made: int
    first_save: int
    size_bytes: int


def merge_light_blocks(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts` without those that only part off a light block.

    **Arguments:** `cuts`: increasing positions.
    """
    made_bytes = [0] * len(graph.nodes)
    for storage, position in made_at(graph).items():
        made_bytes[position] += graph.storages[storage].size_bytes
    total = [0, *accumulate(made_bytes)]
    last = len(graph.nodes) - 1
    limit_bytes = _LIGHT_SHARE * median(total[q + 1] - total[p + 1] for p, q in pairwise([-1, *cuts, last]))
    kept = [-1]
    for position in [*cuts, last]:
        # Giving up the cut before makes the block longer: look again until it is no longer light.
        while total[position + 1] - total[kept[-1] + 1] < limit_bytes:
            is_first = len(kept) == 1
            if is_first or (position != last and profile.cost(kept[-1]) < profile.cost(position)):
                break
            kept.pop()
        else:
            kept.append(position)
    return tuple(p for p in kept if 0 <= p < last)


def split_heavy_blocks(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts` and those that split the blocks whose saved bytes set the least memory of any plan.

    **Arguments:** `cuts`: increasing, allowed positions.

    **Returns:** increasing positions, `cuts` among them; `cuts` itself where no node says what it saves.
    """
    made = made_at(graph)
    found = list(cuts)
    spans = [(before + 1, after + 1) for before, after in pairwise([-1, *cuts, len(graph.nodes) - 1])]
    heap = [(-_total_bytes(_saved_in(graph, made, start, stop)), start, stop) for start, stop in spans]
    heapq.heapify(heap)
    while heap:
        _, start, stop = heapq.heappop(heap)
        position = _best_split(graph, profile, _saved_in(graph, made, start, stop), start, stop)
        if position is None:
            break
        found.append(position)
        for span in ((start, position + 1), (position + 1, stop)):
            heapq.heappush(heap, (-_total_bytes(_saved_in(graph, made, *span)), *span))
    return tuple(sorted(found))


def made_at(graph: Graph) -> dict[StorageId, int]:
    """Return the node that makes each activation storage; private ones, which no value names, are left out."""
    made: dict[StorageId, int] = {}
    for position, node in enumerate(graph.nodes):
        for value_id in node.makes:
            storage = graph.values[value_id].storage
            if storage is not None and graph.storages[storage].kind is StorageKind.ACTIVATION:
                made.setdefault(storage, position)
    return made


def _saved_in(graph: Graph, made: dict[StorageId, int], start: int, stop: int) -> tuple[_Saved, ...]:
    """Return what nodes `start` to `stop` save beside the storages that exist before them."""
    saved: dict[StorageId, _Saved] = {}
    for position in range(start, stop):
        for storage_id in graph.nodes[position].saved:
            storage = graph.storages[storage_id]
            made_at = made.get(storage_id, position)  # a private one is made where it is saved
            if storage.kind is StorageKind.ACTIVATION and made_at >= start:
                saved.setdefault(storage_id, _Saved(made_at, position, storage.size_bytes))
    return tuple(saved.values())


def _total_bytes(saved: Sequence[_Saved]) -> int:
    return sum(one.size_bytes for one in saved)


def _best_split(graph: Graph, profile: FrontierProfile, saved: Sequence[_Saved], start: int, stop: int) -> int | None:
    """Return the allowed position at which to split nodes `start` to `stop`, `None` where none is worthwhile."""
    total_bytes = _total_bytes(saved)
    if stop - start < 2 * MIN_OPS or total_bytes == 0:
        return None
    left, right = [0] * (stop - start), [0] * (stop - start)
    for one in saved:
        left[one.first_save - start] += one.size_bytes
        right[one.made - start] -= one.size_bytes
    right[0] += total_bytes
    boundary = _boundary_bytes(graph, profile, start, stop)
    working = [
        max(before, after) + between
        for before, after, between in zip(accumulate(left), accumulate(right), boundary, strict=True)
    ]
    places = [p for p in range(start + MIN_OPS - 1, stop - MIN_OPS) if profile.is_allowed(p)]
    best = min(places, key=lambda p: (working[p - start], profile.num_elements[p], -p), default=None)
    if best is None or working[best - start] > _WORTHWHILE_SHARE * total_bytes:
        return None
    return best


def _boundary_bytes(graph: Graph, profile: FrontierProfile, start: int, stop: int) -> list[int]:
    """Return for each position of nodes `start` to `stop` the bytes of its frontier that did not exist before them."""
    made = dict.fromkeys(graph.values[v].storage for node in graph.nodes[start:stop] for v in node.makes)
    steps = [0] * (stop - start)
    for storage in made:
        if storage is None:
            continue
        life = profile.storage_lives[storage]
        if life.made >= start:
            steps[life.made - start] += graph.storages[storage].size_bytes
            if life.last_use < stop:
                steps[life.last_use - start] -= graph.storages[storage].size_bytes
    return list(accumulate(steps))
