"""Which buffers does a block change, though nothing it makes depends on them?

In training a batch norm normalises by the statistics of its batch; the running ones, and the count of batches, it
brings up to date and does not look at. A replay may be given any memory in their place: nothing need be kept for it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx
from torch.nn import functional

from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node

__all__ = ["write_only_buffers"]

_STATISTICS = ("running_mean", "running_var")
# The order in which `torch.nn.functional.batch_norm` takes its arguments.
_BATCH_NORM = ("input", *_STATISTICS, "weight", "bias", "training")


def write_only_buffers(
    graph: Graph, nodes: Sequence[Node], node_of: Mapping[ValueId, fx.Node], candidates: Collection[ValueId]
) -> frozenset[ValueId]:
    """Return those of `candidates`, inputs of the graph, that `nodes` change without depending on what they hold.

    **Arguments:** `node_of`: the FX node of each value.
    """
    if not candidates:
        return frozenset()
    kept: set[StorageId | None] = set()
    read_ever = {v for node in graph.nodes for v in node.reads} | {*graph.outputs}
    for node in nodes:
        call = node_of[node.makes[0]]
        unseen = _statistics(call) if call.target is functional.batch_norm else []
        if node.op == "add_" and read_ever.isdisjoint(node.makes) and len(node.reads) == 1:
            unseen = list(call.all_input_nodes)
        kept |= {graph.values[v].storage for v in node.reads if node_of[v] not in unseen}
    return frozenset(v for v in candidates if graph.values[v].storage not in kept)


def _statistics(call: fx.Node) -> list[Any]:
    """Return the running statistics among the arguments of a batch norm, if it is in training."""
    given = {**dict(zip(_BATCH_NORM, call.args, strict=False)), **call.kwargs}
    if given.get("training") is not True:
        return []
    # One that is an argument in another place too is looked at.
    return [s for s in (given.get(name) for name in _STATISTICS) if [*given.values()].count(s) == 1]
