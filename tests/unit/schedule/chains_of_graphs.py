"""What a chain of a graph's blocks could cost: a small cost model without a framework, for tests of the whole core.

An op takes a second and a tenth for every byte it touches, its backward twice as long. It runs beside its inputs and
outputs alone; the saved set of a block is what its nodes save, and a second option saves nothing of its own.
"""

from tinybp_lightning.graph import Block, BlockSpan, Boundary, Chain, Graph, Node, SavedSet, StorageId, StorageKind

__all__ = ["chain_of_graph"]


def chain_of_graph(graph: Graph, spans: tuple[BlockSpan, ...]) -> Chain:
    """Return the chain of `spans`; a storage that is no activation is somebody else's and has no bytes."""
    sizes = tuple(s.size_bytes if s.kind is StorageKind.ACTIVATION else 0 for s in graph.storages)
    crossing = [spans[0].inputs, *(span.outputs for span in spans)]
    boundaries = tuple(
        Boundary(found, sum(sizes[s] for s in found)) for found in (_storages(graph, v) for v in crossing)
    )
    held = frozenset(s for boundary in boundaries for s in boundary.storages)
    blocks = tuple(
        _block(graph, span, sizes, held, boundaries[i].storages, boundaries[i + 1].storages)
        for i, span in enumerate(spans)
    )
    return Chain(sizes, blocks, boundaries, tail_peak_bytes=sum(sizes[s] for s in boundaries[-1].storages))


def _storages(graph: Graph, values: tuple[int, ...]) -> tuple[StorageId, ...]:
    found = (graph.values[v].storage for v in values)
    return tuple(sorted({s for s in found if s is not None}))


def _block(
    graph: Graph,
    span: BlockSpan,
    sizes: tuple[int, ...],
    held: frozenset[StorageId],
    before: tuple[StorageId, ...],
    after: tuple[StorageId, ...],
) -> Block:
    nodes = graph.nodes[span.start : span.stop]
    touched = [sum(sizes[s] for s in _touched(graph, node)) for node in nodes]
    forward_s = sum(1 + 0.1 * size for size in touched)
    saved = sorted({s for node in nodes for s in node.saved})
    aliases = tuple(s for s in saved if s in held and (s in before or s in after))
    own = [s for s in saved if s not in aliases]
    own_bytes, output_bytes = sum(sizes[s] for s in own), sum(sizes[s] for s in after if s not in before)
    last_save = max((k for k, node in enumerate(nodes) if node.saved), default=-1)
    replay_s = sum(1 + 0.1 * size for size in touched[: last_save + 1])
    widest = max(touched)

    def option(name: str, saved_bytes: int, slower_s: float) -> SavedSet:
        return SavedSet(
            name=name,
            storages=aliases,
            saved_bytes=saved_bytes,
            save_peak_bytes=own_bytes + output_bytes + widest,
            replay_s=min(replay_s, forward_s),
            replay_peak_bytes=saved_bytes + (widest if last_save >= 0 else 0),
            backward_s=2 * forward_s + slower_s,
            backward_peak_bytes=2 * widest + own_bytes - saved_bytes,
        )

    options = (option("all", own_bytes, 0.0), *([option("none", 0, forward_s)] if own_bytes else []))
    return Block(span.name, span.signature, forward_s, output_bytes + widest, 0, options)


def _touched(graph: Graph, node: Node) -> list[StorageId]:
    found = (graph.values[v].storage for v in (*node.reads, *node.makes))
    return sorted({s for s in found if s is not None})
