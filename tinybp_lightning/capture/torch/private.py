"""Which private parts of torch does this package touch? All of them pass through here, except Dynamo's and Kineto's.

Each was seen to work from torch 2.11 to 2.14; when one moves, this is the file to mend (`dynamo.py` and `allocator.py`
hold the other two concerns).
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# Everything here is private by definition.

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    "call_impl",
    "compiled_call_impl",
    "graph_task_id",
    "is_profiling",
    "queue_callback",
    "set_call_impl",
    "set_grad_enabled_op",
    "storage_key",
    "swap_buffer",
]

set_grad_enabled_op: Any = torch._C._set_grad_enabled
"""What Dynamo's graphs call where a `no_grad` region begins or ends."""


def storage_key(t: torch.Tensor) -> int:
    """Return the identity of the storage behind `t`, valid while somebody holds it."""
    return t.untyped_storage()._cdata


def graph_task_id() -> int:
    """Return the number of the backward that runs on this thread, -1 outside of backward."""
    return torch._C._current_graph_task_id()


def queue_callback(callback: Callable[[], None]) -> None:
    """Call `callback` once the backward that runs now has ended (as DDP and FSDP do)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def is_profiling() -> bool:
    """Whether a profiler runs on this thread."""
    return torch.autograd._profiler_enabled()


def compiled_call_impl(module: nn.Module) -> Callable[..., Any] | None:
    """Return what `Module.compile` put in place of the module's call, if anything."""
    return module._compiled_call_impl


def call_impl(module: nn.Module) -> Callable[..., Any]:
    """Return what a call of `module` runs, hooks included."""
    return module._compiled_call_impl or module._call_impl


def set_call_impl(module: nn.Module, impl: Callable[..., Any] | None) -> None:
    """Run `impl` when `module` is called, outside all of its hooks; `None` gives the plain call back.

    The attribute is `Module.compile`'s: `copy.deepcopy` and `pickle` of the module leave it behind.
    """
    module._compiled_call_impl = impl


def swap_buffer(owner: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    """Put `buffer` in place of the one registered as `name`, and return that one."""
    own = owner._buffers[name]
    owner._buffers[name] = buffer
    return own
