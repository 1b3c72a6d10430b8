"""Which ops can as well run later, so that a cut behind a product helps?

In `act(gate(x)) * up(x)` the activation function runs before the second product, and what it makes is saved behind it:
a replay from a cut behind both products could not make it, and one from before repeats the first of them. So does a
norm at the end of one branch of a residual block, before the convolution on the other. Such an op can as well run when
its result is asked for. `delay_ops` puts it there, and no bit changes.

Note [Order of gradients]
    Autograd runs backward in descending order of creation, and sums the gradients of one value in that order. An op
    that is created later than it was runs earlier in backward. That changes the order of a sum only where an op that it
    was moved past reads what it reads; such ops stay. The gradients of *different* parameters may come in another
    order. Nobody can tell but a hook, so ops that read a parameter with a hook stay as well.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile

from tinybp_lightning.graph.balance import made_at
from tinybp_lightning.graph.ids import NodeId, StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind
from tinybp_lightning.graph.products import is_product

__all__ = ["delay_ops"]

# Ops that another is moved past: what one residual sum puts together. Farther, it would leave its layer.
_WINDOW = 16


def delay_ops(graph: Graph, *, hooked: Collection[ValueId] = ()) -> Graph:
    """Return `graph` with ops that run before a product moved behind it, to where their result is first read.

    Only those whose inputs are saved anyway, so that nothing lives longer for it, and whose move changes no bit. Values
    and storages keep their ids.

    **Arguments:** `hooked`: inputs whose gradients a hook waits for.
    """
    order = list(graph.nodes)
    made = made_at(graph)
    watched = {graph.values[v].storage for v in hooked}
    for node in reversed(graph.nodes):
        if not _may_be_delayed(graph, node, made) or not watched.isdisjoint(_reads(graph, node)):
            continue
        at = order.index(node)
        mine = {graph.values[v].storage for v in node.makes}
        window = order[at + 1 : at + 1 + _WINDOW]
        passed = list(takewhile(lambda other, mine=mine: mine.isdisjoint(_reads(graph, other)), window))
        is_read = len(passed) < len(window)
        if is_read and any(is_product(graph, p) for p in passed) and _may_pass(graph, node, passed):
            order.insert(at + len(passed), order.pop(at))
    return replace(graph, nodes=tuple(replace(node, id=NodeId(index)) for index, node in enumerate(order)))


def _may_be_delayed(graph: Graph, node: Node, made: dict[StorageId, int]) -> bool:
    makes = [graph.values[v].storage for v in node.makes]
    return (
        not (node.flops or node.is_random or node.is_collective)
        and all(s is not None and (s in node.saved or not _is_activation(graph, s)) for s in _reads(graph, node))
        and all(graph.storages[s].kind is StorageKind.BUFFER for s in node.writes)
        and all(s is not None and made.get(s) == node.id for s in makes)
    )


def _may_pass(graph: Graph, node: Node, passed: Sequence[Node]) -> bool:
    """Return whether moving `node` behind `passed` changes nothing. See Note [Order of gradients]."""
    touched = {*_reads(graph, node), *node.writes}
    return not any(
        any(graph.values[v].storage is None for v in other.makes)  # the ends of a region
        or not touched.isdisjoint((*other.writes, *_reads(graph, other)))
        for other in passed
    )


def _reads(graph: Graph, node: Node) -> list[StorageId | None]:
    return [graph.values[v].storage for v in node.reads]


def _is_activation(graph: Graph, storage: StorageId) -> bool:
    return graph.storages[storage].kind is StorageKind.ACTIVATION
