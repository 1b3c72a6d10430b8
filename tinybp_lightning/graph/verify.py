"""Does a `Graph` or a `Chain` satisfy the invariants that every later stage relies on?

This is the executable specification of `ir.py` and `chain.py`: capture calls it before it returns, and planners do not
check again what is refused here. It does not tell whether the numbers are true, only whether they are possible.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph.chain import Block, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind, Value

__all__ = ["verify_chain", "verify_graph"]


def verify_graph(graph: Graph) -> None:
    """Check every invariant of `graph`.

    Ids are indices; sizes, shapes and flops are not negative; every value is a graph input or made by exactly one
    node, and exists before it is read, written through or returned; graph inputs live on storages that the caller owns.

    **Raises:** `GraphError` naming the first offending node, value or storage and its field.
    """
    _check_ids("node", [node.id for node in graph.nodes])
    _check_ids("value", [value.id for value in graph.values])
    _check_ids("storage", [storage.id for storage in graph.storages])
    for storage in graph.storages:
        _check_count(f"storage `{storage.id}`", "size_bytes", storage.size_bytes)
    for value in graph.values:
        _check_value(graph, value)
    existing_values, existing_storages = _check_inputs(graph)
    for node in graph.nodes:
        _check_node(graph, node, existing_values, existing_storages)
    for value in graph.values:
        if value.id not in existing_values:
            raise GraphError(
                f"value `{value.id}` ({value.name}) has no maker: no node's `makes` nor the graph's `inputs` name it. "
                "Drop it, or record the op that makes it."
            )
    for value_id in graph.outputs:
        _check_index("the graph", "outputs", value_id, len(graph.values), "values")


def verify_chain(chain: Chain) -> None:
    """Check every invariant of `chain`.

    `n` blocks have `n + 1` boundaries; boundary storages are sorted, unique and in range, and a storage that counts
    belongs to consecutive boundaries; times and sizes are finite and not negative; each peak holds what its definition
    says it includes; a replay costs no more than the run it repeats.

    **Raises:** `GraphError` naming the first offending block, option or boundary and its field.
    """
    if not chain.blocks:
        raise GraphError("the chain's `blocks` is `()`: expected at least one block. Record the forward as one block.")
    if len(chain.boundaries) != len(chain.blocks) + 1:
        raise GraphError(
            f"the chain's `boundaries` has `{len(chain.boundaries)}` entries for `{len(chain.blocks)}` blocks: "
            "expected one before each block and one after the last."
        )
    for storage, size_bytes in enumerate(chain.storage_bytes):
        _check_count("the chain", f"storage_bytes[{storage}]", size_bytes)
    for index, boundary in enumerate(chain.boundaries):
        owner = f"boundary `{index}`"
        _check_storages(owner, boundary.storages, len(chain.storage_bytes))
        _check_count(owner, "gradient_bytes", boundary.gradient_bytes)
    _check_consecutive(chain)
    for index, block in enumerate(chain.blocks):
        _check_block(chain, index, block)
    _check_count("the chain", "tail_live_bytes", chain.tail_live_bytes)
    _check_at_least("the chain", "tail_peak_bytes", chain.tail_peak_bytes, "tail_live_bytes", chain.tail_live_bytes)
    _check_count("the chain", "workspace_bytes", chain.workspace_bytes)


def _check_value(graph: Graph, value: Value) -> None:
    owner = f"value `{value.id}` ({value.name})"
    if value.storage is not None:
        _check_index(owner, "storage", value.storage, len(graph.storages), "storages")
    if any(extent < 0 for extent in value.shape):
        raise GraphError(f"{owner} has `shape={value.shape}`: expected extents of 0 or more.")


def _check_inputs(graph: Graph) -> tuple[set[ValueId], set[StorageId]]:
    """Check the graph's inputs and return the values and storages that exist before the first node."""
    values: set[ValueId] = set()
    storages: set[StorageId] = set()
    for value_id in graph.inputs:
        _check_index("the graph", "inputs", value_id, len(graph.values), "values")
        if value_id in values:
            raise GraphError(f"the graph's `inputs` names value `{value_id}` twice: expected each input once.")
        values.add(value_id)
        storage = graph.values[value_id].storage
        if storage is None:
            continue
        if graph.storages[storage].kind is StorageKind.ACTIVATION:
            raise GraphError(
                f"the graph's `inputs` names value `{value_id}` on storage `{storage}` of kind `ACTIVATION`: "
                "an input's storage belongs to the caller. Mark it `INPUT`, `BUFFER` or `PARAMETER`."
            )
        storages.add(storage)
    return values, storages


def _check_node(graph: Graph, node: Node, values: set[ValueId], storages: set[StorageId]) -> None:
    """Check `node` against the values and storages that exist before it, and add its own to them."""
    owner = f"node `{node.id}` ({node.name})"
    _check_count(owner, "flops", node.flops)
    for value_id in node.reads:
        _check_index(owner, "reads", value_id, len(graph.values), "values")
        if value_id not in values:
            raise GraphError(
                f"{owner} `reads` value `{value_id}` before it is made: expected nodes in execution order."
            )
    for value_id in node.makes:
        _check_index(owner, "makes", value_id, len(graph.values), "values")
        if value_id in values:
            raise GraphError(
                f"{owner} `makes` value `{value_id}`, which exists already: expected one maker for each value. "
                "Give the result of an in-place op a value of its own on the same storage."
            )
        values.add(value_id)
        storage = graph.values[value_id].storage
        if storage is not None:
            storages.add(storage)
    for storage in node.saved:
        _check_index(owner, "saved", storage, len(graph.storages), "storages")
    read = {graph.values[value_id].storage for value_id in node.reads}
    for copy, source in node.copies:
        if copy not in node.saved or source not in read:
            raise GraphError(
                f"{owner} has `({copy}, {source})` in `copies`: expected one of its `saved` storages, and what it is a "
                "copy of among those it reads."
            )
    for storage in node.writes:
        _check_index(owner, "writes", storage, len(graph.storages), "storages")
        if storage not in storages:
            raise GraphError(f"{owner} `writes` storage `{storage}` before any value lives on it.")


def _check_consecutive(chain: Chain) -> None:
    """Refuse a storage that leaves a boundary and comes back: no frontier does that, and it would be counted twice."""
    last_seen: dict[StorageId, int] = {}
    for index, boundary in enumerate(chain.boundaries):
        for storage in boundary.storages:
            before = last_seen.get(storage, index)
            if chain.storage_bytes[storage] > 0 and before < index - 1:
                raise GraphError(
                    f"boundary `{index}` holds storage `{storage}` in `storages`, which boundary `{before}` held and "
                    f"boundary `{index - 1}` does not: a storage belongs to every boundary it crosses."
                )
            last_seen[storage] = index


def _check_block(chain: Chain, index: int, block: Block) -> None:
    owner = f"block `{index}` ({block.name})"
    _check_seconds(owner, "forward_s", block.forward_s)
    _check_count(owner, "parameter_gradient_bytes", block.parameter_gradient_bytes)
    before = chain.boundaries[index].storages
    output_bytes = sum(chain.storage_bytes[s] for s in chain.boundaries[index + 1].storages if s not in before)
    _check_at_least(owner, "forward_peak_bytes", block.forward_peak_bytes, "its new outputs' bytes", output_bytes)
    if not block.options:
        raise GraphError(f"{owner} has `options=()`: expected at least the one that saves everything.")
    for option_index, option in enumerate(block.options):
        _check_option(chain, block, option, f"{owner}, option `{option_index}` ({option.name})", output_bytes)


def _check_option(chain: Chain, block: Block, option: SavedSet, owner: str, output_bytes: int) -> None:
    _check_storages(owner, option.storages, len(chain.storage_bytes))
    _check_count(owner, "saved_bytes", option.saved_bytes)
    _check_count(owner, "backward_peak_bytes", option.backward_peak_bytes)
    _check_seconds(owner, "replay_s", option.replay_s)
    _check_seconds(owner, "backward_s", option.backward_s)
    kept_bytes = option.saved_bytes + output_bytes
    _check_at_least(
        owner, "save_peak_bytes", option.save_peak_bytes, "`saved_bytes` and its new outputs' bytes", kept_bytes
    )
    _check_at_least(owner, "replay_peak_bytes", option.replay_peak_bytes, "saved_bytes", option.saved_bytes)
    _check_at_least(owner, "save_peak_bytes", option.save_peak_bytes, "replay_peak_bytes", option.replay_peak_bytes)
    if option.replay_s > block.forward_s:
        raise GraphError(
            f"{owner} has `replay_s={option.replay_s}`: expected at most the block's `forward_s={block.forward_s}`, "
            "because a replay stops early or runs the same ops."
        )


def _check_ids(what: str, ids: Sequence[int]) -> None:
    for index, found in enumerate(ids):
        if found != index:
            raise GraphError(f"{what} `{found}` stands at index `{index}` in `{what}s`: expected `id={index}`.")


def _check_index(owner: str, field: str, index: int, length: int, of: str) -> None:
    if not 0 <= index < length:
        raise GraphError(f"{owner} names `{index}` in `{field}`: expected an index into the `{length}` {of}.")


def _check_count(owner: str, field: str, count: int) -> None:
    if count < 0:
        raise GraphError(f"{owner} has `{field}={count}`: expected 0 or more.")


def _check_seconds(owner: str, field: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise GraphError(f"{owner} has `{field}={seconds}`: expected finite seconds of 0 or more.")


def _check_at_least(owner: str, field: str, found: int, floor_name: str, floor: int) -> None:
    if found < floor:
        raise GraphError(f"{owner} has `{field}={found}`: expected at least `{floor}`, which is {floor_name}.")


def _check_storages(owner: str, storages: Sequence[StorageId], length: int) -> None:
    for storage in storages:
        _check_index(owner, "storages", storage, length, "storages of `storage_bytes`")
    if any(left >= right for left, right in pairwise(storages)):
        raise GraphError(f"{owner} has `storages={tuple(storages)}`: expected ids in increasing order, each once.")
