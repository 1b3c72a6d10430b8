"""Where is a graph narrow, and where do its repeated modules end?

A *run* is a maximal stretch of positions with one frontier. Neighbouring runs of equal local bytes, lower than the runs
on both sides, are a *local minimum of the frontier*. Inside a run the last position with the fewest crossing elements
is best: it keeps a view with its producer, and an expanded copy or a transposed weight from crossing.

The dotted path of a layer has an integer part: `model.layers.3.mlp` lies in item `3` of container `model.layers`. A
container *repeats* when two of its items use the same set of ops; otherwise its items are searched instead.
"""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise, takewhile
from statistics import median

from tinybp_lightning.graph.frontier import FrontierProfile
from tinybp_lightning.graph.ir import Graph

__all__ = [
    "MIN_OPS",
    "common_module",
    "fill_long_stretches",
    "layer_cuts",
    "narrow_places",
    "returned_midway",
    "space_out",
]

# A block of one op has nothing to keep or drop that the boundaries around it do not hold already.
MIN_OPS = 2
# In a transformer layer a narrow minimum holds one or two streams (the residual, and one tensor on its way to it), a
# wide one, inside attention or the MLP, four or more: 2.5 streams separate the two kinds.
_WIDE_RATIO = 2.5
# A wide minimum is dropped if a narrower one lies within this many ops: half an attention or a convolution block.
_WINDOW = 16
# Residual streams of one stack differ only by masks and position tables; a wider frontier holds more than the stream.
_REPEAT_TOLERANCE = 1.05
# A stretch this many times longer than the usual layer is more than one layer: it is cut at its own minima.
_LONG_STRETCH_RATIO = 2


def narrow_places(profile: FrontierProfile) -> tuple[int, ...]:
    """Return the local minima of the frontier, without those far wider than usual that have a narrower one nearby.

    The narrowest of a window stays: all frontiers in the early stages of a convolution net are wide.
    """
    local = profile.local_bytes
    minima = _local_minima(profile)
    # A minimum of long-lived storages alone has no local bytes, and others cannot be measured against 0.
    positive = [local[p] for p in minima if local[p] > 0]
    limit_bytes = _WIDE_RATIO * median(positive or [0])
    return tuple(p for p in minima if local[p] <= limit_bytes or _is_narrowest_near(profile, minima, p))


def layer_cuts(graph: Graph, profile: FrontierProfile) -> tuple[int, ...]:
    """Return the narrow places between repeated modules, in stacks of layers and in stacks of stages of layers.

    There is one for each transition that is a local minimum or has the narrowest width that repeats in its container;
    and, inside a stage, one for each transition between its layers that is as narrow as the stage's end.
    """
    minima = set(_local_minima(profile))
    by_container: defaultdict[str, list[int]] = defaultdict(list)
    for container, place in _transition_places(graph, profile, depth=1):
        by_container[container].append(place)
    repeating = {place for places in by_container.values() for place in _repeating(profile, places)}
    stages = sorted(p for places in by_container.values() for p in places if p in repeating or p in minima)
    layers = [
        place
        for _, place in _transition_places(graph, profile, depth=2)
        if 0 < (end := bisect_left(stages, place)) < len(stages) and _is_as_narrow(profile, place, stages[end])
    ]
    return tuple(sorted({*stages, *layers}))


def fill_long_stretches(profile: FrontierProfile, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the narrowest minima of every stretch between layer cuts that is too long to be one layer."""
    limit = _LONG_STRETCH_RATIO * median(right - left for left, right in pairwise(layers)) if len(layers) > 1 else 0
    minima = _local_minima(profile)
    filling: list[int] = []
    for left, right in pairwise([-1, *layers, len(profile.width_bytes) - 1]):
        if right - left > limit:
            inside = [p for p in minima if left < p < right]
            filling.extend(p for p in inside if _is_narrowest_near(profile, inside, p))
    return tuple(filling)


def returned_midway(graph: Graph, profile: FrontierProfile) -> tuple[int, ...]:
    """Return the places that make a tensor which the graph returns and also reads later (logits, then their loss).

    A compiled block that returns such a tensor beside its result expects a gradient for it from the caller, and makes
    zeros of its size in backward when none comes. With a cut after its maker, the next block provides the gradient.
    """
    read_after = {v: node.id for node in graph.nodes for v in node.reads}
    made = {v: node.id for node in graph.nodes for v in node.makes}
    found = {made[v] for v in graph.outputs if v in made and read_after.get(v, made[v]) > made[v]}
    wanted = (p for p in found if any(graph.values[v].requires_grad for v in graph.nodes[p].makes))
    return tuple(sorted(p for p in wanted if profile.is_allowed(p)))


def space_out(profile: FrontierProfile, positions: Sequence[int]) -> tuple[int, ...]:
    """Drop positions that would leave a block of fewer than `MIN_OPS` nodes; of two too close, the wider one."""
    kept: list[int] = []
    last = len(profile.width_bytes) - 1 - MIN_OPS
    for position in (p for p in positions if MIN_OPS - 1 <= p <= last):
        if not kept or position - kept[-1] >= MIN_OPS:
            kept.append(position)
        elif profile.cost(position) < profile.cost(kept[-1]):
            kept[-1] = position
    return tuple(kept)


def common_module(graph: Graph, start: int, stop: int) -> str:
    """Return the deepest module path that all nodes `start` to `stop` with a path share; empty where none does."""
    paths = [node.module.split(".") for node in graph.nodes[start:stop] if node.module]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


_Item = tuple[str, str]
"""The path of a container and an item in it."""


def _transition_places(graph: Graph, profile: FrontierProfile, *, depth: int) -> list[tuple[str, int]]:
    """Return the container and the cheapest allowed position of every change of repeated module, the ends included.

    A node outside all repeated modules belongs to the change only if it lies between two different modules. The
    container is the one that is left, or entered where none is left. `depth` nested containers are looked into: 1 for
    layers, 2 for the layers of stages.
    """
    repeated = _repeated_containers(graph)
    found: list[tuple[str, int]] = []

    def add(container: str, first: int, stop: int) -> None:
        places = [p for p in range(first, stop) if profile.is_allowed(p)]
        if places:
            found.append((container, min(places, key=lambda p: (*profile.cost(p), -p))))

    previous: tuple[_Item, ...] = ()
    last = -1
    for position, node in enumerate(graph.nodes):
        items = tuple(item for item in _items(node.module) if item[0] in repeated)[:depth]
        if not items:
            continue
        if items != previous and position > 0:
            # The whole stem stands before the first item; only its very end is a transition.
            left, first = (previous, last) if previous else (items, position - 1)
            add(left[-1][0], first, position)
        previous, last = items, position
    if previous and last < len(graph.nodes) - 1:
        add(previous[-1][0], last, last + 1)
    return found


def _items(module: str) -> Iterator[_Item]:
    """Yield the container items on a module path, outermost first."""
    segments = module.split(".")
    for depth, segment in enumerate(segments):
        if segment.isdecimal():
            yield ".".join(segments[:depth]), segment


def _repeated_containers(graph: Graph) -> frozenset[str]:
    ops: defaultdict[_Item, set[str]] = defaultdict(set)
    for node in graph.nodes:
        for item in _items(node.module):
            ops[item].add(node.op)
    alike = Counter((container, frozenset(used)) for (container, _), used in ops.items())
    return frozenset(container for (container, _), count in alike.items() if count > 1)


def _repeating(profile: FrontierProfile, places: Sequence[int]) -> list[int]:
    """Return the places that are as narrow as the narrowest two of equal width; none where all widths differ."""
    by_width = sorted(places, key=lambda p: profile.local_bytes[p])
    narrowest = next((left for left, right in pairwise(by_width) if _is_as_narrow(profile, right, left)), None)
    return [] if narrowest is None else [p for p in places if _is_as_narrow(profile, p, narrowest)]


def _is_as_narrow(profile: FrontierProfile, position: int, other: int) -> bool:
    """Return whether `position` is as narrow as `other`, by all bytes or by local bytes.

    Accumulated skips distort the first comparison, and a residual that dies early, as after the last layer, the second.
    """
    return any(w[position] <= _REPEAT_TOLERANCE * w[other] for w in (profile.width_bytes, profile.local_bytes))


def _local_minima(profile: FrontierProfile) -> list[int]:
    """Return the best allowed position of each run in a local minimum of the local bytes; the ends count as higher."""
    levels = [list(runs) for _, runs in groupby(_runs(profile), key=lambda p: profile.local_bytes[p])]
    widths = [math.inf, *(profile.local_bytes[runs[0]] for runs in levels), math.inf]
    return [p for k, runs in enumerate(levels, start=1) if widths[k - 1] > widths[k] < widths[k + 1] for p in runs]


def _runs(profile: FrontierProfile) -> list[int]:
    """Return the best allowed position of each run that has one."""
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


def _is_narrowest_near(profile: FrontierProfile, minima: Sequence[int], position: int) -> bool:
    near = minima[bisect_left(minima, position - _WINDOW) : bisect_left(minima, position + _WINDOW + 1)]
    return all(profile.local_bytes[p] >= profile.local_bytes[position] for p in near)
