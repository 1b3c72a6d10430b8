"""Which chain of fewer blocks takes no schedule more time? What a bound of a long chain may look at instead.

# Note [Why a bound of the slim chain holds]
Every schedule of a chain becomes one of its slim chain that takes no more time and holds no more bytes at any moment of
`relaxed`. So a bound that holds for all schedules of the slim chain holds for those of the chain.

1. Storages that hardly weigh in weigh nothing: less is held.
2. Block `x` *follows* block `x-1` when boundary `x+1` has no storage that boundary `x` has not: a norm, whose input is
   still to be read. The slim chain has one block for both, which saves what `x-1` saves; that `x` must save anything is
   forgotten, but not the time of its backward. Whatever is held at boundary `x` is held at `x+1` instead: no more
   bytes, and each run from there is shorter by block `x`. To get there block `x` runs once more at most, in the run
   that made boundary `x`; either that run went on through `x` anyhow, or what was held served ends behind `x`, each by
   a run through `x` that is saved. (Were it held for the end of `x` alone, it goes with that end.)
   While the backward of `x-1` runs, the gradient of boundary `x` is alive; the slim chain counts the smaller of those
   of `x` and `x+1`, and the difference as bytes of the backward itself. A storage that only boundary `x` has may be
   held by the saved set of `x-1`, and counts as private to it.
"""

from dataclasses import replace

from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId

__all__ = ["coarse_spans", "coarsen"]

_SMALL = 64
"""What is smaller than such a part of the neediest block hardly weighs in."""


def coarsen(chain: Chain) -> Chain:
    """Return the slim chain of `chain`; a lower bound on the seconds of its schedules is one for `chain`."""
    light = _without_small(chain)
    spans = coarse_spans(chain)
    inner = {s for boundary in light.boundaries for s in boundary.storages}
    inner -= {s for place in [0, *(end for _, end in spans)] for s in light.boundaries[place].storages}
    return replace(
        light,
        blocks=tuple(_block(light, first, end, inner) for first, end in spans),
        boundaries=(light.boundaries[0], *(_boundary(light, *span) for span in spans)),
    )


def coarse_spans(chain: Chain) -> list[tuple[int, int]]:
    """Return which blocks of `chain`, `first` to `end` (exclusive), each block of its slim chain stands for."""
    light, least_bytes = _without_small(chain), _small_bytes(chain)
    starts = [b for b in range(len(light.blocks)) if not _follows(light, b, least_bytes)]
    return list(zip(starts, [*starts[1:], len(light.blocks)], strict=True))


def _follows(chain: Chain, b: int, least_bytes: int) -> bool:
    """Whether block `b` follows the one before it, and to keep it holds no more than the boundary before it does."""
    here, after = set(chain.boundaries[b].storages), set(chain.boundaries[b + 1].storages)
    if not b or not after or not after <= here:
        return False
    options = chain.blocks[b].options
    return any(
        o.saved_bytes < least_bytes and {s for s in o.storages if chain.storage_bytes[s]} <= here for o in options
    )


def _boundary(chain: Chain, first: int, end: int) -> Boundary:
    """The boundary after the blocks `first .. end - 1`, with the smallest gradient of those gone and its own."""
    gradient_bytes = min(boundary.gradient_bytes for boundary in chain.boundaries[first + 1 : end + 1])
    return Boundary(chain.boundaries[end].storages, gradient_bytes)


def _block(chain: Chain, first: int, end: int, inner: set[StorageId]) -> Block:
    head, followers = chain.blocks[first], chain.blocks[first + 1 : end]
    if not followers:
        return head
    more_bytes = chain.boundaries[first + 1].gradient_bytes - _boundary(chain, first, end).gradient_bytes
    more_s = sum(min(option.backward_s for option in block.options) for block in followers)
    return replace(
        head,
        forward_s=head.forward_s + sum(block.forward_s for block in followers),
        parameter_gradient_bytes=sum(block.parameter_gradient_bytes for block in chain.blocks[first:end]),
        options=tuple(_option(chain, option, inner, more_bytes, more_s) for option in head.options),
    )


def _option(chain: Chain, option: SavedSet, inner: set[StorageId], more_bytes: int, more_s: float) -> SavedSet:
    private = {s for s in option.storages if s in inner}
    return replace(
        option,
        storages=tuple(s for s in option.storages if s not in private),
        saved_bytes=option.saved_bytes + sum(chain.storage_bytes[s] for s in private),
        backward_s=option.backward_s + more_s,
        backward_peak_bytes=option.backward_peak_bytes + more_bytes,
    )


def _without_small(chain: Chain) -> Chain:
    """Return `chain` with the storages that hardly weigh in weighing nothing, which leaves its layers more alike."""
    least_bytes = _small_bytes(chain)
    sizes = tuple(size if size >= least_bytes else 0 for size in chain.storage_bytes)
    boundaries = tuple(
        Boundary(tuple(s for s in boundary.storages if sizes[s]), boundary.gradient_bytes)
        for boundary in chain.boundaries
    )
    return Chain(sizes, chain.blocks, boundaries, chain.tail_peak_bytes, chain.tail_live_bytes, chain.workspace_bytes)


def _small_bytes(chain: Chain) -> int:
    """Return the bytes below which something hardly weighs in."""
    return max(_need_bytes(chain, b, block) for b, block in enumerate(chain.blocks)) // _SMALL


def _need_bytes(chain: Chain, b: int, block: Block) -> int:
    standing_bytes = chain.boundaries[b + 1].gradient_bytes + block.parameter_gradient_bytes
    return standing_bytes + min(
        option.saved_bytes + sum(chain.storage_bytes[s] for s in option.storages) + option.backward_peak_bytes
        for option in block.options
    )
