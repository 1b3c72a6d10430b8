"""What does a graph look like? DOT text for Graphviz, blocks as clusters.

Parameters and buffers are left out: they exist at every cut and would hide the dataflow that decides the cuts.
"""

from collections.abc import Sequence

from tinybp_lightning.graph.cuts import BlockSpan, cut_blocks
from tinybp_lightning.graph.ids import ValueId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind, Value

__all__ = ["to_dot"]


def to_dot(graph: Graph, *, cuts: Sequence[int] = ()) -> str:
    """Return `graph` as a DOT digraph with one cluster for each block that `cuts` make.

    **Arguments:** `cuts`: positions after which to cut, as `choose_cuts` returns them.

    **Returns:** text that ends in a newline; every name in it is quoted and escaped.

    **Raises:** `GraphError` where `cut_blocks` refuses the cuts.
    """
    lines = [f"digraph {_quote(graph.name)} {{", '  rankdir="TB"; node [shape=box, fontname="monospace"];']
    shown = [value_id for value_id in graph.inputs if _is_shown_input(graph, value_id)]
    lines.extend(
        f"  i{value_id} [shape=ellipse, label={_quote(_describe(graph.values[value_id]))}];" for value_id in shown
    )
    for index, block in enumerate(cut_blocks(graph, cuts)):
        lines.extend(_cluster(graph, index, block))
    lines.extend(_edges(graph, shown))
    return "\n".join([*lines, "}", ""])


def _cluster(graph: Graph, index: int, block: BlockSpan) -> list[str]:
    lines = [f"  subgraph cluster_{index} {{", f"    label={_quote(block.name)};"]
    lines.extend(
        f"    n{node.id} [label={_quote(_label(graph, node))}];" for node in graph.nodes[block.start : block.stop]
    )
    return [*lines, "  }"]


def _edges(graph: Graph, shown_inputs: Sequence[ValueId]) -> list[str]:
    source = {value_id: f"i{value_id}" for value_id in shown_inputs}
    lines: list[str] = []
    for node in graph.nodes:
        reads = [value_id for value_id in dict.fromkeys(node.reads) if value_id in source]
        lines.extend(f"  {source[v]} -> n{node.id} [label={_quote(_describe(graph.values[v]))}];" for v in reads)
        source.update((value_id, f"n{node.id}") for value_id in node.makes)
    for index, value_id in enumerate(graph.outputs):
        if value_id in source:
            lines.append(f"  o{index} [shape=ellipse, label={_quote(f'output {index}')}];")
            lines.append(f"  {source[value_id]} -> o{index} [label={_quote(_describe(graph.values[value_id]))}];")
    return lines


def _is_shown_input(graph: Graph, value_id: ValueId) -> bool:
    storage = graph.values[value_id].storage
    return storage is None or graph.storages[storage].kind is StorageKind.INPUT


def _label(graph: Graph, node: Node) -> str:
    made = dict.fromkeys(graph.values[value_id].storage for value_id in node.makes)
    made_bytes = sum(graph.storages[storage].size_bytes for storage in made if storage is not None)
    return f"{node.name}\n{node.op}\n{made_bytes} B"


def _describe(value: Value) -> str:
    return f"{value.name} {value.dtype}{list(value.shape)}"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "")
    return f'"{escaped}"'
