"""How does a plan leave a block alone? By pinning it: it runs once, whatever the schedule says.

A pinned block saves as in plain training, and the boundary after it stays stored as long as the step's graph lives. So
no replay needs to pass it: one that the schedule leads through it starts behind it instead. The planner sees a block
that has nothing to save and a boundary that is free to store, and the bytes of both as held throughout; its schedules
need not know.
"""

from collections.abc import Collection
from dataclasses import replace

from tinybp_lightning.graph.chain import Block, Boundary, Chain
from tinybp_lightning.graph.ids import BoundaryId, StorageId
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, ReplayStep
from tinybp_lightning.schedule.actions import Drop, Forward, ForwardSave, Store

__all__ = ["blocks_of_modules", "pin_chain", "pin_program"]


def blocks_of_modules(graph: Graph, spans: Collection[tuple[int, int]], paths: Collection[str]) -> frozenset[int]:
    """Return the blocks that have an op of a module at one of `paths`.

    **Arguments:** `spans`: each block's first node, and the one behind its last.
    """
    return frozenset(
        block
        for block, (start, stop) in enumerate(spans)
        if any(_is_below(node.module, path) for node in graph.nodes[start:stop] for path in paths)
    )


def _is_below(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def pin_chain(chain: Chain, blocks: Collection[int]) -> Chain:
    """Return `chain` as its planner may see it: what pinned `blocks` hold is nobody's choice, and held throughout.

    That is a little more than the truth: they hold it from their forward to their backward only.
    """
    pinned = sorted(blocks)
    if not pinned:
        return chain
    storages = {s for b in pinned for s in chain.blocks[b].options[0].storages}
    storages |= {s for b in pinned if b + 1 < len(chain.blocks) for s in chain.boundaries[b + 1].storages}
    saved_bytes = sum(chain.blocks[b].options[0].saved_bytes for b in pinned)
    held_bytes = saved_bytes + sum(chain.storage_bytes[s] for s in storages)
    held = StorageId(len(chain.storage_bytes))
    sizes = (*(0 if s in storages else size for s, size in enumerate(chain.storage_bytes)), held_bytes)
    return replace(
        chain,
        storage_bytes=sizes,
        blocks=tuple(_with_nothing_to_save(b) if i in pinned else b for i, b in enumerate(chain.blocks)),
        boundaries=tuple(Boundary((*b.storages, held), b.gradient_bytes) for b in chain.boundaries),
    )


def _with_nothing_to_save(block: Block) -> Block:
    option = block.options[0]
    nothing = replace(
        option,
        storages=(),
        saved_bytes=0,
        save_peak_bytes=option.save_peak_bytes - option.saved_bytes,
        replay_peak_bytes=option.replay_peak_bytes - option.saved_bytes,
    )
    return replace(block, signature=f"{block.signature} pinned", options=(nothing,))


def pin_program(script: ReplayProgram, blocks: Collection[int]) -> ReplayProgram:
    """Return `script` with `blocks` pinned: saved by the first sweep, never run by a segment, stored behind."""
    if not blocks:
        return script
    pinned = frozenset(blocks)
    behind = frozenset(BoundaryId(b + 1) for b in pinned if b + 1 < len(script.kept))
    return ReplayProgram(
        kept=tuple(kept or i in pinned for i, kept in enumerate(script.kept)),
        options=script.options,
        stored=script.stored | behind,
        steps=tuple(_around(segment, pinned, behind) for segment in script.steps),
        pinned=behind,
    )


def _around(
    segment: tuple[ReplayStep, ...], pinned: frozenset[int], behind: frozenset[BoundaryId]
) -> tuple[ReplayStep, ...]:
    """Leave out the pinned blocks' runs, the forwards that only led to them, and what touches the boundary behind."""
    moves: list[ReplayStep] = []
    needed: BoundaryId | None = None  # the boundary that the next move takes from the cursor, if none is stored
    for move in reversed(segment):
        match move.action:
            case Store(boundary=boundary) | Drop(boundary=boundary) if boundary in behind:
                continue
            case Store(boundary=boundary):
                needed = boundary
                moves.append(move)
            case Forward(block=block) if block not in pinned and needed == block + 1:
                needed = _unless_stored(block, behind)
                moves.append(move)
            case ForwardSave(block=block) if block not in pinned:
                moves.append(ReplayStep(move.action, stops_early=needed != block + 1))
                needed = _unless_stored(block, behind)
            case Forward() | ForwardSave():
                continue
            case _:
                moves.append(move)
    return tuple(reversed(moves))


def _unless_stored(boundary: int, behind: frozenset[BoundaryId]) -> BoundaryId | None:
    return None if boundary in behind else BoundaryId(boundary)
