"""Where is a graph cut into blocks, and what goes in and out of each block?

A cut should be narrow, because a stored boundary costs its frontier's bytes. All granularities start from the narrow
places of `valleys.py`. `Granularity.FINE` takes all of them, joins blocks that make next to nothing to a neighbour and
splits those whose own saved bytes set the least memory of any plan (`balance.py`). `Granularity.PRODUCTS` adds cuts
behind matrix products and convolutions (`products.py`): for budgets that leave room for their results, which are wide.
`Granularity.COARSE` takes one for each repeated module, the narrowest where modules say nothing, and those of results
that are read on. Which boundaries a plan *stores* is the planner's decision.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import assert_never

from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph.cuts.balance import merge_light_blocks, split_heavy_blocks
from tinybp_lightning.graph.cuts.layers import common_module
from tinybp_lightning.graph.cuts.products import cut_behind_products
from tinybp_lightning.graph.cuts.valleys import (
    fill_long_stretches,
    layer_cuts,
    narrow_valleys,
    returned_midway,
    space_out,
)
from tinybp_lightning.graph.frontier import FrontierProfile, Life, frontier_profile
from tinybp_lightning.graph.ids import NodeId, ValueId
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.graph.signature import block_signature

__all__ = ["BlockSpan", "Granularity", "choose_cuts", "cut_blocks"]


class Granularity(Enum):
    """How many blocks: cut behind products too, at every narrow place, or about one for each repeated module."""

    PRODUCTS = "products"
    FINE = "fine"
    COARSE = "coarse"


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Nodes `start` to `stop` (exclusive) of a graph, as one block.

    `inputs` are all values that cross the cut before it, those it only passes on included; `outputs` all that cross the
    cut after it (for the last block: what the graph returns and a node made); both in id order, so the outputs of one
    block are the inputs of the next. `external` are the graph inputs it reads, in the order it reads them.
    """

    start: int
    stop: int
    name: str
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
    external: tuple[ValueId, ...]
    signature: str


def choose_cuts(graph: Graph, *, granularity: Granularity) -> tuple[NodeId, ...]:
    """Return the positions after which to cut `graph`, in increasing order.

    **Returns:** allowed positions that leave at least two nodes in every block; empty where there is none.
    """
    profile = frontier_profile(graph)
    num_nodes = len(graph.nodes)
    match granularity:
        case Granularity.FINE | Granularity.PRODUCTS:
            narrow = sorted({*narrow_valleys(profile), *layer_cuts(graph, profile)})
            cuts = merge_light_blocks(graph, profile, space_out(profile, narrow, num_nodes))
            cuts = split_heavy_blocks(graph, profile, cuts)
            if granularity is Granularity.PRODUCTS:
                cuts = cut_behind_products(graph, profile, cuts)
        case Granularity.COARSE:
            layers = layer_cuts(graph, profile)
            stretches = fill_long_stretches(profile, layers)
            returned = returned_midway(graph, profile)
            cuts = space_out(profile, sorted({*layers, *stretches, *returned}), num_nodes)
        case _:
            assert_never(granularity)
    return tuple(NodeId(cut) for cut in cuts)


def cut_blocks(graph: Graph, cuts: Sequence[int]) -> tuple[BlockSpan, ...]:
    """Return the blocks that `cuts` (positions after which to cut) divide `graph` into.

    **Returns:** `len(cuts) + 1` spans in order, each with at least one node.

    **Raises:** `GraphError` where the cuts are not increasing, leave an empty block, or stand where none is allowed.
    """
    profile = frontier_profile(graph)
    num_nodes = len(graph.nodes)
    _check_cuts(profile, cuts, num_nodes)
    ends = [*cuts, num_nodes - 1]
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


def _check_cuts(profile: FrontierProfile, cuts: Sequence[int], num_nodes: int) -> None:
    if num_nodes == 0:
        raise GraphError("the graph has `nodes=()`: expected at least one node to make a block of.")
    for cut in cuts:
        if not 0 <= cut < num_nodes - 1:
            raise GraphError(f"cut `{cut}` leaves an empty block: expected a position below `{num_nodes - 1}`.")
        obstacle = profile.obstacles[cut]
        if obstacle is not None:
            raise GraphError(f"cut `{cut}` is not allowed: {obstacle.value}. Take a position that `is_allowed`.")
    for before, after in pairwise(cuts):
        if before >= after:
            raise GraphError(f"cut `{after}` follows cut `{before}`: expected increasing positions, each once.")


def _crossing_values(value_lives: Sequence[Life], positions: Sequence[int]) -> list[tuple[ValueId, ...]]:
    """Return the values that cross each of the increasing `positions`: as `values_at`, in one pass for all."""
    crossing: list[list[ValueId]] = [[] for _ in positions]
    for value_id, life in enumerate(value_lives):
        for index in range(bisect_left(positions, life.made), bisect_left(positions, life.last_use)):
            crossing[index].append(ValueId(value_id))
    return [tuple(values) for values in crossing]
