"""Relax a chain for the bounds: what every schedule holds at least, and a chain of fewer blocks that is never slower.

A bound may assume the following (proofs P5 to P7). From boundary `i` at hand, to serve the ends `low .. end-1`, a
schedule keeps block `i` (if `low = i`); or runs it and goes on from `i+1` (if `low > i`); or *forks*: it holds boundary
`i` for `low .. q-1` and lets what follows serve `q .. end-1` first. What it holds has a weight that depends on itself
and on the ends that it serves. `coarsen` gives long chains fewer blocks (proof P10).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId

__all__ = ["RelaxedChain", "RelaxedOption", "coarse_spans", "coarsen", "relax", "standing_bytes"]

_Floats = NDArray[np.float64]
_SMALL = 64
"""What is smaller than such a part of the neediest block hardly weighs in."""


@dataclass(frozen=True, slots=True)
class RelaxedOption:
    """A saved set as the bounds see it: its weight while held, the bytes at its backward's moment, and seconds."""

    weight_bytes: float
    backward_bytes: float
    backward_s: float
    replay_s: float


@dataclass(frozen=True, slots=True, eq=False)
class RelaxedChain:
    """A chain whose held things have weights: see proofs P5 to P7.

    `first_bytes[i, j] + passed_bytes[i, j] - passed_bytes[i, q]` is the weight of boundary `i` held for the ends
    `q .. j-1`, the loss being end `n`: of the storages it is the first to contain, and of those that it passes on.
    `loss_bytes` is alive at the loss whatever is held. `options[b]` are those of block `b` that fit at all.
    """

    chain: Chain
    num_blocks: int
    left_bytes: int
    first_bytes: _Floats
    passed_bytes: _Floats
    loss_bytes: float
    forward_s: _Floats
    options: tuple[tuple[RelaxedOption, ...], ...]


def relax(chain: Chain, *, budget_bytes: int) -> RelaxedChain:
    """Return the relaxation of `chain` within `budget_bytes`."""
    num_blocks = len(chain.blocks)
    left_bytes = budget_bytes - chain.unmodelled_bytes
    end_of, first_in = _ends(chain)
    first = np.zeros((num_blocks + 1, num_blocks + 1))
    passed = np.zeros_like(first)
    for i, boundary in enumerate(chain.boundaries):
        for storage in boundary.storages:
            matrix = first if first_in[storage] == i else passed
            matrix[i, end_of[storage]] += chain.storage_bytes[storage]
    zero = np.zeros((num_blocks + 1, 1))
    return RelaxedChain(
        chain=chain,
        num_blocks=num_blocks,
        left_bytes=left_bytes,
        first_bytes=np.hstack([zero, np.cumsum(first, axis=1)]),
        passed_bytes=np.hstack([zero, np.cumsum(passed, axis=1)]),
        loss_bytes=float(first[-1, -1] + passed[-1, -1]) + chain.tail_peak_bytes,
        forward_s=np.array([block.forward_s for block in chain.blocks]),
        options=_options(chain, end_of, left_bytes),
    )


def _options(chain: Chain, end_of: list[int], left_bytes: int) -> tuple[tuple[RelaxedOption, ...], ...]:
    """The options of every block whose saved set and backward fit by themselves."""
    found = list[tuple[RelaxedOption, ...]]()
    for b, others_bytes in enumerate(standing_bytes(chain)):
        options: list[RelaxedOption] = []
        for option in chain.blocks[b].options:
            counted_bytes = sum(chain.storage_bytes[s] for s in option.storages if end_of[s] == b)
            weight_bytes = option.saved_bytes + counted_bytes
            held_bytes = option.saved_bytes + sum(chain.storage_bytes[s] for s in option.storages)
            if held_bytes + others_bytes + option.backward_peak_bytes <= left_bytes:
                backward_bytes = weight_bytes + others_bytes + option.backward_peak_bytes
                options.append(RelaxedOption(weight_bytes, backward_bytes, option.backward_s, option.replay_s))
        found.append(tuple(options))
    return tuple(found)


def standing_bytes(chain: Chain) -> list[int]:
    """Return what is alive at each block's backward whatever is held, its own peak left out."""
    gradients_bytes, standing = 0, list[int]()
    for block, boundary in zip(reversed(chain.blocks), reversed(chain.boundaries), strict=False):
        gradients_bytes += block.parameter_gradient_bytes
        standing.append(chain.tail_live_bytes + boundary.gradient_bytes + gradients_bytes)
    return standing[::-1]


def _ends(chain: Chain) -> tuple[list[int], list[int]]:
    """Return, for every storage, the end that counts it and the first boundary that contains it.

    Any end from that boundary on is valid. A good one is where plans hold the storage: the last block that reads it and
    whose saved set holds it, else the last boundary that contains it.
    """
    end_of, first_in = [0] * len(chain.storage_bytes), [-1] * len(chain.storage_bytes)
    for i, boundary in enumerate(chain.boundaries):
        for storage in boundary.storages:
            first_in[storage] = i if first_in[storage] < 0 else first_in[storage]
            end_of[storage] = i
    for b, block in enumerate(chain.blocks):
        for storage in set(block.options[0].storages) & set(chain.boundaries[b].storages):
            end_of[storage] = b
    return end_of, first_in


def coarsen(chain: Chain) -> Chain:
    """Return the coarse chain of `chain`; a lower bound on the seconds of its schedules is one for `chain`."""
    light = _without_small(chain)
    spans = coarse_spans(chain)
    inner = {s for boundary in light.boundaries for s in boundary.storages}
    inner -= {s for place in [0, *(end for _, end in spans)] for s in light.boundaries[place].storages}
    return replace(
        light,
        blocks=tuple(_coarse_block(light, first, end, inner) for first, end in spans),
        boundaries=(light.boundaries[0], *(_coarse_boundary(light, *span) for span in spans)),
    )


def coarse_spans(chain: Chain) -> list[tuple[int, int]]:
    """Return which blocks of `chain`, `first` to `end` (exclusive), each block of its coarse chain stands for."""
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


def _coarse_boundary(chain: Chain, first: int, end: int) -> Boundary:
    """The boundary after the blocks `first .. end - 1`, with the smallest gradient of those gone and its own."""
    gradient_bytes = min(boundary.gradient_bytes for boundary in chain.boundaries[first + 1 : end + 1])
    return Boundary(chain.boundaries[end].storages, gradient_bytes)


def _coarse_block(chain: Chain, first: int, end: int, inner: set[StorageId]) -> Block:
    head, followers = chain.blocks[first], chain.blocks[first + 1 : end]
    if not followers:
        return head
    more_bytes = chain.boundaries[first + 1].gradient_bytes - _coarse_boundary(chain, first, end).gradient_bytes
    more_s = sum(min(option.backward_s for option in block.options) for block in followers)
    return replace(
        head,
        forward_s=head.forward_s + sum(block.forward_s for block in followers),
        parameter_gradient_bytes=sum(block.parameter_gradient_bytes for block in chain.blocks[first:end]),
        options=tuple(_coarse_option(chain, option, inner, more_bytes, more_s) for option in head.options),
    )


def _coarse_option(chain: Chain, option: SavedSet, inner: set[StorageId], more_bytes: int, more_s: float) -> SavedSet:
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
    return Chain(sizes, chain.blocks, boundaries, chain.tail_peak_bytes, chain.tail_live_bytes, chain.unmodelled_bytes)


def _small_bytes(chain: Chain) -> int:
    """Return the bytes below which something hardly weighs in."""
    needs = (
        chain.boundaries[b + 1].gradient_bytes
        + block.parameter_gradient_bytes
        + min(
            o.saved_bytes + sum(chain.storage_bytes[s] for s in o.storages) + o.backward_peak_bytes
            for o in block.options
        )
        for b, block in enumerate(chain.blocks)
    )
    return max(needs) // _SMALL
