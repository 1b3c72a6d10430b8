"""Do two stretches of a graph compute the same function on differently named data?

A signature hashes ops, shapes, dtypes, storage sizes and kinds, the alias, write and save patterns, gradient flags and
the dataflow relative to the block's start. It leaves out names, module paths, positions and *which* weights are read,
so that the layers of a stack share it. The record, and so the hash, has no constants that `Node.op` does not name (an
epsilon, a dropout rate): blocks of equal signature may share costs and plans; to share *code*, compare the code too.
"""

import hashlib
from collections.abc import Iterable, Sequence

from tinybp_lightning.graph.frontier import Life, frontier_profile
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node

__all__ = ["block_signature", "graph_signature", "layout_signature"]


def block_signature(graph: Graph, start: int, stop: int, *, value_lives: Sequence[Life] | None = None) -> str:
    """Return the structural hash of nodes `start` to `stop` (exclusive) of `graph`: 32 hexadecimal digits.

    **Arguments:** `value_lives`: those of `frontier_profile(graph)`, which is called if they are not given.
    """
    lives = frontier_profile(graph).value_lives if value_lives is None else value_lives
    canonical = _Canonical(graph)
    nodes = graph.nodes[start:stop]
    parts: list[object] = [canonical.node(node) for node in nodes]
    parts.append(canonical.values(v for node in nodes for v in node.makes if lives[v].crosses(stop - 1)))
    return _digest(parts)


def graph_signature(graph: Graph) -> str:
    """Return the structural hash of the whole `graph`, its inputs and outputs in order included."""
    return _Canonical(graph).whole()


def layout_signature(graph: Graph) -> str:
    """Return a hash of `graph` that leaves sizes out: it is equal for traces of one program on other extents."""
    return _Canonical(graph, has_sizes=False).whole()


class _Canonical:
    """Renames values and storages by first appearance, and describes each the first time it appears."""

    __slots__ = ("_graph", "_has_sizes", "_storages", "_values")

    def __init__(self, graph: Graph, *, has_sizes: bool = True) -> None:
        self._graph = graph
        self._has_sizes = has_sizes
        self._values: dict[ValueId, int] = {}
        self._storages: dict[StorageId, int] = {}

    def whole(self) -> str:
        inputs = self.values(self._graph.inputs)
        nodes = [self.node(node) for node in self._graph.nodes]
        return _digest([inputs, nodes, self.values(self._graph.outputs)])

    def node(self, node: Node) -> tuple[object, ...]:
        return (
            node.op,
            self.values(node.reads),
            self.values(node.makes),
            self._storages_of(node.writes),
            self._storages_of(node.saved),
            tuple(self._storages_of(pair) for pair in node.copies),
            node.flops if self._has_sizes else 0,
            node.is_random,
            node.is_collective,
            node.settings,
        )

    def values(self, value_ids: Iterable[ValueId]) -> tuple[object, ...]:
        return tuple(self._value(value_id) for value_id in value_ids)

    def _storages_of(self, storage_ids: Iterable[StorageId]) -> tuple[object, ...]:
        return tuple(self._storage(storage_id) for storage_id in storage_ids)

    def _value(self, value_id: ValueId) -> object:
        if value_id in self._values:
            return self._values[value_id]
        self._values[value_id] = len(self._values)
        value = self._graph.values[value_id]
        storage = None if value.storage is None else self._storage(value.storage)
        shape = value.shape if self._has_sizes else len(value.shape)
        return (storage, shape, value.dtype, value.requires_grad)

    def _storage(self, storage_id: StorageId) -> object:
        if storage_id in self._storages:
            return self._storages[storage_id]
        self._storages[storage_id] = len(self._storages)
        storage = self._graph.storages[storage_id]
        return (storage.size_bytes if self._has_sizes else 0, storage.kind.value)


def _digest(parts: list[object]) -> str:
    # The parts consist of tuples, strings, numbers and `None`, whose `repr` is the same in every process.
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
