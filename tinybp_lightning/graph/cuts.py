"""Where is a graph cut into blocks, and what goes in and out of each block?

A cut should be narrow, because a stored boundary costs its frontier's bytes. *Runs* are maximal stretches of positions
with one and the same frontier, *shelves* neighbouring runs of equal width; a shelf lower than both its neighbours is a
valley, and every run of it is a candidate. Inside a run the frontier does not tell positions apart, the values do: the
last position with the fewest crossing elements lets a view go with its producer and keeps an expanded copy of a tensor,
or a transposed weight, from crossing.

`Granularity.FINE` follows the valleys alone; `Granularity.COARSE` follows the repeated modules (`modules.py`) and falls
back to the narrowest valleys where they say nothing. Which boundaries a plan *stores* is the planner's decision.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from statistics import median
from typing import assert_never

from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph.frontier import FrontierProfile, Life, frontier_profile
from tinybp_lightning.graph.ids import NodeId, ValueId
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.graph.modules import common_module, layer_transitions
from tinybp_lightning.graph.structure import block_signature

__all__ = ["BlockSpan", "Granularity", "choose_cuts", "cut_blocks"]

# A one-op block has nothing to keep or drop between its boundaries that the boundaries do not hold already.
_MIN_OPS = 2
# In a transformer layer the narrow valleys hold one or two streams (the residual, and one tensor on its way to it), the
# wide ones sit inside attention or the MLP and hold four or more: 2.5 streams part the two kinds.
_WIDE_RATIO = 2.5
# Ops on either side in which a narrower valley makes a wide one superfluous: half an attention or a convolution block.
_WINDOW = 16
# Residual streams of one stack differ by masks and position tables only; anything wider is not the stream alone.
_REPEAT_TOLERANCE = 1.05
# A stretch this many times longer than the usual layer is not one layer: it is cut at its own valleys.
_LONG_STRETCH_RATIO = 2


class Granularity(Enum):
    """How many blocks: every narrow place (`FINE`), or about one for each repeated module (`COARSE`)."""

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
    stop = len(graph.nodes)
    valleys = _valleys(profile, 0, stop)
    match granularity:
        case Granularity.FINE:
            chosen = _drop_wide(profile, valleys)
        case Granularity.COARSE:
            layers = _layer_cuts(graph, profile)
            chosen = sorted({*layers, *_fill_long_stretches(profile, layers, valleys, stop)})
        case _:
            assert_never(granularity)
    return tuple(NodeId(p) for p in _space_out(profile, chosen, stop))


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
            raise GraphError(f"cut `{cut}` leaves an empty block: expected `0` to `{num_nodes - 2}`.")
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


def _valleys(profile: FrontierProfile, start: int, stop: int) -> list[int]:
    """Return the best allowed position of each run in a local minimum of the width, ends counting as higher."""
    runs = _runs(profile, start, stop)
    widths = [profile.width_bytes[p] for p in runs]
    valleys: list[int] = []
    first = 0
    while first < len(runs):
        last = first
        while last + 1 < len(runs) and widths[last + 1] == widths[first]:
            last += 1
        falls = first == 0 or widths[first - 1] > widths[first]
        rises = last + 1 == len(runs) or widths[last + 1] > widths[first]
        if falls and rises:
            valleys.extend(runs[first : last + 1])
        first = last + 1
    return valleys


def _runs(profile: FrontierProfile, start: int, stop: int) -> list[int]:
    """Return the best allowed position of each run of equal frontiers; runs without one are left out."""
    best: list[int] = []
    open_run = False
    for position in range(start, stop):
        open_run = open_run and not profile.is_new[position]
        if not profile.is_allowed(position):
            continue
        if not open_run:
            best.append(position)
        elif profile.num_elements[position] <= profile.num_elements[best[-1]]:
            best[-1] = position
        open_run = True
    return best


def _drop_wide(profile: FrontierProfile, valleys: Sequence[int]) -> list[int]:
    """Drop valleys far wider than the usual one, unless they are the narrowest within the window.

    The second condition keeps the early stages of a convolution net, whose every frontier is wide.
    """
    width = profile.width_bytes
    # Frontiers of nothing but small tables (positions, masks) come before the first real activation: 0 is no scale.
    positive = [width[p] for p in valleys if width[p] > 0]
    if not positive:
        return list(valleys)
    limit_bytes = _WIDE_RATIO * median(positive)
    return [p for p in valleys if width[p] <= limit_bytes or _is_narrowest_near(profile, valleys, p)]


def _is_narrowest_near(profile: FrontierProfile, valleys: Sequence[int], position: int) -> bool:
    near = valleys[bisect_left(valleys, position - _WINDOW) : bisect_left(valleys, position + _WINDOW + 1)]
    return all(profile.width_bytes[p] >= profile.width_bytes[position] for p in near)


def _layer_cuts(graph: Graph, profile: FrontierProfile) -> list[int]:
    """Return the narrow places between repeated modules: one for each transition, where its container repeats."""
    by_container: dict[str, list[int]] = {}
    for transition in layer_transitions(graph):
        places = [p for p in range(transition.first, transition.stop) if profile.is_allowed(p)]
        if places:
            narrowest = min(places, key=lambda p: (profile.width_bytes[p], profile.num_elements[p], -p))
            by_container.setdefault(transition.container, []).append(narrowest)
    cuts: list[int] = []
    for places in by_container.values():
        widths = sorted(profile.width_bytes[p] for p in places)
        repeating = [narrow for narrow, wide in pairwise(widths) if wide <= _REPEAT_TOLERANCE * narrow]
        if repeating:
            cuts.extend(p for p in places if profile.width_bytes[p] <= _REPEAT_TOLERANCE * repeating[0])
    return sorted(cuts)


def _fill_long_stretches(
    profile: FrontierProfile, layers: Sequence[int], valleys: Sequence[int], stop: int
) -> list[int]:
    """Return the narrowest valleys of every stretch without layer cuts that is too long to be one layer."""
    limit = _LONG_STRETCH_RATIO * median(right - left for left, right in pairwise(layers)) if len(layers) > 1 else 0
    filling: list[int] = []
    for left, right in pairwise([-1, *layers, stop - 1]):
        if right - left > limit:
            inside = [p for p in valleys if left < p < right]
            filling.extend(p for p in inside if _is_narrowest_near(profile, inside, p))
    return filling


def _space_out(profile: FrontierProfile, positions: Sequence[int], stop: int) -> list[int]:
    """Drop positions that would leave a block of fewer than `_MIN_OPS` nodes; of two too close, the wider one."""
    kept: list[int] = []
    for position in positions:
        if position + 1 < _MIN_OPS or stop - 1 - position < _MIN_OPS:
            continue
        if not kept or position - kept[-1] >= _MIN_OPS:
            kept.append(position)
        elif profile.width_bytes[position] < profile.width_bytes[kept[-1]]:
            kept[-1] = position
    return kept
