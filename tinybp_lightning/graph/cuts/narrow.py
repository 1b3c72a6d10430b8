"""Where is a graph cut into blocks, and what goes into and out of each block?

A cut should be narrow, because a stored boundary costs the bytes of its frontier. `Granularity.FINE` cuts at all narrow
places, merges light blocks into a neighbour and splits heavy ones; `Granularity.PRODUCTS` adds cuts after
compute-heavy ops; `Granularity.COARSE` cuts once for each repeated module, at the narrowest places where modules do not
repeat, and after results that are read on. Which boundaries a plan *stores* is the planner's decision.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from statistics import median
from typing import assert_never

from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph.cuts.layers import (
    MIN_OPS,
    common_module,
    fill_long_stretches,
    layer_cuts,
    narrow_places,
    returned_midway,
    space_out,
)
from tinybp_lightning.graph.cuts.products import cut_behind_products
from tinybp_lightning.graph.frontier import FrontierProfile, Life, frontier_profile, made_at
from tinybp_lightning.graph.ids import NodeId, StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, StorageKind
from tinybp_lightning.graph.signature import block_signature

__all__ = ["BlockSpan", "Granularity", "choose_cuts", "cut_blocks"]

# A block is light if it makes less than this share of what the usual block makes: the statistics of a norm are one
# value a row, a mask is one byte for a pair of positions.
_LIGHT_SHARE = 1 / 16
# A split must leave at most this share of the block's saved bytes: a smaller gain is not worth a boundary.
_WORTHWHILE_SHARE = 0.875


class Granularity(Enum):
    """How many blocks: cuts after compute-heavy ops too, at every narrow place, or one for each repeated module."""

    PRODUCTS = "products"
    FINE = "fine"
    COARSE = "coarse"


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Nodes `start` to `stop` (exclusive) of a graph, as one block.

    `inputs` are all values that cross the cut before it, `outputs` all that cross the cut after it (for the last block:
    what a node made and the graph returns), in id order. `external` are the graph inputs that it reads, in reading
    order.
    """

    start: int
    stop: int
    name: str
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
    external: tuple[ValueId, ...]
    signature: str


def choose_cuts(graph: Graph, *, granularity: Granularity) -> tuple[NodeId, ...]:
    """Return the positions after which to cut `graph`: increasing, allowed, with at least two nodes in every block."""
    profile = frontier_profile(graph)
    match granularity:
        case Granularity.FINE | Granularity.PRODUCTS:
            narrow = sorted({*narrow_places(profile), *layer_cuts(graph, profile)})
            cuts = _merge_light_blocks(graph, profile, space_out(profile, narrow))
            cuts = _split_heavy_blocks(graph, profile, cuts)
            if granularity is Granularity.PRODUCTS:
                cuts = cut_behind_products(graph, profile, cuts)
        case Granularity.COARSE:
            layers = layer_cuts(graph, profile)
            more = (*fill_long_stretches(profile, layers), *returned_midway(graph, profile))
            cuts = space_out(profile, sorted({*layers, *more}))
        case _:
            assert_never(granularity)
    return tuple(NodeId(cut) for cut in cuts)


def cut_blocks(graph: Graph, cuts: Sequence[int]) -> tuple[BlockSpan, ...]:
    """Return the blocks that `cuts` (positions after which to cut) divide `graph` into.

    **Raises:** `GraphError` where the cuts are not increasing, leave an empty block, or stand where none is allowed.
    """
    profile = frontier_profile(graph)
    if not graph.nodes:
        raise GraphError(f"graph `{graph.name}` has `nodes=()`: expected at least one node to make a block of.")
    ends = [*cuts, len(graph.nodes) - 1]
    if any(before >= after for before, after in pairwise([-1, *ends])) or not all(map(profile.is_allowed, cuts)):
        raise GraphError(f"`cuts={tuple(cuts)}`: expected increasing, allowed positions that leave no block empty.")
    crossing = _crossing_values(profile.value_lives, ends)
    graph_inputs = frozenset(graph.inputs)
    blocks: list[BlockSpan] = []
    start = 0
    inputs: tuple[ValueId, ...] = ()
    for end, outputs in zip(ends, crossing, strict=True):
        reads = (value_id for node in graph.nodes[start : end + 1] for value_id in node.reads)
        blocks.append(
            BlockSpan(
                start=start,
                stop=end + 1,
                name=f"{common_module(graph, start, end + 1) or graph.name}[{start}:{end + 1}]",
                inputs=inputs,
                outputs=outputs,
                external=tuple(dict.fromkeys(value_id for value_id in reads if value_id in graph_inputs)),
                signature=block_signature(graph, start, end + 1, value_lives=profile.value_lives),
            )
        )
        start, inputs = end + 1, outputs
    return tuple(blocks)


def _crossing_values(value_lives: Sequence[Life], positions: Sequence[int]) -> list[tuple[ValueId, ...]]:
    """Return the values that cross each of the increasing `positions`, in id order."""
    crossing: list[list[ValueId]] = [[] for _ in positions]
    for value_id, life in enumerate(value_lives):
        for index in range(bisect_left(positions, life.made), bisect_left(positions, life.last_use)):
            crossing[index].append(ValueId(value_id))
    return [tuple(values) for values in crossing]


@dataclass(frozen=True, slots=True)
class _Saved:
    """A storage that a block saves: the node that makes it, the first node that saves it, and its bytes."""

    made: int
    first_save: int
    size_bytes: int


def _merge_light_blocks(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return the increasing `cuts` without those that only separate a light block.

    A *light* block makes next to nothing (a mask, the statistics of a norm): it costs planning time and offers nothing
    to keep or drop. It is merged across the costlier of its two cuts.
    """
    made_bytes = [0] * len(graph.nodes)
    for storage, position in made_at(graph).items():
        made_bytes[position] += graph.storages[storage].size_bytes
    total = [0, *accumulate(made_bytes)]
    last = len(graph.nodes) - 1
    limit_bytes = _LIGHT_SHARE * median(total[q + 1] - total[p + 1] for p, q in pairwise([-1, *cuts, last]))
    kept = [-1]
    for position in [*cuts, last]:
        # Without the cut before it the block is longer: repeat until it is not light.
        while total[position + 1] - total[kept[-1] + 1] < limit_bytes:
            is_first = len(kept) == 1
            if is_first or (position != last and profile.cost(kept[-1]) < profile.cost(position)):
                break
            kept.pop()
        else:
            kept.append(position)
    return tuple(p for p in kept if 0 <= p < last)


def _split_heavy_blocks(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return the increasing `cuts`, and those that split the blocks whose saved bytes set the smallest budget.

    The backward of the later half holds the new boundary beside its saved set, that of the earlier half its gradient.
    So the heaviest block is split where `max(saved before, saved after) + bytes of the boundary` is least, if that is
    clearly below its own saved bytes; then the next heaviest, until a split gains nothing.
    """
    made = made_at(graph)
    found = list(cuts)
    heap: list[tuple[int, int, int, tuple[_Saved, ...]]] = []

    def push(start: int, stop: int) -> None:
        saved = _saved_in(graph, made, start, stop)
        heapq.heappush(heap, (-sum(one.size_bytes for one in saved), start, stop, saved))

    for before, after in pairwise([-1, *cuts, len(graph.nodes) - 1]):
        push(before + 1, after + 1)
    while heap:
        _, start, stop, saved = heapq.heappop(heap)
        position = _best_split(graph, profile, saved, start, stop)
        if position is None:
            break
        found.append(position)
        push(start, position + 1)
        push(position + 1, stop)
    return tuple(sorted(found))


def _saved_in(graph: Graph, made: dict[StorageId, int], start: int, stop: int) -> tuple[_Saved, ...]:
    """Return what nodes `start` to `stop` save beside the storages that exist before them."""
    saved: dict[StorageId, _Saved] = {}
    for position in range(start, stop):
        for storage_id in graph.nodes[position].saved:
            storage = graph.storages[storage_id]
            maker = made.get(storage_id, position)  # a private one is made where it is saved
            if storage.kind is StorageKind.ACTIVATION and maker >= start:
                saved.setdefault(storage_id, _Saved(maker, position, storage.size_bytes))
    return tuple(saved.values())


def _best_split(graph: Graph, profile: FrontierProfile, saved: Sequence[_Saved], start: int, stop: int) -> int | None:
    """Return the allowed position at which to split nodes `start` to `stop`, `None` where none is worthwhile."""
    total_bytes = sum(one.size_bytes for one in saved)
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
    return best if best is not None and working[best - start] <= _WORTHWHILE_SHARE * total_bytes else None


def _boundary_bytes(graph: Graph, profile: FrontierProfile, start: int, stop: int) -> list[int]:
    """Return for each position of nodes `start` to `stop` the bytes of its frontier that did not exist before them."""
    steps = [0] * (stop - start)
    for storage in graph.storages_of(v for node in graph.nodes[start:stop] for v in node.makes):
        life, size_bytes = profile.storage_lives[storage], graph.storages[storage].size_bytes
        if life.made >= start:
            steps[life.made - start] += size_bytes
            if life.last_use < stop:
                steps[life.last_use - start] -= size_bytes
    return list(accumulate(steps))
