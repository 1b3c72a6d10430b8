"""Which ops can run later, so that a cut after a compute-heavy op helps?

In `act(gate(x)) * up(x)` the activation function runs before the second matrix product, and its result is saved after
it: a replay that starts after both products cannot make that result, and one that starts before them repeats the first
product. `delay_ops` moves such an op to where its result is needed, and no bit changes.

Note [Order of gradients]
    Autograd runs backward in descending order of creation and sums the gradients of one value in that order. An op that
    is created later runs earlier in backward. This changes the order of a sum only if the op was moved past another
    that reads what it reads; such ops stay. The gradients of *different* parameters may be ready in another order,
    which hooks can observe, so ops that read parameters move only if the caller knows that there are no hooks.

Only ops that draw no random numbers and change nothing in their backward are moved.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from tinybp_lightning.graph.cuts.products import is_activation, is_compute_heavy
from tinybp_lightning.graph.frontier import made_at
from tinybp_lightning.graph.ids import NodeId, StorageId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind

__all__ = ["delay_ops"]

_MOVABLE = frozenset(
    {"relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "gelu", "sigmoid", "tanh", "softplus"}
    | {"hardswish", "hardtanh", "hardsigmoid", "softmax", "log_softmax"}
    | {"mul", "div", "truediv", "pow", "square", "exp", "log", "sqrt", "rsqrt"}
    | {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
)
# The most ops that an op moves past: those after one residual sum. A longer move would leave the layer.
_WINDOW = 16


def delay_ops(graph: Graph, *, may_move_parameters: bool) -> Graph:
    """Return `graph` with ops moved past a compute-heavy op, to where their result is first read.

    An op moves only if its inputs, or copies of them, are saved anyway, so that nothing lives longer, and if the move
    changes no bit. Ids of values stay. `may_move_parameters`: no hook may observe the order of parameters' gradients.
    """
    order = list(graph.nodes)
    made = made_at(graph)
    for node in reversed(graph.nodes):
        if not _may_be_delayed(graph, node, made) or (_has_parameter(graph, node) and not may_move_parameters):
            continue
        at = order.index(node)
        mine = {graph.values[v].storage for v in node.makes}
        window = order[at + 1 : at + 1 + _WINDOW]
        passed = list(takewhile(lambda other, mine=mine: mine.isdisjoint(_reads(graph, other)), window))
        is_read = len(passed) < len(window)
        if is_read and any(is_compute_heavy(graph, p) for p in passed) and _may_pass(graph, node, passed):
            order.insert(at + len(passed), order.pop(at))
    return replace(graph, nodes=tuple(replace(node, id=NodeId(index)) for index, node in enumerate(order)))


def _may_be_delayed(graph: Graph, node: Node, made: dict[StorageId, int]) -> bool:
    makes = [graph.values[v].storage for v in node.makes]
    saved = {*node.saved, *(source for _, source in node.copies)}
    return (
        node.op in _MOVABLE
        and not (node.flops or node.is_random or node.is_collective)
        and all(s is not None and (s in saved or not is_activation(graph, s)) for s in _reads(graph, node))
        and all(graph.storages[s].kind is StorageKind.BUFFER for s in node.writes)
        and all(s is not None and made.get(s) == node.id for s in makes)
    )


def _may_pass(graph: Graph, node: Node, passed: Sequence[Node]) -> bool:
    """Return whether moving `node` past `passed` changes nothing. See Note [Order of gradients]."""
    touched = {*_reads(graph, node), *node.writes}
    return not any(
        any(graph.values[v].storage is None for v in other.makes)  # the ends of a region
        or not touched.isdisjoint((*other.writes, *_reads(graph, other)))
        for other in passed
    )


def _has_parameter(graph: Graph, node: Node) -> bool:
    return any(graph.storages[s].kind is StorageKind.PARAMETER for s in _reads(graph, node) if s is not None)


def _reads(graph: Graph, node: Node) -> list[StorageId | None]:
    return [graph.values[v].storage for v in node.reads]
