"""Where is a graph narrow?

*Runs* are maximal stretches of positions with one and the same frontier, *shelves* neighbouring runs of equal local
bytes; a shelf lower than both its neighbours is a *valley*, and every run of it is a narrow place. Inside a run the
frontier does not tell positions apart, the values do: the last position with the fewest crossing elements lets a view
go with its producer, and keeps an expanded copy of a tensor or a transposed weight from crossing.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from tinybp_lightning.graph.cuts.layers import layer_transitions
from tinybp_lightning.graph.frontier import FrontierProfile
from tinybp_lightning.graph.ir import Graph

__all__ = ["MIN_OPS", "fill_long_stretches", "layer_cuts", "narrow_valleys", "returned_midway", "space_out"]

# A one-op block has nothing to keep or drop that the boundaries around it do not hold already.
MIN_OPS = 2
# In a transformer layer the narrow valleys hold one or two streams (the residual, and one tensor on its way to it), the
# wide ones sit inside attention or the MLP and hold four or more: 2.5 streams part the two kinds.
_WIDE_RATIO = 2.5
# Ops on either side in which a narrower valley makes a wide one superfluous: half an attention or a convolution block.
_WINDOW = 16
# Residual streams of one stack differ by masks and position tables only; anything wider is not the stream alone.
_REPEAT_TOLERANCE = 1.05
# A stretch this many times longer than the usual layer is not one layer: it is cut at its own valleys.
_LONG_STRETCH_RATIO = 2


def narrow_valleys(profile: FrontierProfile) -> tuple[int, ...]:
    """Return the valleys, without those far wider than the usual one that have a narrower one nearby.

    A wide valley that is the narrowest of its window stays: every frontier in the early stages of a convolution net is
    wide.
    """
    local = profile.local_bytes
    valleys = _valleys(profile)
    # Valleys of long-lived storages alone have no local bytes: 0 is no scale to measure others by.
    positive = [local[p] for p in valleys if local[p] > 0]
    limit_bytes = _WIDE_RATIO * median(positive) if positive else 0
    return tuple(p for p in valleys if local[p] <= limit_bytes or _is_narrowest_near(profile, valleys, p))


def layer_cuts(graph: Graph, profile: FrontierProfile) -> tuple[int, ...]:
    """Return the narrow places between repeated modules, in stacks of layers and in stacks of stages of layers.

    One for each transition that is a valley or has the narrowest width that repeats in its container; inside a stage,
    one for each transition between its layers that is as narrow as the stage's end.
    """
    valleys = set(_valleys(profile))
    by_container: dict[str, list[int]] = {}
    for container, place in _transition_places(graph, profile, depth=1):
        by_container.setdefault(container, []).append(place)
    repeating = {place for places in by_container.values() for place in _repeating(profile, places)}
    stages = [place for places in by_container.values() for place in places if place in repeating or place in valleys]
    stages.sort()
    inner = [place for _, place in _transition_places(graph, profile, depth=2)]
    ends = [bisect_left(stages, place) for place in inner]
    layers = [
        place
        for place, end in zip(inner, ends, strict=True)
        if 0 < end < len(stages) and _is_as_narrow(profile, place, stages[end])
    ]
    return tuple(sorted({*stages, *layers}))


def fill_long_stretches(profile: FrontierProfile, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the narrowest valleys of every stretch between layer cuts that is too long to be one layer."""
    limit = _LONG_STRETCH_RATIO * median(right - left for left, right in pairwise(layers)) if len(layers) > 1 else 0
    valleys = _valleys(profile)
    filling: list[int] = []
    for left, right in pairwise([-1, *layers, len(profile.width_bytes) - 1]):
        if right - left > limit:
            inside = [p for p in valleys if left < p < right]
            filling.extend(p for p in inside if _is_narrowest_near(profile, inside, p))
    return tuple(filling)


def returned_midway(graph: Graph, profile: FrontierProfile) -> tuple[int, ...]:
    """Return the places where a tensor is made that the graph returns and goes on to read (logits, then their loss).

    A compiled block that returns such a tensor beside its result counts on a gradient for it from outside, and makes
    zeros of its size in backward when none comes. Cut where it is made, the block after it is the one that gives it.
    """
    read_after = {v: node.id for node in graph.nodes for v in node.reads}
    made = {v: node.id for node in graph.nodes for v in node.makes}
    found = {made[v] for v in graph.outputs if v in made and read_after.get(v, made[v]) > made[v]}
    found = {p for p in found if any(graph.values[v].requires_grad for v in graph.nodes[p].makes)}
    return tuple(sorted(p for p in found if profile.is_allowed(p)))


def space_out(profile: FrontierProfile, positions: Sequence[int], num_nodes: int) -> tuple[int, ...]:
    """Drop positions that would leave a block of fewer than `MIN_OPS` nodes; of two too close, the wider one."""
    kept: list[int] = []
    for position in positions:
        if position + 1 < MIN_OPS or num_nodes - 1 - position < MIN_OPS:
            continue
        if not kept or position - kept[-1] >= MIN_OPS:
            kept.append(position)
        elif profile.cost(position) < profile.cost(kept[-1]):
            kept[-1] = position
    return tuple(kept)


def _transition_places(graph: Graph, profile: FrontierProfile, *, depth: int) -> list[tuple[str, int]]:
    """Return the container and the cheapest allowed position of each transition between repeated modules."""
    found: list[tuple[str, int]] = []
    for transition in layer_transitions(graph, depth=depth):
        places = [p for p in range(transition.first, transition.stop) if profile.is_allowed(p)]
        if places:
            found.append((transition.container, min(places, key=lambda p: (*profile.cost(p), -p))))
    return found


def _repeating(profile: FrontierProfile, places: Sequence[int]) -> list[int]:
    """Return the places as narrow as the narrowest two that are alike; none where all differ."""
    by_width = sorted(places, key=lambda p: profile.local_bytes[p])
    narrowest = next((left for left, right in pairwise(by_width) if _is_as_narrow(profile, right, left)), None)
    return [] if narrowest is None else [p for p in places if _is_as_narrow(profile, p, narrowest)]


def _is_as_narrow(profile: FrontierProfile, position: int, other: int) -> bool:
    """Return whether `position` is as narrow as `other`, all storages counted or only those that live there.

    Either is enough: skips that pile up spoil the first comparison, and a residual that happens to die early, as after
    the last layer, the second.
    """
    return any(
        width[position] <= _REPEAT_TOLERANCE * width[other] for width in (profile.width_bytes, profile.local_bytes)
    )


def _valleys(profile: FrontierProfile) -> list[int]:
    """Return the best allowed position of each run in a local minimum of the local bytes; the ends count as higher."""
    runs = _runs(profile)
    widths = [profile.local_bytes[p] for p in runs]
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


def _runs(profile: FrontierProfile) -> list[int]:
    """Return the best allowed position of each run of equal frontiers; runs without one are left out."""
    best: list[int] = []
    is_open = False
    for position, is_new in enumerate(profile.is_new):
        is_open = is_open and not is_new
        if not profile.is_allowed(position):
            continue
        if not is_open:
            best.append(position)
        elif profile.num_elements[position] <= profile.num_elements[best[-1]]:
            best[-1] = position
        is_open = True
    return best


def _is_narrowest_near(profile: FrontierProfile, valleys: Sequence[int], position: int) -> bool:
    near = valleys[bisect_left(valleys, position - _WINDOW) : bisect_left(valleys, position + _WINDOW + 1)]
    return all(profile.local_bytes[p] >= profile.local_bytes[position] for p in near)
