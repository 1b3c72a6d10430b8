"""Can this graph be height-compressed: is it long and skinny, and what are the obstacles?

Height compression trades the *sum* of all activations for frontiers. It pays where the widest frontier is a small share
of what plain training keeps and there are many narrow cuts. Obstacles are the widest point and its op, and storages
that cross many layers, which every boundary in between has to hold. Terms are defined in `docs/theory.md`.
"""

from bisect import bisect_left
from dataclasses import dataclass

from tinybp_lightning.graph.cuts.narrow import Granularity, choose_cuts
from tinybp_lightning.graph.frontier import FrontierProfile, frontier_profile
from tinybp_lightning.graph.ids import NodeId, StorageId
from tinybp_lightning.graph.ir import Graph, Node

__all__ = ["SKINNY_RATIO", "Diagnosis", "LongSkip", "WidestOp", "WidestPoint", "diagnose", "widest_op"]

# A graph is skinny if its widest frontier is at most this share of all activation bytes. A chain of four equal steps is
# the shortest that a plan can halve: one boundary and the working set of one step out of four.
SKINNY_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class _Place:
    node: NodeId
    name: str
    op: str
    module: str


@dataclass(frozen=True, slots=True)
class WidestOp(_Place):
    """The op with the largest working set: the activation storages it reads, makes and saves, each counted once."""

    working_set_bytes: int


@dataclass(frozen=True, slots=True)
class WidestPoint(_Place):
    """The position with the widest frontier, after the node that is named."""

    width_bytes: int


@dataclass(frozen=True, slots=True)
class LongSkip:
    """A storage that crosses more than one layer cut: each boundary from its maker to its last reader holds it."""

    storage: StorageId
    size_bytes: int
    made_by: NodeId
    op: str
    module: str
    num_cuts: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """How well the shape of a graph suits height compression.

    `total_bytes`: all activation storages; `saved_bytes`: those that plain training keeps for backward.
    `widest`, `widest_op`: `None` for a graph without ops. `frontier_ratio`: widest frontier over `total_bytes`.
    `num_narrow_cuts`, `num_layer_cuts`: cuts of the fine and of the coarse granularity; `widest_cut_bytes`: the widest
    frontier among the narrow cuts. `long_skips`: most bytes first.
    """

    total_bytes: int
    saved_bytes: int
    widest: WidestPoint | None
    widest_op: WidestOp | None
    frontier_ratio: float
    num_narrow_cuts: int
    num_layer_cuts: int
    widest_cut_bytes: int
    long_skips: tuple[LongSkip, ...]

    @property
    def is_skinny(self) -> bool:
        """Whether height compression pays: the graph is narrow for its total bytes and has a place to cut."""
        return self.num_narrow_cuts > 0 and self.frontier_ratio <= SKINNY_RATIO


def diagnose(graph: Graph) -> Diagnosis:
    """Return how well the shape of `graph`, which `verify_graph` accepts, suits height compression."""
    profile = frontier_profile(graph)
    total_bytes = graph.activation_bytes(storage.id for storage in graph.storages)
    node = max(graph.nodes, key=lambda node: profile.width_bytes[node.id], default=None)
    widest_bytes = 0 if node is None else profile.width_bytes[node.id]
    narrow_cuts = choose_cuts(graph, granularity=Granularity.FINE)
    layer_cuts = choose_cuts(graph, granularity=Granularity.COARSE)
    return Diagnosis(
        total_bytes=total_bytes,
        saved_bytes=graph.activation_bytes(storage for node in graph.nodes for storage in node.saved),
        widest=None if node is None else WidestPoint(node.id, node.name, node.op, node.module, widest_bytes),
        widest_op=widest_op(graph),
        frontier_ratio=widest_bytes / total_bytes if total_bytes else 0.0,
        num_narrow_cuts=len(narrow_cuts),
        num_layer_cuts=len(layer_cuts),
        widest_cut_bytes=max((profile.width_bytes[cut] for cut in narrow_cuts), default=0),
        long_skips=_long_skips(graph, profile, layer_cuts),
    )


def widest_op(graph: Graph) -> WidestOp | None:
    """Return the op of `graph` with the largest working set, the first of several; `None` for a graph without ops.

    Its working set is a lower bound on the peak of any plan: all of it is alive while the op runs.
    """
    if not graph.nodes:
        return None
    widest = max(graph.nodes, key=lambda node: _working_set_bytes(graph, node))
    return WidestOp(widest.id, widest.name, widest.op, widest.module, _working_set_bytes(graph, widest))


def _long_skips(graph: Graph, profile: FrontierProfile, layer_cuts: tuple[NodeId, ...]) -> tuple[LongSkip, ...]:
    skips: list[LongSkip] = []
    for storage, life in zip(graph.storages, profile.storage_lives, strict=True):
        num_cuts = bisect_left(layer_cuts, life.last_use) - bisect_left(layer_cuts, life.made)
        if num_cuts > 1 and storage.size_bytes > 0:
            maker = graph.nodes[life.made]
            skips.append(LongSkip(storage.id, storage.size_bytes, maker.id, maker.op, maker.module, num_cuts))
    return tuple(sorted(skips, key=lambda skip: (-skip.size_bytes, skip.storage)))


def _working_set_bytes(graph: Graph, node: Node) -> int:
    return graph.activation_bytes(graph.storages_of((*node.reads, *node.makes)).union(node.saved))
