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


def join_chains(chains: Sequence[Chain], gradient_bytes: Sequence[int]) -> Chain:
    """Return the chain of the step that makes these calls in this order; a single chain is returned as it is.

    Its tail is the last chain's: the code between two calls is not known.

    **Arguments:** `gradient_bytes`: of the weights that each block of the last chain reads. The calls share them: what
    the last call's backward makes waits in autograd until the first call's has come, and the others add to it.
    """
    joined, *others = chains
    if not others:
        return joined
    joined = replace(joined, blocks=_with_gradients(joined, [0] * len(joined.blocks)))
    for number, chain in enumerate(others, start=2):
        is_last = number == len(chains)
        given = gradient_bytes if is_last else [0] * len(chain.blocks)
        joined = _joined(joined, replace(chain, blocks=_with_gradients(chain, given)), number)
    return joined


def _with_gradients(chain: Chain, gradient_bytes: Sequence[int]) -> tuple[Block, ...]:
    return tuple(replace(b, parameter_gradient_bytes=g) for b, g in zip(chain.blocks, gradient_bytes, strict=True))


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
