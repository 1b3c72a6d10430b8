"""What does one forward pass compute, in ops, values and the storages behind them?

A `Graph` is the framework-free record of a traced forward. Memory belongs to storages, not to values: two views of
one buffer are two `Value`s on one `Storage`, and it is counted once. It says nothing about what to keep (`schedule`)
and holds no tensors.
"""

from dataclasses import dataclass
from enum import Enum

from tinybp_lightning.graph.ids import NodeId, StorageId, ValueId

__all__ = ["Graph", "Node", "Storage", "StorageKind", "Value"]


class StorageKind(Enum):
    """Who owns a storage, and so whether a plan may drop it."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True)
class Storage:
    """One allocation. Only `ACTIVATION` storages are the planner's to keep, drop or recompute."""

    id: StorageId
    size_bytes: int
    kind: StorageKind


@dataclass(frozen=True, slots=True)
class Value:
    """One result of an op or one graph input. `storage` is `None` for values that are not tensors (sizes, flags)."""

    id: ValueId
    name: str
    storage: StorageId | None
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Node:
    """One op of the forward.

    `reads` and `makes` are values in argument and result order; `writes` the storages it changes in place;
    `saved` the storages autograd holds for its backward (inputs, outputs, and private ones such as dropout masks);
    `copies` those of them that it makes of what it reads before it computes, in another dtype (autocast) or layout: the
    copy, and what it is a copy of; `module` the dotted path of the module that called it (empty at the top).
    """

    id: NodeId
    name: str
    op: str
    module: str
    reads: tuple[ValueId, ...]
    makes: tuple[ValueId, ...]
    writes: tuple[StorageId, ...]
    saved: tuple[StorageId, ...]
    flops: int
    is_random: bool
    is_collective: bool
    copies: tuple[tuple[StorageId, StorageId], ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced forward: `nodes` in execution order; ids are indices into `nodes`, `values` and `storages`.

    `inputs` are the values that exist before the first node (parameters and buffers included); `outputs` the values
    the caller receives. `verify_graph` states the invariants.
    """

    name: str
    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    storages: tuple[Storage, ...]
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
