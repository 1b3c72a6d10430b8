"""Which matrix products and convolutions would a replay repeat for nothing?

A product saves what it reads and its backward never asks for its result, so a replay runs it only for the sake of what
is saved behind it, in the same block (`spare`). So blocks are cut behind their products. The result is part of the
boundary then, which mostly costs nothing beside a saved set: the op that reads it (a norm, an activation function)
saves it. Selective checkpointing always keeps the results of products; here it is the planner's choice.

Results of products are wide, though: near the smallest budget there is no room for them, and narrow blocks of more ops
need less. So this is for budgets with room (`has_room_for_products`).

A cut helps only where what is saved behind it can be made from it: `delays` moves ops that stand in the way.
"""

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from statistics import median

from tinybp_lightning.graph.cuts.skippable import is_activation, saves_what_it_makes, skippable_ops
from tinybp_lightning.graph.cuts.valleys import MIN_OPS
from tinybp_lightning.graph.frontier import FrontierProfile
from tinybp_lightning.graph.ir import Graph, Node

__all__ = ["cut_behind_products", "has_room_for_products", "is_compute_heavy", "saved_bytes"]

_ROOM = 0.4
"""Of what autograd saves. In transformers, ResNets and U-Nets inputs and results of products are half to two thirds."""

# A product of fewer operations than this share of the usual one (a time embedding's) is light. Light products are cut
# behind only where that makes few more blocks.
_LIGHT_SHARE = 1 / 64
_FEW_MORE = 1.1
# Plans of longer chains are made on coarser tables, and would lose more than finer blocks gain.
_MAX_BLOCKS = 100
# Places that differ by less in their local bytes are equally narrow: a time embedding crosses beside an activation.
_AS_NARROW = 1.05


def cut_behind_products(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts` and those behind products that a replay of their block would repeat.

    A cut that stands close to such a place, and is no narrower, is moved there: a block has `MIN_OPS` ops at least.
    Where more than `_MAX_BLOCKS` blocks would result, cuts are moved and none is added.

    **Arguments:** `cuts`: increasing, allowed positions.

    **Returns:** increasing positions; `cuts` itself where no product is known.
    """
    products = [node.id for node in graph.nodes if is_compute_heavy(graph, node)]
    limit = _LIGHT_SHARE * median(graph.nodes[p].flops for p in products) if products else 0
    heavy = [p for p in products if graph.nodes[p].flops >= limit]
    finer = _cut(graph, profile, cuts, heavy, heavy, may_add=True)
    if len(finer) >= _MAX_BLOCKS:
        return _cut(graph, profile, cuts, heavy, heavy, may_add=False)
    finest = _cut(graph, profile, cuts, products, heavy, may_add=True)
    return finest if len(finest) <= _FEW_MORE * len(finer) else finer


def saved_bytes(graph: Graph) -> int:
    """Return the bytes of all activations that plain training saves."""
    saved = {s for node in graph.nodes for s in node.saved if is_activation(graph, s)}
    return sum(graph.storages[s].size_bytes for s in saved)


def has_room_for_products(share: float) -> bool:
    """Return whether a budget of this share of what plain training saves is one to cut behind products for."""
    return share >= _ROOM


def _cut(
    graph: Graph,
    profile: FrontierProfile,
    cuts: Sequence[int],
    products: Sequence[int],
    heavy: Collection[int],
    *,
    may_add: bool,
) -> tuple[int, ...]:
    """Return `cuts` with those close to one of `products` moved behind it, and with others added if that may be.

    Behind a light product only where it is repeated alone, or where its result does not make the frontier wider.
    """
    last = len(graph.nodes) - 1
    found = [-1]
    for end in [*cuts, last]:
        is_moved = False
        inside = [p for p in products if found[-1] < p < end]
        for product, following in pairwise([*inside, end]):
            start = found[-1] + 1
            # What is needed behind the next product is for the cut behind that one to part off.
            before = [p for p in inside if start <= p <= product]
            if skippable_ops(graph, start, following + 1).issuperset(before):
                continue
            place = _place_behind(graph, profile, max([p for p in before if p in heavy] or before), end)
            if place is None:
                continue
            # Too close behind a cut: that one may move here.
            is_shift = place - start + 1 < MIN_OPS
            if is_shift and (len(found) == 1 or not _may_shift(graph, profile, found, place)):
                continue
            is_close = end - place < MIN_OPS
            if is_close and (end == last or profile.local_bytes[end] < profile.local_bytes[place]):
                continue
            if not (is_close or is_shift or may_add):
                continue
            if is_shift:
                found.pop()
            found.append(place)
            is_moved = is_close
        if not is_moved:
            found.append(end)
    return tuple(found[1:-1])


def _may_shift(graph: Graph, profile: FrontierProfile, cuts: Sequence[int], place: int) -> bool:
    """Return whether the last of `cuts` may as well be at `place`: no wider, and no product more is repeated."""
    before, last = cuts[-2:]
    spare = skippable_ops(graph, before + 1, place + 1)
    products = (p for p in range(last + 1, place + 1) if is_compute_heavy(graph, graph.nodes[p]))
    is_narrow = profile.local_bytes[place] <= _AS_NARROW * profile.local_bytes[last]
    return is_narrow and spare.issuperset({*products, *(skippable_ops(graph, before + 1, last + 1))})


def is_compute_heavy(graph: Graph, node: Node) -> bool:
    """Return whether the op is one of many operations whose backward does not ask for what it made itself."""
    return node.flops > 0 and not saves_what_it_makes(graph, node)


def _place_behind(graph: Graph, profile: FrontierProfile, product: int, stop: int) -> int | None:
    """Return the allowed position behind `product`, and before its result is used, that is best to cut at, if any.

    That is one behind as many more products as can be without a wider frontier.
    """
    mine = {graph.values[v].storage for v in graph.nodes[product].makes}
    best, limit_bytes = None, math.inf
    for p in range(product, stop):
        # A view of the result changes no frontier.
        is_used = p > product and not mine.isdisjoint(graph.values[v].storage for v in graph.nodes[p].reads)
        if is_used and profile.is_new[p]:
            break
        if is_compute_heavy(graph, graph.nodes[p]):
            place = _narrowest_from(profile, p, stop)
            if place is not None and profile.local_bytes[place] <= limit_bytes:
                best, limit_bytes = place, min(limit_bytes, _AS_NARROW * profile.local_bytes[place])
    return best


def _narrowest_from(profile: FrontierProfile, product: int, stop: int) -> int | None:
    """Return the allowed position behind `product` with the fewest elements among those of one frontier, if any."""
    places = [product]
    while places[-1] + 1 < stop and not profile.is_new[places[-1] + 1]:
        places.append(places[-1] + 1)
    return min((p for p in places if profile.is_allowed(p)), key=lambda p: (profile.num_elements[p], -p), default=None)
