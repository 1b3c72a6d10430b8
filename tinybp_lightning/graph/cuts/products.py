"""Which ops does a replay not need, and which compute-heavy ops would it repeat for nothing?

An op that saves only what it reads, or a copy of it (autocast's), has saved before it computes. It is *skippable* if
nothing saved is made of its result: a matrix product at the end of a block, and an op that reads a skippable op.

A compute-heavy op (a matrix product, a convolution) saves what it reads and its backward never asks for its result, so
a replay runs it only for tensors that are saved after it in the same block. So blocks are cut after compute-heavy ops.
The result is then part of the boundary, which usually adds nothing to a saved set: the op that reads it (a norm, an
activation function) saves it. Selective checkpointing always keeps these results; here the planner decides. They are
wide, so these cuts are for budgets with headroom (`has_room_for_products`). `reorder` moves ops that stand in the way.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise
from statistics import median

from tinybp_lightning.graph.cuts.layers import MIN_OPS
from tinybp_lightning.graph.frontier import FrontierProfile
from tinybp_lightning.graph.ids import NodeId, StorageId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind

__all__ = [
    "cut_behind_products",
    "has_room_for_products",
    "is_activation",
    "is_compute_heavy",
    "saved_bytes",
    "skippable_ops",
    "worthwhile_skippable_ops",
]

# The share of what autograd saves from which on a budget has headroom. In transformers, ResNets and U-Nets the inputs
# and results of compute-heavy ops are half to two thirds of it.
_HEADROOM_SHARE = 0.4
# An op of fewer operations than this share of the usual compute-heavy op (a time embedding's) is light. Cuts after
# light ops are made only where they add few blocks.
_LIGHT_SHARE = 1 / 64
_FEW_MORE = 1.1
# Plans of longer chains are made on coarser tables, and would lose more than finer blocks gain.
_MAX_BLOCKS = 100
# Places whose local bytes differ by less are equally narrow: a time embedding crosses beside an activation.
_AS_NARROW = 1.05


def skippable_ops(graph: Graph, start: int, stop: int) -> frozenset[NodeId]:
    """Return the ops of the block `graph.nodes[start:stop]` whose results its replay does not need.

    Where ops may affect each other other than through values (an activation is changed in place, a region is entered),
    only the ops from the last one that saves are returned.
    """
    nodes = graph.nodes[start:stop]
    if not all(_is_plain(graph, node) for node in nodes):
        last = max((node.id for node in nodes if _saves_activation(graph, node)), default=start - 1)
        return frozenset(n.id for n in nodes if n.id > last or (n.id == last and not _saves_what_it_makes(graph, n)))
    needed: set[StorageId | None] = set()
    found: set[NodeId] = set()
    for node in reversed(nodes):
        is_skippable = not (
            node.is_random
            or node.is_collective
            or node.writes
            or _saves_what_it_makes(graph, node)
            or any(graph.values[v].storage in needed for v in node.makes)
        )
        if is_skippable:
            found.add(node.id)
        if not is_skippable or _saves_activation(graph, node):
            needed |= {graph.values[v].storage for v in node.reads}
    return frozenset(found)


def worthwhile_skippable_ops(graph: Graph, start: int, stop: int) -> dict[NodeId, bool]:
    """Return the compute-heavy ops that a replay of a block would run for nothing, and the ops that read their results.

    A skippable op after the last op that saves is left out anyway; one that is not compute-heavy takes little time.
    Each node comes with whether it saves no activation.
    """
    nodes = graph.nodes[start:stop]
    skippable = skippable_ops(graph, start, stop)
    last = max((node.id for node in nodes if _saves_activation(graph, node)), default=start)
    found: dict[NodeId, bool] = {}
    without: set[StorageId | None] = set()
    for node in nodes:
        is_compute_heavy = node.flops > 0 and node.id < last
        if node.id in skippable and (is_compute_heavy or any(graph.values[v].storage in without for v in node.reads)):
            found[node.id] = not _saves_activation(graph, node)
            without |= {graph.values[v].storage for v in node.makes}
    return found


def cut_behind_products(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts`, and cuts after the compute-heavy ops that a replay of their block would repeat.

    A cut that is close to such a place and not narrower moves there, because a block has at least `MIN_OPS` ops. Where
    more than `_MAX_BLOCKS` blocks would result, cuts are moved but not added.
    """
    products = [node.id for node in graph.nodes if is_compute_heavy(graph, node)]
    limit = _LIGHT_SHARE * median(graph.nodes[p].flops for p in products) if products else 0
    heavy = [p for p in products if graph.nodes[p].flops >= limit]
    cut = partial(_cut, graph, profile, cuts, heavy)
    finer = cut(heavy, may_add=True)
    if len(finer) >= _MAX_BLOCKS:
        return cut(heavy, may_add=False)
    finest = cut(products, may_add=True)
    return finest if len(finest) <= _FEW_MORE * len(finer) else finer


def saved_bytes(graph: Graph) -> int:
    """Return the bytes of all activations that plain training saves."""
    return graph.activation_bytes(s for node in graph.nodes for s in node.saved)


def has_room_for_products(share: float) -> bool:
    """Return whether a budget, a share of what plain training saves, has headroom for cuts after compute-heavy ops."""
    return share >= _HEADROOM_SHARE


def is_activation(graph: Graph, storage: StorageId) -> bool:
    """Return whether a storage is an activation."""
    return graph.storages[storage].kind is StorageKind.ACTIVATION


def is_compute_heavy(graph: Graph, node: Node) -> bool:
    """Return whether the op takes many operations and its backward does not ask for its own result."""
    return node.flops > 0 and not _saves_what_it_makes(graph, node)


def _saves_activation(graph: Graph, node: Node) -> bool:
    return any(is_activation(graph, s) for s in node.saved)


def _saves_what_it_makes(graph: Graph, node: Node) -> bool:
    """Return whether the op saves a result or a storage of its own (statistics, a mask); copies do not count."""
    known = {graph.values[v].storage for v in node.reads} | {copy for copy, _ in node.copies}
    return any(s not in known and is_activation(graph, s) for s in node.saved)


def _is_plain(graph: Graph, node: Node) -> bool:
    return all(graph.values[v].storage is not None for v in node.makes) and not any(
        is_activation(graph, s) for s in node.writes
    )


def _cut(
    graph: Graph,
    profile: FrontierProfile,
    cuts: Sequence[int],
    heavy: Collection[int],
    products: Sequence[int],
    *,
    may_add: bool,
) -> tuple[int, ...]:
    """Return `cuts`, each moved after one of `products` if that is close, and with more added if `may_add`.

    A cut comes after a light op only where it is repeated alone, or where its result does not widen the frontier.
    """
    last = len(graph.nodes) - 1
    found = [-1]
    for end in [*cuts, last]:
        is_moved = False
        inside = [p for p in products if found[-1] < p < end]
        for product, following in pairwise([*inside, end]):
            start = found[-1] + 1
            # What the next one needs is the matter of the cut after that one.
            before = [p for p in inside if start <= p <= product]
            if skippable_ops(graph, start, following + 1).issuperset(before):
                continue
            place = _place_behind(graph, profile, max([p for p in before if p in heavy] or before), end)
            if place is None:
                continue
            # Too close to the cut before it, which may move here.
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
    """Return whether the last of `cuts` can move to `place`: it is not wider and no more ops are repeated."""
    before, last = cuts[-2:]
    skippable = skippable_ops(graph, before + 1, place + 1)
    products = (p for p in range(last + 1, place + 1) if is_compute_heavy(graph, graph.nodes[p]))
    is_narrow = profile.local_bytes[place] <= _AS_NARROW * profile.local_bytes[last]
    return is_narrow and skippable.issuperset({*products, *(skippable_ops(graph, before + 1, last + 1))})


def _place_behind(graph: Graph, profile: FrontierProfile, product: int, stop: int) -> int | None:
    """Return the best allowed position after `product` and before its result is used, if any.

    It comes after as many other compute-heavy ops as possible without a wider frontier.
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
    """Return the allowed position with the fewest elements in the run that begins at `product`, if any."""
    end = next((p for p in range(product + 1, stop) if profile.is_new[p]), stop)
    places = (p for p in range(product, end) if profile.is_allowed(p))
    return min(places, key=lambda p: (profile.num_elements[p], -p), default=None)
