"""Which modules of the traced program repeat, and where does one of them end and the next begin?

Models stack layers in a `ModuleList` or `Sequential`, so the dotted path of a repeated module has an integer segment:
`model.layers.3.mlp` lies in item `3` of container `model.layers`. A container *repeats* when two of its items use the
same set of ops; a `Sequential` of unlike stages does not, and the search goes on inside its items.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tinybp_lightning.graph.ir import Graph

__all__ = ["LayerTransition", "common_module", "layer_transitions"]


@dataclass(frozen=True, slots=True)
class LayerTransition:
    """Positions `first` to `stop` (exclusive) at which a repeated module has ended and the next has not begun.

    `container` is the path of the container that is left, or entered where none is left.
    """

    container: str
    first: int
    stop: int


def layer_transitions(graph: Graph, *, depth: int = 1) -> tuple[LayerTransition, ...]:
    """Return every change of repeated module in `graph`, entering the first and leaving the last too.

    Nodes outside every repeated module belong to the transition between two different ones, and to the module where
    they stand inside one.

    **Arguments:** `depth`: how many repeated containers to look into: 1 for layers, 2 for the layers of stages.
    """
    repeated = _repeated_containers(graph)
    transitions: list[LayerTransition] = []
    previous: tuple[_Item, ...] = ()
    previous_position = -1
    for position, node in enumerate(graph.nodes):
        items = tuple(item for item in _items(node.module) if item.container in repeated)[:depth]
        if not items:
            continue
        if items != previous and position > 0:
            # Before the first item stands the whole stem; only its very end is a transition.
            left, first = (previous, previous_position) if previous else (items, position - 1)
            transitions.append(LayerTransition(left[-1].container, first, position))
        previous, previous_position = items, position
    if previous and previous_position < len(graph.nodes) - 1:
        transitions.append(LayerTransition(previous[-1].container, previous_position, previous_position + 1))
    return tuple(transitions)


def common_module(graph: Graph, start: int, stop: int) -> str:
    """Return the deepest module path that all nodes `start` to `stop` with a path share; empty where none does."""
    common: list[str] | None = None
    for node in graph.nodes[start:stop]:
        if not node.module:
            continue
        path = node.module.split(".")
        if common is None:
            common = path
        length = next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), None)
        common = common[: min(len(common), len(path)) if length is None else length]
    return ".".join(common or [])


@dataclass(frozen=True, slots=True)
class _Item:
    """Item `index` of the container at path `container`."""

    container: str
    index: str


def _items(module: str) -> Iterator[_Item]:
    """Yield the container items on a module path, outermost first."""
    segments = module.split(".")
    for depth, segment in enumerate(segments):
        if segment.isdecimal():
            yield _Item(".".join(segments[:depth]), segment)


def _repeated_containers(graph: Graph) -> frozenset[str]:
    ops: dict[_Item, set[str]] = {}
    for node in graph.nodes:
        for item in _items(node.module):
            ops.setdefault(item, set()).add(node.op)
    alike = Counter((item.container, frozenset(used)) for item, used in ops.items())
    return frozenset(container for (container, _), count in alike.items() if count > 1)
