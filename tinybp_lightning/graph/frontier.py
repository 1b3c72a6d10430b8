"""What is alive between two consecutive ops, and may the graph be cut there?

*Position* `p` is the place after node `p`. The *frontier* at `p` is the set of activation storages that exist there
and are still needed: made at or before `p`, and read or written after it or returned by the graph. A replay that starts
after `p` needs these bytes. Storages are counted, not values, so a view costs nothing beside its base.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from tinybp_lightning.graph.ids import StorageId
from tinybp_lightning.graph.ir import Graph, StorageKind

__all__ = ["CutObstacle", "FrontierProfile", "Life", "frontier_profile", "made_at"]


class CutObstacle(Enum):
    """Why a graph must not be cut at a position."""

    LATER_WRITE = "a later op changes in place a value that exists at the cut, so a replay would start from the new one"
    NOT_A_TENSOR = "a value that is not a tensor crosses the cut, and a boundary holds tensors only"


@dataclass(frozen=True, slots=True)
class Life:
    """The positions that a value or storage crosses: `made <= position < last_use`. Graph inputs have `made = -1`.

    The `last_use` of a graph output is the number of nodes.
    """

    made: int
    last_use: int

    def crosses(self, position: int) -> bool:
        """Return whether the value exists at `position` and is needed after it."""
        return self.made <= position < self.last_use


@dataclass(frozen=True, slots=True)
class FrontierProfile:
    """The frontier at each position of one graph, in node order. All tuples but the lives have one entry for each node.

    `width_bytes`: the bytes of the frontier.
    `local_bytes`: the bytes of its short-lived storages. A long-lived one (a U-Net's skip, a rotary table) belongs to
    every boundary that it crosses and is counted once, so only the local bytes tell the costs of boundaries apart.
    `unsaved_bytes`: those of `local_bytes` that autograd saves nowhere. The others cost a boundary nothing beside the
    saved set of a block that is kept.
    `num_elements`: tensor elements of all values that cross, views included; it tells apart positions of one frontier.
    `is_new`: whether the frontier differs from the one before.
    `obstacles`: why a cut is not allowed, `None` where it is.
    `storage_lives`, `value_lives`: by id; only activation storages and values made by nodes cross any position.
    """

    width_bytes: tuple[int, ...]
    local_bytes: tuple[int, ...]
    unsaved_bytes: tuple[int, ...]
    num_elements: tuple[int, ...]
    is_new: tuple[bool, ...]
    obstacles: tuple[CutObstacle | None, ...]
    storage_lives: tuple[Life, ...]
    value_lives: tuple[Life, ...]

    def cost(self, position: int) -> tuple[int, int, int]:
        """Return the cost of a boundary after node `position`, for comparison: local bytes, then what breaks ties."""
        return self.local_bytes[position], self.unsaved_bytes[position], self.num_elements[position]

    def is_allowed(self, position: int) -> bool:
        """Return whether the graph may be cut after node `position`."""
        return self.obstacles[position] is None


# A storage that crosses more positions than this is long-lived: more than the ops between two residual sums of a
# transformer or a convolution net, fewer than those under a skip of a U-Net.
_LONG_LIFE = 32

# The life of what crosses no position: unread results, and tensors that the caller holds.
_NO_LIFE = Life(made=-1, last_use=-1)


def frontier_profile(graph: Graph) -> FrontierProfile:
    """Return what is alive after each node of `graph`, which `verify_graph` accepts, and where it may be cut."""
    value_lives = _value_lives(graph)
    made = made_at(graph)
    storage_lives = _storage_lives(graph, made, value_lives)
    num_nodes = len(graph.nodes)
    sizes = [storage.size_bytes for storage in graph.storages]
    is_local = [life.last_use - life.made <= _LONG_LIFE for life in storage_lives]
    local_sizes = [size if local else 0 for size, local in zip(sizes, is_local, strict=True)]
    saved = {storage for node in graph.nodes for storage in node.saved}
    unsaved_sizes = [0 if storage in saved else size for storage, size in enumerate(local_sizes)]
    elements = [0 if value.storage is None else math.prod(value.shape) for value in graph.values]
    changes = {p for life in storage_lives if life.made < life.last_use for p in (life.made, life.last_use)}
    return FrontierProfile(
        width_bytes=_sum_over(num_nodes, zip(storage_lives, sizes, strict=True)),
        local_bytes=_sum_over(num_nodes, zip(storage_lives, local_sizes, strict=True)),
        unsaved_bytes=_sum_over(num_nodes, zip(storage_lives, unsaved_sizes, strict=True)),
        num_elements=_sum_over(num_nodes, zip(value_lives, elements, strict=True)),
        is_new=tuple(p in changes for p in range(num_nodes)),
        obstacles=_obstacles(graph, made, value_lives),
        storage_lives=storage_lives,
        value_lives=value_lives,
    )


def made_at(graph: Graph) -> dict[StorageId, int]:
    """Return the node that makes each activation storage; private storages, which no value names, are left out."""
    made: dict[StorageId, int] = {}
    for position, node in enumerate(graph.nodes):
        for storage in graph.storages_of(node.makes):
            if graph.storages[storage].kind is StorageKind.ACTIVATION:
                made.setdefault(storage, position)
    return made


def _value_lives(graph: Graph) -> tuple[Life, ...]:
    made = {v: position for position, node in enumerate(graph.nodes) for v in node.makes}
    last_read = {v: position for position, node in enumerate(graph.nodes) for v in node.reads}
    last_use = {**last_read, **dict.fromkeys(graph.outputs, len(graph.nodes))}
    return tuple(
        Life(made[v.id], last_use[v.id]) if v.id in made and made[v.id] < last_use.get(v.id, -1) else _NO_LIFE
        for v in graph.values
    )


def _storage_lives(graph: Graph, made: Mapping[StorageId, int], value_lives: Sequence[Life]) -> tuple[Life, ...]:
    # A write needs the buffer as a read does, even if no value names it afterwards.
    last_use = {storage: position for position, node in enumerate(graph.nodes) for storage in node.writes}
    for value, life in zip(graph.values, value_lives, strict=True):
        if value.storage is not None:
            last_use[value.storage] = max(last_use.get(value.storage, -1), life.last_use)
    return tuple(
        Life(made[s.id], last_use[s.id]) if s.id in made and made[s.id] < last_use[s.id] else _NO_LIFE
        for s in graph.storages
    )


def _obstacles(
    graph: Graph, made: Mapping[StorageId, int], value_lives: Sequence[Life]
) -> tuple[CutObstacle | None, ...]:
    num_nodes = len(graph.nodes)
    # The runtime guards buffers, which change once in a step; parameters change only between steps.
    guarded = [storage.kind in (StorageKind.ACTIVATION, StorageKind.INPUT) for storage in graph.storages]
    writes = [(storage, position) for position, node in enumerate(graph.nodes) for storage in node.writes]
    changed = [Life(made.get(storage, -1), position) for storage, position in writes if guarded[storage]]
    # The runtime does not guard a value that a node made *of* a buffer (`out=buffer`, a view) and that is part of a
    # boundary: if the buffer changed again, the boundary would hold the new numbers.
    written = {storage for storage, _ in writes if not guarded[storage]}
    of_values = list(zip(graph.values, value_lives, strict=True))
    changed += [life for value, life in of_values if value.storage in written]
    others = [life for value, life in of_values if value.storage is None]
    num_changed, num_others = (_sum_over(num_nodes, ((life, 1) for life in lives)) for lives in (changed, others))
    return tuple(
        CutObstacle.LATER_WRITE if c else CutObstacle.NOT_A_TENSOR if o else None
        for c, o in zip(num_changed, num_others, strict=True)
    )


def _sum_over(num_nodes: int, weighted_lives: Iterable[tuple[Life, int]]) -> tuple[int, ...]:
    """Return for each position the sum of the weights of the lives that cross it."""
    steps = [0] * (num_nodes + 1)
    for life, weight in weighted_lives:
        if life.made < life.last_use:
            steps[max(life.made, 0)] += weight
            steps[max(life.last_use, 0)] -= weight
    return tuple(accumulate(steps))[:num_nodes]
