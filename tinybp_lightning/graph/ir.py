"""What does one forward pass compute, in ops, values and the storages they live on?

A `Graph` is the framework-free record of a traced forward. Memory belongs to storages, not to values: two views of one
buffer are two `Value`s on one `Storage`, which is counted once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from tinybp_lightning.graph.ids import NodeId, StorageId, ValueId

__all__ = ["Graph", "Node", "Storage", "StorageKind", "Value"]


class StorageKind(Enum):
    """Who owns a storage, which decides whether a plan may drop it."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True)
class Storage:
    """One allocation. The planner keeps, drops or recomputes `ACTIVATION` storages only."""

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

    `reads` and `makes` are values in argument and result order. `writes` are the storages that it changes in place.
    `saved` are the storages that autograd holds for its backward (inputs, outputs, and private ones such as dropout
    masks). `copies` are pairs of a saved storage and the storage that the op copied, before it computed, in another
    dtype (autocast) or layout. `settings` describes those that a region of the forward puts in place around the op.
    `module` is the dotted path of the module that called the op (empty at the top).
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
    settings: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced forward: `nodes` in execution order; ids are indices into `nodes`, `values` and `storages`.

    `inputs` are the values that exist before the first node (parameters and buffers included); `outputs` are the values
    that the caller receives. `verify_graph` states the invariants.
    """

    name: str
    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    storages: tuple[Storage, ...]
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]

    def storages_of(self, values: Iterable[ValueId]) -> set[StorageId]:
        """Return the storages of those `values` that are tensors."""
        return {s for v in values if (s := self.values[v].storage) is not None}

    def activation_bytes(self, storages: Iterable[StorageId]) -> int:
        """Return the bytes of those `storages` that are activations, each counted once."""
        found = (self.storages[s] for s in set(storages))
        return sum(storage.size_bytes for storage in found if storage.kind is StorageKind.ACTIVATION)
