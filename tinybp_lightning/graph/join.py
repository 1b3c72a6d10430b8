"""Join the chains of several calls that one backward follows into the chain of the whole step.

Autograd runs the nodes that were made last first, so the blocks of the last call go backward first, as in any chain.
What a call returns is alive until the loss has been computed, and its gradients from there to the call's own backward:
both belong to every boundary of the later calls. Between two calls stands an empty block: what stands before it is the
first call's result, and what stands after it the second call's input, and there need be nothing of one in the other.
"""

from collections.abc import Sequence
from dataclasses import replace

from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId

__all__ = ["join_chains", "spans"]

_NOTHING = SavedSet("nothing", (), 0, 0, 0.0, 0, 0.0, 0)
_GAP = Block("between two calls", "between two calls", 0.0, 0, 0, (_NOTHING,))


def spans(chains: Sequence[Chain]) -> tuple[range, ...]:
    """Return the numbers in the joined chain of each chain's blocks."""
    found: list[range] = []
    for chain in chains:
        start = found[-1].stop + 1 if found else 0
        found.append(range(start, start + len(chain.blocks)))
    return tuple(found)


def join_chains(chains: Sequence[Chain]) -> Chain:
    """Return the chain of the step that makes these calls in this order; a single chain is returned as it is.

    Its tail is the last chain's: the code between two calls is not known.
    """
    joined, *others = chains
    for number, chain in enumerate(others, start=2):
        joined = _joined(joined, chain, number)
    return joined


def _joined(before: Chain, chain: Chain, number: int) -> Chain:
    offset, held = len(before.storage_bytes), before.boundaries[-1]

    def moved(storages: Sequence[StorageId]) -> tuple[StorageId, ...]:
        return tuple(StorageId(s + offset) for s in storages)

    def block_of(block: Block) -> Block:
        options = tuple(replace(option, storages=moved(option.storages)) for option in block.options)
        return replace(block, name=f"{block.name} (call {number})", options=options)

    boundaries = (
        Boundary((*held.storages, *moved(b.storages)), held.gradient_bytes + b.gradient_bytes) for b in chain.boundaries
    )
    return replace(
        chain,
        storage_bytes=(*before.storage_bytes, *chain.storage_bytes),
        blocks=(*before.blocks, _GAP, *map(block_of, chain.blocks)),
        boundaries=(*before.boundaries, *boundaries),
        unmodelled_bytes=before.unmodelled_bytes + chain.unmodelled_bytes,
    )
