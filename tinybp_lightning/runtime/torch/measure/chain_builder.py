"""How do measured blocks become the planner's chain? Storages are matched to boundaries, gradients to their owners.

What one block costs is measured once per structure (`costs.py`); what a boundary holds, and which gradients are alive
at it, depends on the block's place in the program and is worked out here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, Program
from tinybp_lightning.errors import PlanFileError
from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import StorageKind

__all__ = ["BlockCosts", "BlockSizes", "chain_of", "check_chain_is_of"]


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """The bytes of one option of a unique block.

    `saved_reads` and `saved_made` are positions in its reads and in what it makes.
    `input_gradients`: for each position in its reads that got a gradient, the storage the gradient lives on (a number
    of its own for each) and that storage's bytes. The gradients of a concatenation's parts are views of one storage.
    """

    forward_peak_bytes: int
    saved_bytes: int
    saved_reads: tuple[int, ...]
    saved_made: tuple[int, ...]
    save_peak_bytes: int
    replay_peak_bytes: int
    backward_peak_bytes: int
    input_gradients: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """One option of a unique block: bytes, and seconds of forward, early-stopped replay and backward.

    `is_estimated`: it is not compiled yet, so its peaks and seconds were not measured.
    """

    sizes: BlockSizes
    forward_s: float
    replay_s: float
    backward_s: float
    is_estimated: bool = False


def chain_of(
    program: Program, costs: Sequence[Sequence[BlockCosts]], wants: Sequence[Sequence[bool]], *, counts_gradients: bool
) -> Chain:
    """Return the chain of a program whose blocks were measured.

    **Arguments:** `costs`: for each piece one per option; `wants[i]`: which leaves of boundary `i` want gradients;
    `counts_gradients`: whether parameters' gradients are part of the budget.
    """
    frontiers, sizes, ids = _frontiers(program)

    def chain_ids(values: Sequence[ValueId]) -> tuple[StorageId, ...]:
        storages = (program.graph.values[v].storage for v in values)
        return tuple(sorted({ids[s] for s in storages if s is not None}))

    gradients = [_gradient_bytes(program, i, costs, wants) for i in range(len(program.boundaries))]
    parameters = [0] * len(program.pieces)
    if counts_gradients:
        parameters = _parameter_gradient_bytes(program)
    else:
        gradients = [own + shared for own, shared in zip(gradients, _shared_gradient_bytes(program), strict=True)]
    blocks: list[Block] = []
    for i, (piece, options) in enumerate(zip(program.pieces, costs, strict=True)):
        before, after = program.boundaries[i], program.boundaries[i + 1]
        made = [v for v, s in zip(after, piece.state, strict=True) if s.origin == MADE]
        made_bytes = sum(sizes[s] for s in set(frontiers[i + 1]) - set(frontiers[i]))
        forward_peak_bytes = max(made_bytes, *(c.sizes.forward_peak_bytes for c in options))
        saved = [
            chain_ids(
                [*(before[piece.reads[k].index] for k in c.sizes.saved_reads), *(made[k] for k in c.sizes.saved_made)]
            )
            for c in options
        ]
        blocks.append(
            Block(
                name=piece.span.name,
                signature=piece.span.signature,
                forward_s=max(c.forward_s for c in options),
                forward_peak_bytes=forward_peak_bytes,
                parameter_gradient_bytes=parameters[i],
                options=tuple(
                    _saved_set(c, storages, made_bytes, forward_peak_bytes)
                    for c, storages in zip(options, saved, strict=True)
                ),
            )
        )
    boundaries = tuple(Boundary(f, g) for f, g in zip(frontiers, gradients, strict=True))
    workspace_bytes = _bookkeeping_bytes(program)
    return Chain(tuple(sizes), tuple(blocks), boundaries, workspace_bytes=workspace_bytes)


def _saved_set(
    costs: BlockCosts, storages: tuple[StorageId, ...], made_bytes: int, forward_peak_bytes: int
) -> SavedSet:
    sizes = costs.sizes
    return SavedSet(
        name=f"{sizes.saved_bytes} bytes",
        storages=storages,
        saved_bytes=sizes.saved_bytes,
        save_peak_bytes=max(sizes.save_peak_bytes, forward_peak_bytes, sizes.saved_bytes + made_bytes),
        replay_s=costs.replay_s,
        replay_peak_bytes=sizes.replay_peak_bytes,
        backward_s=costs.backward_s,
        backward_peak_bytes=sizes.backward_peak_bytes,
        is_estimated=costs.is_estimated,
    )


def _frontiers(program: Program) -> tuple[list[tuple[StorageId, ...]], list[int], dict[StorageId, StorageId]]:
    """Return the boundaries' storages, the bytes of each, and the chain's id for each of the graph's storages."""
    graph = program.graph
    ids: dict[StorageId, StorageId] = {}
    sizes: list[int] = []
    frontiers: list[tuple[StorageId, ...]] = []
    for values in program.boundaries:
        frontier: set[StorageId] = set()
        for storage in (graph.values[v].storage for v in values):
            if storage is None:
                continue
            if storage not in ids:
                ids[storage] = StorageId(len(sizes))
                owned = graph.storages[storage].kind is StorageKind.ACTIVATION
                sizes.append(graph.storages[storage].size_bytes if owned else 0)
            frontier.add(ids[storage])
        frontiers.append(tuple(sorted(frontier)))
    return frontiers, sizes, ids


def check_chain_is_of(program: Program, chain: Chain) -> None:
    """Compare what can be known of a chain without measuring: its blocks, its boundaries, and their bytes.

    **Raises:** `PlanFileError` that names the first difference.
    """
    frontiers, sizes, _ = _frontiers(program)
    found: list[tuple[str, object, object]] = [
        (
            "blocks",
            [(b.name, b.signature, len(b.options)) for b in chain.blocks],
            [(p.span.name, p.span.signature, len(p.calls)) for p in program.pieces],
        ),
        ("boundaries", [b.storages for b in chain.boundaries], frontiers),
        ("storage_bytes", list(chain.storage_bytes), sizes),
    ]
    for field, theirs, ours in found:
        if theirs != ours:
            raise PlanFileError(
                f"this plan file cannot be used: the `{field}` of its chain are not those of the program to be "
                "trained. Delete it, or plan again."
            )


def _bookkeeping_bytes(program: Program) -> int:
    """What the engine itself keeps for replays: generator states, and buffers as they were before each block."""
    state_bytes = torch.get_rng_state().nbytes
    graph = program.graph
    buffers = [graph.values[graph.inputs[i]] for piece in program.pieces for i in piece.guarded]
    num_random = sum(piece.is_random for piece in program.pieces)
    return num_random * state_bytes + sum(_dense_bytes(v.shape, v.dtype) for v in buffers)


def _gradient_bytes(
    program: Program, boundary: int, costs: Sequence[Sequence[BlockCosts]], wants: Sequence[Sequence[bool]]
) -> int:
    """Bytes of the gradients of one boundary's leaves, once every later block's backward has run.

    A gradient that one block made is held as that block made it, with the whole storage it lives on; one that several
    blocks contributed to was summed into a tensor of its own. A result that nobody differentiates has none.
    """
    graph = program.graph
    total = 0
    storages: dict[tuple[int, int], int] = {}
    for value, wanted in zip(program.boundaries[boundary], wants[boundary], strict=True):
        if not wanted:
            continue
        made = _contributions(program, boundary, value, costs)
        if len(made) == 1:
            (block, number, size_bytes), *_ = made
            storages[block, number] = size_bytes
        elif made:
            total += _dense_bytes(graph.values[value].shape, graph.values[value].dtype)
    return total + sum(storages.values())


def _contributions(
    program: Program, boundary: int, value: ValueId, costs: Sequence[Sequence[BlockCosts]]
) -> list[tuple[int, int, int]]:
    """Return (block, storage number, bytes) of each gradient that blocks after `boundary` give `value`."""
    found: list[tuple[int, int, int]] = []
    for block in range(boundary, len(program.pieces)):
        before = program.boundaries[block]
        for position, number, size_bytes in costs[block][0].sizes.input_gradients:
            if before[program.pieces[block].reads[position].index] == value:
                found.append((block, number, size_bytes))
    if value in program.differentiated:
        value_bytes = _dense_bytes(program.graph.values[value].shape, program.graph.values[value].dtype)
        found.append((len(program.pieces), value, value_bytes))  # the caller's own gradient for an output
    return found


def _dense_bytes(shape: Sequence[int], dtype: str) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count * getattr(torch, dtype).itemsize


def _uses(program: Program) -> dict[int, list[int]]:
    """Blocks that read each external that wants a gradient, in order."""
    uses: dict[int, list[int]] = {}
    for i, piece in enumerate(program.pieces):
        for s in piece.reads:
            if s.origin == EXTERNAL and program.graph.values[program.graph.inputs[s.index]].requires_grad:
                uses.setdefault(s.index, []).append(i)
    return uses


def _shared_gradient_bytes(program: Program) -> list[int]:
    """Bytes, at each boundary, of gradients of parameters used twice: autograd holds one until the other is in."""
    sums = [0] * len(program.boundaries)
    for index, blocks in _uses(program).items():
        value = program.graph.values[program.graph.inputs[index]]
        for boundary in range(blocks[0] + 1, blocks[-1] + 1):
            sums[boundary] += _dense_bytes(value.shape, value.dtype)
    return sums


def _parameter_gradient_bytes(program: Program) -> list[int]:
    """Gradient bytes that each block's backward leaves behind; a parameter used twice counts at its last use."""
    sums = [0] * len(program.pieces)
    for index, blocks in _uses(program).items():
        value = program.graph.values[program.graph.inputs[index]]
        sums[blocks[-1]] += _dense_bytes(value.shape, value.dtype)
    return sums
