"""What would the blocks of a graph cost on some device? A roofline estimate, without running anything.

An op takes as long as its operations or the bytes that it reads and writes, whichever takes longer; its backward takes
twice as long. Scratch memory of kernels, the loss after the graph and parameter gradients are left out: measured chains
(`tbp.explain`) have them; an estimate describes a graph before training.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.cuts.narrow import BlockSpan, Granularity, choose_cuts, cut_blocks
from tinybp_lightning.graph.cuts.products import skippable_ops
from tinybp_lightning.graph.ids import StorageId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind
from tinybp_lightning.graph.verify import verify_chain

__all__ = ["OPERATIONS_PER_S", "BlockSeconds", "count_operations", "estimate_chain"]

_FLOPS_PER_S = 1e14
_BYTES_PER_S = 1e12
"""The default is 100 operations for each byte moved, about the ratio of accelerators in half precision. Times of plans
relative to plain training depend only on this ratio."""
_BACKWARD = 2.0
"""The backward of a matrix product is two matrix products."""
OPERATIONS_PER_S = 1e12
"""The operations that `count_operations` reports as 1 s."""
_BYTES_AN_OPERATION = 100
"""The moved bytes that it counts as one operation: enough to tell norms apart, negligible beside a matrix product."""


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """Seconds of a block's forward, early-stopped replay and backward."""

    forward_s: float
    replay_s: float
    backward_s: float


def count_operations(graph: Graph, spans: Iterable[tuple[int, int]]) -> tuple[BlockSeconds, ...]:
    """Return the floating-point operations of the blocks `graph.nodes[start:stop]`, at `OPERATIONS_PER_S`.

    Operations of matrix products, convolutions and attention are counted as torch's `FlopCounterMode` counts them, and
    each hundred bytes that any op moves as one more. The counts are the same on every machine.
    """
    estimate = _Estimate(graph, OPERATIONS_PER_S, _BYTES_AN_OPERATION * OPERATIONS_PER_S)
    return tuple(estimate.seconds(start, stop) for start, stop in spans)


def estimate_chain(
    graph: Graph,
    *,
    flops_per_s: float = _FLOPS_PER_S,
    bytes_per_s: float = _BYTES_PER_S,
    granularity: Granularity = Granularity.FINE,
) -> Chain:
    """Return the chain of `graph`, cut as it would be for training, with estimated costs and one option for each block.

    **Arguments:** `flops_per_s`, `bytes_per_s`: what the device does in a second.

    **Raises:** `ConfigError` for an argument of a wrong type or a rate that is not above 0; `GraphError` for a graph
    without nodes.
    """
    if not isinstance(graph, Graph):
        shown = f"`{type(graph).__name__}` is not a `Graph`"
        raise ConfigError(f"{shown}: call `tbp.capture_graph(module, *inputs)` to get one.")
    for name, rate in (("flops_per_s", flops_per_s), ("bytes_per_s", bytes_per_s)):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
            raise ConfigError(f"`{name}={rate!r}`: expected a rate above 0, as the device's data sheet states it.")
    if not isinstance(granularity, Granularity):
        raise ConfigError(f"`granularity={granularity!r}` is unknown: expected one of {list(Granularity)}.")
    estimate = _Estimate(graph, flops_per_s, bytes_per_s)
    spans = cut_blocks(graph, choose_cuts(graph, granularity=granularity))
    frontiers = [graph.storages_of(values) for values in (spans[0].inputs, *(span.outputs for span in spans))]
    # A chain names the storages of its boundaries alone.
    ids = {s: StorageId(k) for k, s in enumerate(dict.fromkeys(s for f in frontiers for s in sorted(f)))}
    chain = Chain(
        storage_bytes=tuple(estimate.sizes[s] for s in ids),
        blocks=tuple(estimate.block(span, *ends, ids) for span, ends in zip(spans, pairwise(frontiers), strict=True)),
        boundaries=tuple(
            Boundary(tuple(sorted(ids[s] for s in f)), sum(estimate.gradients[s] for s in f)) for f in frontiers
        ),
    )
    verify_chain(chain)
    return chain


class _Estimate:
    """Costs of parts of one graph. `sizes`, `gradients`: bytes of each activation and of its gradient, else 0."""

    def __init__(self, graph: Graph, flops_per_s: float, bytes_per_s: float) -> None:
        self._graph = graph
        self._flops_per_s, self._bytes_per_s = flops_per_s, bytes_per_s
        wanted = {v.storage for v in graph.values if v.requires_grad}
        self.sizes = [s.size_bytes if s.kind is StorageKind.ACTIVATION else 0 for s in graph.storages]
        self.gradients = [size if s.id in wanted else 0 for s, size in zip(graph.storages, self.sizes, strict=True)]

    def block(
        self, span: BlockSpan, before: Set[StorageId], after: Set[StorageId], ids: dict[StorageId, StorageId]
    ) -> Block:
        nodes = self._graph.nodes[span.start : span.stop]
        saved = {s for node in nodes for s in node.saved if self.sizes[s]}
        aliased = saved & (before | after)
        own_bytes = sum(self.sizes[s] for s in saved - aliased)
        plain_peak_bytes = self._peak_bytes(nodes, before, kept=after)
        replay_peak_bytes = self._peak_bytes(self._replayed(span.start, span.stop), before, kept=saved)
        seconds = self.seconds(span.start, span.stop)
        option = SavedSet(
            name=f"{own_bytes} bytes",
            storages=tuple(sorted(ids[s] for s in aliased)),
            saved_bytes=own_bytes,
            save_peak_bytes=self._peak_bytes(nodes, before, kept=after | saved),
            replay_s=seconds.replay_s,
            # A skippable op saves a copy of what it reads before it is skipped.
            replay_peak_bytes=max(own_bytes, replay_peak_bytes),
            backward_s=seconds.backward_s,
            backward_peak_bytes=self._backward_peak_bytes(nodes, saved - aliased, after),
        )
        return Block(span.name, span.signature, seconds.forward_s, plain_peak_bytes, 0, (option,))

    def seconds(self, start: int, stop: int) -> BlockSeconds:
        forward_s = sum(self._seconds(node) for node in self._graph.nodes[start:stop])
        replay_s = sum(self._seconds(node) for node in self._replayed(start, stop))
        return BlockSeconds(forward_s, replay_s, _BACKWARD * forward_s)

    def _replayed(self, start: int, stop: int) -> list[Node]:
        skippable = skippable_ops(self._graph, start, stop)
        return [node for node in self._graph.nodes[start:stop] if node.id not in skippable]

    def _peak_bytes(self, nodes: Sequence[Node], before: Set[StorageId], *, kept: Set[StorageId]) -> int:
        """Return the most new bytes alive at once: a storage that is not `kept` is freed after its last use."""
        uses = [self._touched(node) for node in nodes]
        last_use = {s: k for k, touched in enumerate(uses) for s in touched}
        alive: set[StorageId] = set()
        peak_bytes = 0
        for k, touched in enumerate(uses):
            alive |= touched - before
            peak_bytes = max(peak_bytes, sum(self.sizes[s] for s in alive))
            alive -= {s for s in touched if last_use[s] == k and s not in kept}
        return peak_bytes

    def _backward_peak_bytes(self, nodes: Sequence[Node], own: Set[StorageId], after: Set[StorageId]) -> int:
        """Return the most bytes above the saved set and output gradients, which are freed as backward passes them."""
        backwards = list(enumerate(nodes))[::-1]
        first_saved = {s: k for k, node in backwards for s in node.saved}
        made_at = {s: k for k, node in backwards for s in self._graph.storages_of(node.makes)}
        alive = set(after)
        new_bytes = peak_bytes = 0
        for k, node in backwards:
            fresh = self._graph.storages_of(node.reads) - alive
            alive |= fresh
            new_bytes += sum(self.gradients[s] for s in fresh)
            peak_bytes = max(peak_bytes, new_bytes)
            gone = {s for s in self._graph.storages_of(node.makes) & alive if made_at[s] == k}
            alive -= gone
            new_bytes -= sum(self.gradients[s] for s in gone)
            new_bytes -= sum(self.sizes[s] for s in node.saved if s in own and first_saved[s] == k)
        return peak_bytes

    def _touched(self, node: Node) -> set[StorageId]:
        return self._graph.storages_of((*node.reads, *node.makes)) | set(node.saved)

    def _seconds(self, node: Node) -> float:
        read, made = self._graph.storages_of(node.reads), self._graph.storages_of(node.makes)
        is_view = made <= read and not node.writes and not node.flops
        moved = () if is_view else self._touched(node)
        moved_bytes = sum(self._graph.storages[s].size_bytes for s in moved)
        return max(node.flops / self._flops_per_s, moved_bytes / self._bytes_per_s)
