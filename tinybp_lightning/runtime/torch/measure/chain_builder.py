"""Build the planner's chain from measured blocks.

What one block costs is measured once per structure (`costs.py`). Which storages a boundary holds, and which gradients
are alive at it, depends on the block's place in the program and is worked out here.
"""

import math
from collections.abc import Sequence

import torch

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, Program
from tinybp_lightning.errors import PlanFileError
from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import StorageKind
from tinybp_lightning.runtime.torch.measure.block_profiler import BlockProfile
from tinybp_lightning.runtime.torch.measure.timer import Timing

__all__ = ["chain_of", "check_chain_is_of", "parameter_gradient_bytes"]

_Options = Sequence[BlockProfile]  # of one block


def chain_of(
    program: Program, profiles: Sequence[_Options], wants: Sequence[Sequence[bool]], *, counts_gradients: bool
) -> Chain:
    """Return a measured program's chain, in seconds of the device or of the host: the slower one over the whole step.

    **Arguments:** `wants[i]`: which leaves of boundary `i` want gradients; `counts_gradients`: whether parameters'
    gradients are part of the budget.
    """
    frontiers, sizes, ids = _frontiers(program)
    gradients = [_gradient_bytes(program, i, profiles, wants[i]) for i in range(len(program.boundaries))]
    left_bytes, shared_bytes = parameter_gradient_bytes(program)
    if not counts_gradients:
        left_bytes = [0] * len(program.pieces)
        gradients = [own + shared for own, shared in zip(gradients, shared_bytes, strict=True)]
    boundaries = tuple(Boundary(f, g) for f, g in zip(frontiers, gradients, strict=True))
    timings = [t for first, *_ in profiles for t in (first.forward, first.backward)]
    is_device_slower = sum(t.device_s for t in timings) >= sum(t.host_s for t in timings)

    def seconds(timing: Timing) -> float:
        return timing.device_s if is_device_slower else timing.host_s

    blocks: list[Block] = []
    for i, (piece, options) in enumerate(zip(program.pieces, profiles, strict=True)):
        before, after = program.boundaries[i], program.boundaries[i + 1]
        made = [v for v, s in zip(after, piece.state, strict=True) if s.origin == MADE]
        made_bytes = sum(sizes[s] for s in set(frontiers[i + 1]) - set(frontiers[i]))
        forward_peak_bytes = max(made_bytes, *(p.forward_peak_bytes for p in options))
        saved_sets: list[SavedSet] = []
        for p in options:
            values = [before[piece.reads[k].index] for k in p.saved_reads] + [made[k] for k in p.saved_made]
            storages = {ids[s] for v in values if (s := program.graph.values[v].storage) is not None}
            saved_set = SavedSet(
                name=f"{p.saved_bytes} bytes",
                storages=tuple(sorted(storages)),
                saved_bytes=p.saved_bytes,
                save_peak_bytes=max(p.save_peak_bytes, forward_peak_bytes, p.saved_bytes + made_bytes),
                replay_s=min(seconds(p.replay), seconds(p.forward)),
                replay_peak_bytes=p.replay_peak_bytes,
                backward_s=seconds(p.backward),
                backward_peak_bytes=p.backward_peak_bytes,
                is_estimated=p.is_estimated,
            )
            saved_sets.append(saved_set)
        name, signature, forward_s = piece.span.name, piece.span.signature, max(seconds(p.forward) for p in options)
        blocks.append(Block(name, signature, forward_s, forward_peak_bytes, left_bytes[i], tuple(saved_sets)))
    return Chain(tuple(sizes), tuple(blocks), boundaries, unmodelled_bytes=_bookkeeping_bytes(program))


def check_chain_is_of(program: Program, chain: Chain) -> None:
    """Raise `PlanFileError` for the first difference in what is known without measuring: blocks, boundaries, bytes."""
    frontiers, sizes, _ = _frontiers(program)
    blocks = [(b.name, b.signature, len(b.options)) for b in chain.blocks]
    found: list[tuple[str, object, object]] = [
        ("blocks", blocks, [(p.span.name, p.span.signature, len(p.calls)) for p in program.pieces]),
        ("boundaries", [b.storages for b in chain.boundaries], frontiers),
        ("storage_bytes", list(chain.storage_bytes), sizes),
    ]
    for field, theirs, ours in found:
        if theirs != ours:
            raise PlanFileError(
                f"this plan file cannot be used: the `{field}` of its chain are not those of the program to be "
                "trained. Delete it, or plan again."
            )


def _frontiers(program: Program) -> tuple[list[tuple[StorageId, ...]], list[int], dict[StorageId, StorageId]]:
    """Return the boundaries' storages, the bytes of each, and the chain's id for each of the graph's storages."""
    graph = program.graph
    ids: dict[StorageId, StorageId] = {}
    frontiers: list[tuple[StorageId, ...]] = []
    for values in program.boundaries:
        storages = [s for v in values if (s := graph.values[v].storage) is not None]
        frontiers.append(tuple(sorted({ids.setdefault(s, StorageId(len(ids))) for s in storages})))
    found = [graph.storages[s] for s in ids]
    return frontiers, [s.size_bytes if s.kind is StorageKind.ACTIVATION else 0 for s in found], ids


def _bookkeeping_bytes(program: Program) -> int:
    """Return what the engine itself keeps for replays: generator states, and inputs as they were."""
    buffers = [program.graph.inputs[i] for piece in program.pieces for i in piece.guarded]
    buffers += [program.graph.inputs[i] for i in program.unsaved]
    num_random = sum(piece.is_random for piece in program.pieces)
    return num_random * torch.get_rng_state().nbytes + sum(_dense_bytes(program, v) for v in buffers)


def _gradient_bytes(program: Program, boundary: int, profiles: Sequence[_Options], wants: Sequence[bool]) -> int:
    """Return the bytes of the gradients of one boundary's leaves, once every later block's backward has run.

    A gradient that one block made is held with the whole storage it lives on; one that several blocks contributed to
    was summed into a tensor of its own.
    """
    total_bytes = 0
    storages: dict[tuple[int, int], int] = {}
    for value, wanted in zip(program.boundaries[boundary], wants, strict=True):
        made = [
            (block, number, size_bytes)
            for block in range(boundary, len(program.pieces))
            for position, number, size_bytes in profiles[block][0].input_gradients
            if program.boundaries[block][program.pieces[block].reads[position].index] == value
        ]
        if value in program.differentiated:  # the caller's own gradient for an output
            made.append((len(program.pieces), value, _dense_bytes(program, value)))
        if wanted and len(made) == 1:
            (block, number, size_bytes), *_ = made
            storages[block, number] = size_bytes
        elif wanted and made:
            total_bytes += _dense_bytes(program, value)
    return total_bytes + sum(storages.values())


def parameter_gradient_bytes(program: Program) -> tuple[list[int], list[int]]:
    """Return the bytes of parameters' gradients that each block's backward leaves, and that each boundary holds.

    A parameter that several blocks read counts at its last use. At the boundaries between its uses autograd holds one
    gradient until it can add the other.
    """
    left_bytes, shared_bytes = [0] * len(program.pieces), [0] * len(program.boundaries)
    uses: dict[ValueId, list[int]] = {}
    for i, piece in enumerate(program.pieces):
        for s in piece.reads:
            if s.origin == EXTERNAL and program.graph.values[value := program.graph.inputs[s.index]].requires_grad:
                uses.setdefault(value, []).append(i)
    for value, blocks in uses.items():
        left_bytes[blocks[-1]] += _dense_bytes(program, value)
        for boundary in range(blocks[0] + 1, blocks[-1] + 1):
            shared_bytes[boundary] += _dense_bytes(program, value)
    return left_bytes, shared_bytes


def _dense_bytes(program: Program, value: ValueId) -> int:
    v = program.graph.values[value]
    return math.prod(v.shape) * getattr(torch, v.dtype).itemsize
