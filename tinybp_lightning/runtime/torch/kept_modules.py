"""Find the modules that must not run twice (the user marked them, or they synchronise ranks), and pin their blocks.

The mark is an attribute of the module, so that copies have it too. Module steps do not intercept the calls of a marked
module. A traced forward *pins* every block that has one of its ops: the block runs once and saves as in plain training,
whatever the schedule says, and the boundary after it stays stored as long as the step's graph lives. Where a schedule
would lead through it, the replay starts after it instead. The planner sees a block that saves nothing and a boundary
that is free to store, and counts the bytes of both as live throughout.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import nn

from tinybp_lightning.errors import UnsupportedModuleError
from tinybp_lightning.graph.chain import Block, Boundary, Chain
from tinybp_lightning.graph.ids import StorageId
from tinybp_lightning.graph.ir import Graph

__all__ = ["blocks_of_modules", "is_kept", "keep", "pin_chain", "pinned_paths", "synchronises_ranks"]

M = TypeVar("M", bound=nn.Module)
_MARK = "_tbp_is_kept"


def keep(module: M) -> M:
    """Mark `module` so that it is never replayed: what it saves for backward stays, and its forward runs once a step.

    Use it for a module that does not do the same thing twice. Call it before the first training step of the model that
    contains the module; that model's budget must hold what the module saves.

    **Returns:** the same object. The mark is part of it: copies are kept too, and `tbp.restore` does not remove it.

    **Raises:** `UnsupportedModuleError` if `module` is not a module, or is a container that is never called.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModuleError(
            f"`{type(module).__name__}` is not a torch.nn.Module: pass the part that is to be kept."
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise UnsupportedModuleError(
            f"`{type(module).__name__}` is never called, so there is nothing to keep: mark the modules in it."
        )
    setattr(module, _MARK, True)
    return module


def is_kept(module: nn.Module) -> bool:
    """Return whether `module` itself was marked."""
    return getattr(module, _MARK, False) is True


def synchronises_ranks(module: nn.Module) -> bool:
    """Return whether `module` has a `SyncBatchNorm` that talks to other ranks: they would not answer a replay."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_distributed and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def pinned_paths(root: nn.Module) -> tuple[str, ...]:
    """Return every path under `root` to a module that runs once; `""` is `root` itself."""
    parts = cast("Iterator[tuple[str, nn.Module]]", root.named_modules(remove_duplicate=False))
    syncs = synchronises_ranks(root)
    return tuple(path for path, part in parts if is_kept(part) or (isinstance(part, nn.SyncBatchNorm) and syncs))


def blocks_of_modules(graph: Graph, spans: Collection[tuple[int, int]], paths: Collection[str]) -> frozenset[int]:
    """Return which of the blocks `graph.nodes[start:stop]` (their `spans`) have an op of a module at one of `paths`."""
    return frozenset(
        block
        for block, (start, stop) in enumerate(spans)
        if any(not path or f"{n.module}.".startswith(f"{path}.") for n in graph.nodes[start:stop] for path in paths)
    )


def pin_chain(chain: Chain, blocks: Collection[int]) -> Chain:
    """Return `chain` as its planner sees it: what pinned `blocks` save is not a choice, and counts as live throughout.

    That is a little more than the truth: it is live from their forward to their backward.
    """
    pinned = sorted(blocks)
    if not pinned:
        return chain
    storages = {s for b in pinned for s in chain.blocks[b].options[0].storages}
    storages |= {s for b in pinned if b + 1 < len(chain.blocks) for s in chain.boundaries[b + 1].storages}
    saved_bytes = sum(chain.blocks[b].options[0].saved_bytes for b in pinned)
    live_bytes = saved_bytes + sum(chain.storage_bytes[s] for s in storages)
    live = StorageId(len(chain.storage_bytes))
    sizes = (*(0 if s in storages else size for s, size in enumerate(chain.storage_bytes)), live_bytes)
    return replace(
        chain,
        storage_bytes=sizes,
        blocks=tuple(_with_nothing_to_save(b) if i in pinned else b for i, b in enumerate(chain.blocks)),
        boundaries=tuple(Boundary((*b.storages, live), b.gradient_bytes) for b in chain.boundaries),
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
