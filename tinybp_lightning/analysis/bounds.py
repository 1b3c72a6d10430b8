"""Below which peak can no schedule of a chain go, and which block sets it?

Every legal schedule runs each block forward once in the first sweep, runs it once more (or the same time) in a way that
saves for its backward, runs the caller's code after the last block, and runs each block's backward, last block first.
At each of these moments some bytes are alive whatever else the schedule keeps: see Note [What must be alive]. The
greatest of them is a lower bound, in the memory model of `schedule.simulate`, on the peak of *any* schedule.

It is not always reached: a replay's own path to a far block, and gradients alive during a replay, are left out because
a schedule may avoid them.
"""

# Note [What must be alive]
#
# * FORWARD, block b: the boundary before b (it is the cursor) and the new bytes of the cheapest way to run b.
# * SAVE, block b under option o: the boundary before b, from which it runs, and at least the new bytes of the early-
#   stopped replay, which is the cheapest way to save under o.
# * LOSS: the last boundary (it is the cursor) and what the code after it has alive.
# * BACKWARD, block b under option o: the saved set of o with the boundary storages that it aliases, the gradient of the
#   boundary after b, the parameter gradients of b and of all later blocks (backward runs in order), what the code after
#   the last block still holds, and the new bytes of the backward itself.
#
# A schedule picks one option for the saving run and the backward of b, so they count together: the least over o of the
# greater of the two. Nothing is added up over blocks, so no assumption on what else is stored enters.

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from tinybp_lightning.graph.chain import Chain, SavedSet
from tinybp_lightning.graph.ids import BlockId, NodeId, StorageId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind

__all__ = ["Bottleneck", "Phase", "WidestOp", "peak_bottleneck", "peak_lower_bound", "widest_op"]


class Phase(Enum):
    """What the step does at its bottleneck."""

    FORWARD = "forward"
    SAVE = "saving forward"
    LOSS = "loss"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The moment that sets the lower bound. `block` is `None` for the loss, which belongs to no block."""

    peak_bytes: int
    phase: Phase
    block: BlockId | None


@dataclass(frozen=True, slots=True)
class WidestOp:
    """The op with the largest working set: the activation storages it reads, makes and saves, each counted once."""

    node: NodeId
    name: str
    op: str
    module: str
    working_set_bytes: int


def peak_lower_bound(chain: Chain) -> int:
    """Return bytes below which no schedule of `chain` has its peak; Note [What must be alive] says why.

    **Arguments:** `chain`: one that `verify_chain` accepts.
    """
    return peak_bottleneck(chain).peak_bytes


def peak_bottleneck(chain: Chain) -> Bottleneck:
    """Return the moment that sets `peak_lower_bound(chain)`; the first one where several do."""
    later_gradients = _parameter_gradients_from(chain)
    moments = [
        Bottleneck(_storage_bytes(chain, chain.boundaries[-1].storages) + chain.tail_peak_bytes, Phase.LOSS, None)
    ]
    for index, block in enumerate(chain.blocks):
        before_bytes = _storage_bytes(chain, chain.boundaries[index].storages)
        run_bytes = min(block.forward_peak_bytes, *(option.save_peak_bytes for option in block.options))
        moments.append(Bottleneck(before_bytes + run_bytes, Phase.FORWARD, BlockId(index)))
        around_bytes = chain.boundaries[index + 1].gradient_bytes + later_gradients[index] + chain.tail_live_bytes
        ways = [_saving_and_backward(chain, index, option, before_bytes, around_bytes) for option in block.options]
        moments.append(min(ways, key=lambda way: way.peak_bytes))
    greatest = max(moments, key=lambda moment: moment.peak_bytes)
    return Bottleneck(greatest.peak_bytes + chain.workspace_bytes, greatest.phase, greatest.block)


def widest_op(graph: Graph) -> WidestOp | None:
    """Return the op of `graph` with the largest working set, the first of several; `None` for a graph without ops.

    Its working set bounds the peak of any plan, however finely it recomputes: the op runs at least once, and what it
    reads, makes and saves is alive while it does.
    """
    if not graph.nodes:
        return None
    widest = max(graph.nodes, key=lambda node: _working_set_bytes(graph, node))
    return WidestOp(widest.id, widest.name, widest.op, widest.module, _working_set_bytes(graph, widest))


def _saving_and_backward(
    chain: Chain, index: int, option: SavedSet, before_bytes: int, around_bytes: int
) -> Bottleneck:
    saving_bytes = before_bytes + option.replay_peak_bytes
    saved_bytes = option.saved_bytes + _storage_bytes(chain, option.storages)
    backward_bytes = around_bytes + saved_bytes + option.backward_peak_bytes
    if saving_bytes > backward_bytes:
        return Bottleneck(saving_bytes, Phase.SAVE, BlockId(index))
    return Bottleneck(backward_bytes, Phase.BACKWARD, BlockId(index))


def _parameter_gradients_from(chain: Chain) -> list[int]:
    """Return for each block the parameter gradients of it and of all blocks after it."""
    from_last = accumulate(block.parameter_gradient_bytes for block in reversed(chain.blocks))
    return list(from_last)[::-1]


def _storage_bytes(chain: Chain, storages: Iterable[StorageId]) -> int:
    return sum(chain.storage_bytes[storage] for storage in storages)


def _working_set_bytes(graph: Graph, node: Node) -> int:
    named = {graph.values[value_id].storage for value_id in (*node.reads, *node.makes)}
    held = [graph.storages[storage] for storage in named.union(node.saved) if storage is not None]
    return sum(storage.size_bytes for storage in held if storage.kind is StorageKind.ACTIVATION)
