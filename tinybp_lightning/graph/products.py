"""Which matrix products and convolutions would a replay repeat for nothing?

A replay ends at the last saved tensor. A product saves what it reads and its backward never asks for its result, so a
block that ends with one is replayed without it; a product in the middle of a block is repeated for the sake of what is
saved behind it. So blocks are cut behind their products. The result is part of the boundary then, which mostly costs
nothing beside a saved set: the op that reads it (a norm, an activation function) saves it. Selective checkpointing
always keeps the results of products; here it is the planner's choice.

Results of products are wide, though: near the smallest budget there is no room for them, and narrow blocks of more ops
need less. So this is for budgets with room (`has_room_for_products`).

A cut helps only where what is saved behind it can be made from it. In `act(gate(x)) * up(x)` the activation function
runs before the second product, and what it makes is saved behind it. It can as well run when its result is asked for:
`delay_cheap_ops` puts it there, and no bit changes. See Note [Order of gradients].

Note [Order of gradients]
    Autograd runs backward in descending order of creation, and sums the gradients of one value in that order. An op
    that is created later than it was runs earlier in backward. That changes the order of a sum only where an op that it
    was moved past reads what it reads, and the moment of a parameter's hook where it reads a parameter; such ops stay.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from tinybp_lightning.graph.balance import made_at
from tinybp_lightning.graph.frontier import FrontierProfile
from tinybp_lightning.graph.ids import NodeId, StorageId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind
from tinybp_lightning.graph.valleys import MIN_OPS

__all__ = ["cut_behind_products", "delay_cheap_ops", "has_room_for_products", "saved_bytes"]

_ROOM = 0.4
"""Of what autograd saves. In transformers, ResNets and U-Nets inputs and results of products are half to two thirds."""

# A product of fewer operations than this share of the usual one (a time embedding's) is not worth a block.
_LIGHT_SHARE = 1 / 64
# Plans of longer chains are made on coarser tables, and would lose more than finer blocks gain.
_MAX_BLOCKS = 100


def cut_behind_products(graph: Graph, profile: FrontierProfile, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts` and those behind products that a replay of their block would repeat.

    A cut that stands just behind such a place, and is no narrower, is moved there: a block has `MIN_OPS` ops at least.
    Where more than `_MAX_BLOCKS` blocks would result, cuts are moved and none is added.

    **Arguments:** `cuts`: increasing, allowed positions.

    **Returns:** increasing positions; `cuts` itself where no product is known.
    """
    finer = _cut(graph, profile, cuts, may_add=True)
    return finer if len(finer) < _MAX_BLOCKS else _cut(graph, profile, cuts, may_add=False)


def saved_bytes(graph: Graph) -> int:
    """Return the bytes of all activations that plain training saves."""
    saved = {s for node in graph.nodes for s in node.saved if _is_activation(graph, s)}
    return sum(graph.storages[s].size_bytes for s in saved)


def has_room_for_products(share: float) -> bool:
    """Return whether a budget of this share of what plain training saves is one to cut behind products for."""
    return share >= _ROOM


def _cut(graph: Graph, profile: FrontierProfile, cuts: Sequence[int], *, may_add: bool) -> tuple[int, ...]:
    """Return `cuts` with those close behind a product moved to it, and with others added if that may be."""
    products = [node.id for node in graph.nodes if _is_product(graph, node)]
    if not products:
        return tuple(cuts)
    limit = _LIGHT_SHARE * median(graph.nodes[p].flops for p in products)
    saves = _first_saves(graph)
    last = len(graph.nodes) - 1
    found = [-1]
    for end in [*cuts, last]:
        is_moved = False
        inside = [p for p in products if found[-1] < p < end and graph.nodes[p].flops >= limit]
        for product, following in pairwise([*inside, end]):
            start = found[-1] + 1
            # What is first saved behind the next product is for the cut behind that one to part off.
            if not any(made >= start and product < saved <= following for made, saved in saves):
                continue
            place = _place_behind(profile, product, end)
            if place is None or place - start + 1 < MIN_OPS:
                continue
            is_close = end - place < MIN_OPS
            if is_close and (end == last or profile.local_bytes[end] < profile.local_bytes[place]):
                continue
            if not (is_close or may_add):
                continue
            found.append(place)
            is_moved = is_close
        if not is_moved:
            found.append(end)
    return tuple(found[1:-1])


def delay_cheap_ops(graph: Graph) -> Graph:
    """Return `graph` with ops that run before a product moved behind it, to where their result is first read.

    Only those whose inputs are saved anyway, so that nothing lives longer for it, and whose move changes no bit. Values
    and storages keep their ids.
    """
    order = list(graph.nodes)
    made = made_at(graph)
    for node in reversed(graph.nodes):
        if not _may_be_delayed(graph, node, made):
            continue
        at = order.index(node)
        reader = next((p for p in range(at + 1, len(order)) if _touches(graph, order[p], node)), None)
        passed = order[at + 1 : reader]
        if reader is not None and any(_is_product(graph, p) for p in passed) and _may_pass(graph, node, passed):
            order.insert(reader - 1, order.pop(at))
    return replace(graph, nodes=tuple(replace(node, id=NodeId(index)) for index, node in enumerate(order)))


def _is_product(graph: Graph, node: Node) -> bool:
    """Return whether the op is one of many operations whose backward does not ask for what it made itself."""
    known = {graph.values[v].storage for v in node.reads}
    return node.flops > 0 and not any(_is_activation(graph, s) and s not in known for s in node.saved)


def _may_be_delayed(graph: Graph, node: Node, made: dict[StorageId, int]) -> bool:
    reads = [graph.values[v].storage for v in node.reads]
    makes = [graph.values[v].storage for v in node.makes]
    return (
        not (node.flops or node.is_random or node.is_collective or node.writes)
        and all(s is not None and _is_activation(graph, s) and s in node.saved for s in reads)
        and all(s is not None and made.get(s) == node.id for s in makes)
    )


def _may_pass(graph: Graph, node: Node, passed: Sequence[Node]) -> bool:
    """Return whether moving `node` behind `passed` changes nothing. See Note [Order of gradients]."""
    reads = {graph.values[v].storage for v in node.reads}
    return not any(
        other.writes
        or any(graph.values[v].storage is None for v in other.makes)  # the ends of a region
        or any(graph.values[v].storage in reads for v in other.reads)
        for other in passed
    )


def _touches(graph: Graph, other: Node, node: Node) -> bool:
    storages = {graph.values[v].storage for v in node.makes}
    return any(graph.values[v].storage in storages for v in other.reads)


def _first_saves(graph: Graph) -> list[tuple[int, int]]:
    """Return for each activation storage that is saved which node makes it, and which is the first to save it."""
    made = made_at(graph)
    saves: dict[StorageId, int] = {}
    for node in graph.nodes:
        for storage in node.saved:
            if _is_activation(graph, storage):
                saves.setdefault(storage, node.id)
    return [(made.get(storage, saved), saved) for storage, saved in saves.items()]


def _is_activation(graph: Graph, storage: StorageId) -> bool:
    return graph.storages[storage].kind is StorageKind.ACTIVATION


def _place_behind(profile: FrontierProfile, product: int, stop: int) -> int | None:
    """Return the allowed position behind `product` with the fewest elements among those of one frontier, if any."""
    places = [product]
    while places[-1] + 1 < stop and not profile.is_new[places[-1] + 1]:
        places.append(places[-1] + 1)
    return min((p for p in places if profile.is_allowed(p)), key=lambda p: (profile.num_elements[p], -p), default=None)
