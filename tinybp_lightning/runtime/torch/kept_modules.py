"""Which modules must never run a second time? Those that the user marked with `keep`, and what synchronises ranks.

A mark is an attribute of the module, so that copies of it carry it too. What follows from it: module steps leave the
module's calls alone; a traced forward pins every block that has an op of it, see `pinned.py`.
"""

from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import nn

from tinybp_lightning.errors import UnsupportedModuleError

__all__ = ["has_kept", "is_kept", "keep", "kept_paths", "synchronises_ranks"]

M = TypeVar("M", bound=nn.Module)
_MARK = "_tbp_is_kept"


def keep(module: M) -> M:
    """Mark `module` as never to be replayed: what it saves for backward stays, and its forward runs once a step.

    For a module that does not do the same thing twice. Call it before the first training step of the model that it is
    part of, whose budget has to leave room for what it keeps.

    **Returns:** the same object. The mark is part of it: copies are kept too, and `tbp.restore` does not take it off.

    **Raises:** `UnsupportedModuleError` if `module` is no module, or a container that is never called.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModuleError(
            f"`{type(module).__name__}` is no torch.nn.Module: pass the part that is to be kept."
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise UnsupportedModuleError(
            f"`{type(module).__name__}` is never called, so there is nothing of it to keep: mark the modules in it."
        )
    setattr(module, _MARK, True)
    return module


def is_kept(module: nn.Module) -> bool:
    """Return whether `module` itself was marked."""
    return getattr(module, _MARK, False) is True


def has_kept(module: nn.Module) -> bool:
    """Return whether `module` or a part of it was marked."""
    return any(is_kept(part) for part in module.modules())


def synchronises_ranks(module: nn.Module) -> bool:
    """Return whether a part of `module` is a `SyncBatchNorm` among ranks, which a replay would ask again."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_distributed and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def kept_paths(root: nn.Module) -> tuple[str, ...]:
    """Return every path under `root` at which a module is found that runs once; `""` is `root` itself."""
    parts = cast("Iterator[tuple[str, nn.Module]]", root.named_modules(remove_duplicate=False))
    return tuple(
        path
        for path, part in parts
        if is_kept(part) or (isinstance(part, nn.SyncBatchNorm) and synchronises_ranks(part))
    )
