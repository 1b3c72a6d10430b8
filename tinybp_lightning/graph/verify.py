"""Does a `Graph` or a `Chain` satisfy the invariants that every later stage relies on?

This is the executable specification of `ir.py` and `chain.py`: what is refused here is not checked again. It does not
tell whether the numbers are true, only whether they are possible.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph.chain import Block, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind

__all__ = ["verify_chain", "verify_graph"]


def verify_graph(graph: Graph) -> None:
    """Check every invariant of `graph`.

    Ids are indices; sizes, shapes and flops are not negative; every value is a graph input or made by exactly one
    node, and exists before it is read, written through or returned; graph inputs live on storages that the caller owns.

    **Raises:** `GraphError` naming the first offending node, value or storage and its field.
    """
    for what, things in (("node", graph.nodes), ("value", graph.values), ("storage", graph.storages)):
        for index, thing in enumerate(things):
            if thing.id != index:
                raise GraphError(f"{what} `{thing.id}` stands at index `{index}` in `{what}s`: expected `id={index}`.")
    for storage in graph.storages:
        _check_numbers(f"storage `{storage.id}`", size_bytes=storage.size_bytes)
    for value in graph.values:
        owner = f"value `{value.id}` ({value.name})"
        if value.storage is not None:
            _check_indices(owner, "storage", (value.storage,), "storages", len(graph.storages))
        if any(extent < 0 for extent in value.shape):
            raise GraphError(f"{owner} has `shape={value.shape}`: expected extents of 0 or more.")
    existing_values = _check_inputs(graph)
    existing_storages = graph.storages_of(existing_values)
    for node in graph.nodes:
        _check_node(graph, node, existing_values, existing_storages)
    for value in graph.values:
        if value.id not in existing_values:
            raise GraphError(
                f"value `{value.id}` ({value.name}) has no maker: no node's `makes` nor the graph's `inputs` name it. "
                "Drop it, or record the op that makes it."
            )
    _check_indices("the graph", "outputs", graph.outputs, "values", len(graph.values))


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
    _check_numbers("the chain", **{f"storage_bytes[{s}]": size for s, size in enumerate(chain.storage_bytes)})
    for index, boundary in enumerate(chain.boundaries):
        owner = f"boundary `{index}`"
        _check_storages(owner, boundary.storages, len(chain.storage_bytes))
        _check_numbers(owner, gradient_bytes=boundary.gradient_bytes)
    _check_consecutive(chain)
    for index, block in enumerate(chain.blocks):
        _check_block(chain, index, block)
    _check_numbers("the chain", tail_live_bytes=chain.tail_live_bytes, unmodelled_bytes=chain.unmodelled_bytes)
    _check_at_least("the chain", "tail_peak_bytes", chain.tail_peak_bytes, "tail_live_bytes", chain.tail_live_bytes)


def _check_inputs(graph: Graph) -> set[ValueId]:
    values: set[ValueId] = set()
    _check_indices("the graph", "inputs", graph.inputs, "values", len(graph.values))
    for value_id in graph.inputs:
        if value_id in values:
            raise GraphError(f"the graph's `inputs` names value `{value_id}` twice: expected each input once.")
        values.add(value_id)
        storage = graph.values[value_id].storage
        if storage is not None and graph.storages[storage].kind is StorageKind.ACTIVATION:
            raise GraphError(
                f"the graph's `inputs` names value `{value_id}` on storage `{storage}` of kind `ACTIVATION`: "
                "an input's storage belongs to the caller. Mark it `INPUT`, `BUFFER` or `PARAMETER`."
            )
    return values


def _check_node(graph: Graph, node: Node, values: set[ValueId], storages: set[StorageId]) -> None:
    """Check `node` against the values and storages that exist before it, and add its own to them."""
    owner = f"node `{node.id}` ({node.name})"
    _check_numbers(owner, flops=node.flops)
    _check_indices(owner, "reads", node.reads, "values", len(graph.values))
    _check_indices(owner, "makes", node.makes, "values", len(graph.values))
    _check_indices(owner, "saved", node.saved, "storages", len(graph.storages))
    _check_indices(owner, "writes", node.writes, "storages", len(graph.storages))
    for value_id in node.reads:
        if value_id not in values:
            raise GraphError(
                f"{owner} `reads` value `{value_id}` before it is made: expected nodes in execution order."
            )
    for value_id in node.makes:
        if value_id in values:
            raise GraphError(
                f"{owner} `makes` value `{value_id}`, which exists already: expected one maker for each value. "
                "Give the result of an in-place op a value of its own on the same storage."
            )
        values.add(value_id)
    storages |= graph.storages_of(node.makes)
    read = {graph.values[value_id].storage for value_id in node.reads}
    for copy, source in node.copies:
        if copy not in node.saved or source not in read:
            raise GraphError(
                f"{owner} has `({copy}, {source})` in `copies`: expected one of its `saved` storages, and what it is a "
                "copy of among those it reads."
            )
    for storage in node.writes:
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
    _check_numbers(owner, forward_s=block.forward_s, parameter_gradient_bytes=block.parameter_gradient_bytes)
    before = chain.boundaries[index].storages
    output_bytes = sum(chain.storage_bytes[s] for s in chain.boundaries[index + 1].storages if s not in before)
    _check_at_least(owner, "forward_peak_bytes", block.forward_peak_bytes, "its new outputs' bytes", output_bytes)
    if not block.options:
        raise GraphError(f"{owner} has `options=()`: expected at least the one that saves everything.")
    for option_index, option in enumerate(block.options):
        _check_option(chain, block, option, f"{owner}, option `{option_index}` ({option.name})", output_bytes)


def _check_option(chain: Chain, block: Block, option: SavedSet, owner: str, output_bytes: int) -> None:
    _check_storages(owner, option.storages, len(chain.storage_bytes))
    _check_numbers(owner, saved_bytes=option.saved_bytes, backward_peak_bytes=option.backward_peak_bytes)
    _check_numbers(owner, replay_s=option.replay_s, backward_s=option.backward_s)
    kept_bytes = option.saved_bytes + output_bytes
    _check_at_least(owner, "save_peak_bytes", option.save_peak_bytes, "`saved_bytes` and its new outputs", kept_bytes)
    _check_at_least(owner, "replay_peak_bytes", option.replay_peak_bytes, "saved_bytes", option.saved_bytes)
    _check_at_least(owner, "save_peak_bytes", option.save_peak_bytes, "replay_peak_bytes", option.replay_peak_bytes)
    if option.replay_s > block.forward_s:
        raise GraphError(
            f"{owner} has `replay_s={option.replay_s}`: expected at most the block's `forward_s={block.forward_s}`, "
            "because a replay stops early or runs the same ops."
        )


def _check_indices(owner: str, field: str, indices: Sequence[int], of: str, length: int) -> None:
    for index in indices:
        if not 0 <= index < length:
            raise GraphError(f"{owner} names `{index}` in `{field}`: expected an index into the `{length}` {of}.")


def _check_numbers(owner: str, **numbers: float) -> None:
    for field, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise GraphError(f"{owner} has `{field}={number}`: expected a finite number of 0 or more.")


def _check_at_least(owner: str, field: str, found: int, floor_name: str, floor: int) -> None:
    if found < floor:
        raise GraphError(f"{owner} has `{field}={found}`: expected at least `{floor}`, which is {floor_name}.")


def _check_storages(owner: str, storages: Sequence[StorageId], length: int) -> None:
    _check_indices(owner, "storages", storages, "storages of `storage_bytes`", length)
    if any(left >= right for left, right in pairwise(storages)):
        raise GraphError(f"{owner} has `storages={tuple(storages)}`: expected ids in increasing order, each once.")
