"""Which ops does a replay of a block not need the results of?

A replay makes what autograd saved, and nothing else. An op that saves only what it reads, or a copy of it (autocast's),
has saved before it computes, and nothing is gained by computing unless something saved is made of the result. Such an
op is *spare*: a product at the end of a block, the first of two products that meet in a sum behind the block. What
reads a spare op's result is spare as well.
"""

from tinybp_lightning.graph.ids import NodeId, StorageId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind

__all__ = ["is_activation", "saves_what_it_makes", "skippable_ops", "worthwhile_skippable_ops"]


def skippable_ops(graph: Graph, start: int, stop: int) -> frozenset[NodeId]:
    """Return the ops of a block whose results its replay does not need.

    Where ops may see each other in other ways than by values (an activation is changed in place, a region is entered),
    these are only the ops from the last one that saves on.

    **Arguments:** `start`, `stop`: the block's nodes are `graph.nodes[start:stop]`.
    """
    nodes = graph.nodes[start:stop]
    if not all(_is_plain(graph, node) for node in nodes):
        last = max((node.id for node in nodes if _saves_activation(graph, node)), default=start - 1)
        return frozenset(n.id for n in nodes if n.id > last or (n.id == last and not saves_what_it_makes(graph, n)))
    needed: set[StorageId | None] = set()
    found: set[NodeId] = set()
    for node in reversed(nodes):
        is_spare = not (
            node.is_random
            or node.is_collective
            or node.writes
            or saves_what_it_makes(graph, node)
            or any(graph.values[v].storage in needed for v in node.makes)
        )
        if is_spare:
            found.add(node.id)
        if not is_spare or _saves_activation(graph, node):
            needed |= {graph.values[v].storage for v in node.reads}
    return frozenset(found)


def worthwhile_skippable_ops(graph: Graph, start: int, stop: int) -> dict[NodeId, bool]:
    """Return the products that a replay of a block would run for nothing, and the ops that read their results.

    A spare op behind the last that saves is left out anyway, and one that is no product takes next to no time.

    **Returns:** by node, whether it saves no activation.
    """
    nodes = graph.nodes[start:stop]
    spare = skippable_ops(graph, start, stop)
    last = max((node.id for node in nodes if _saves_activation(graph, node)), default=start)
    found: dict[NodeId, bool] = {}
    without: set[StorageId | None] = set()
    for node in nodes:
        is_compute_heavy = node.flops > 0 and node.id < last
        if node.id in spare and (is_compute_heavy or any(graph.values[v].storage in without for v in node.reads)):
            found[node.id] = not _saves_activation(graph, node)
            without |= {graph.values[v].storage for v in node.makes}
    return found


def is_activation(graph: Graph, storage: StorageId) -> bool:
    """Return whether a storage is an activation."""
    return graph.storages[storage].kind is StorageKind.ACTIVATION


def _saves_activation(graph: Graph, node: Node) -> bool:
    """Return whether autograd saves an activation for the op's backward."""
    return any(is_activation(graph, s) for s in node.saved)


def saves_what_it_makes(graph: Graph, node: Node) -> bool:
    """Return whether a result, or a storage of the op's own (statistics, a mask), is saved.

    Copies of what it reads do not count.
    """
    known = {graph.values[v].storage for v in node.reads} | {copy for copy, _ in node.copies}
    return any(s not in known and is_activation(graph, s) for s in node.saved)


def _is_plain(graph: Graph, node: Node) -> bool:
    return all(graph.values[v].storage is not None for v in node.makes) and not any(
        is_activation(graph, s) for s in node.writes
    )
