"""Which private parts of torch does this package touch? All of them pass through here, except Dynamo's and Kineto's.

Each was seen to work from torch 2.11 to 2.14; when one moves, this is the file to mend (`dynamo.py` and `allocator.py`
hold the other two concerns).
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# Everything here is private by definition.

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - no stub lists it

__all__ = [
    "accumulation_hooks",
    "buffers_of",
    "call_impl",
    "compiled_call_impl",
    "cuda_history",
    "cuda_history_is_on",
    "graph_task_id",
    "has_gradient_hooks",
    "hold_cuda",
    "is_profiling",
    "leaving_transforms",
    "queue_callback",
    "set_call_impl",
    "set_grad_enabled_op",
    "start_cuda_history",
    "stop_cuda_history",
    "storage_key",
    "swap_buffer",
    "untransformed",
]

_transforms: Any = _functorch
set_grad_enabled_op: Any = torch._C._set_grad_enabled
"""What Dynamo's graphs call where a `no_grad` region begins or ends."""


def storage_key(t: torch.Tensor) -> int:
    """Return the identity of the storage behind `t`, valid while somebody holds it."""
    return t.untyped_storage()._cdata


def untransformed(t: torch.Tensor) -> torch.Tensor:
    """Return the ordinary tensor inside one that `torch.func` transforms (`vmap`) have wrapped; any other as it is."""
    while _transforms.is_functorch_wrapped_tensor(t):
        t = _transforms.get_unwrapped(t)
    return t


@contextlib.contextmanager
def leaving_transforms() -> Generator[None]:
    """Leave every `torch.func` transform that the body entered and an exception kept it from leaving."""
    depth = _transforms.get_dynamic_layer_stack_depth()
    try:
        yield
    except BaseException:
        _transforms.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        raise


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


def accumulation_hooks(parameter: nn.Parameter) -> list[Any]:
    """Return the hooks that run after a gradient has been accumulated into `parameter`."""
    return list((parameter._post_accumulate_grad_hooks or {}).values())


def has_gradient_hooks(t: torch.Tensor) -> bool:
    """Return whether somebody waits for the gradient of `t`: before or after it is accumulated.

    Hooks on its accumulation node are not seen, which C++ code and distributed training have.
    """
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the module's own buffers by name, as they are registered: the dictionary itself, no copy."""
    return module._buffers


def swap_buffer(owner: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    """Put `buffer` in place of the one registered as `name`, and return that one."""
    own = owner._buffers[name]
    owner._buffers[name] = buffer
    return own


def cuda_history_is_on() -> bool:
    """Whether somebody records the CUDA allocator's history already."""
    return bool(torch._C._cuda_isHistoryEnabled()) if hasattr(torch._C, "_cuda_isHistoryEnabled") else False


def hold_cuda(cycles: int) -> None:
    """Keep the current stream busy for so many clock cycles of the device."""
    torch.cuda._sleep(cycles)


def start_cuda_history(max_events: int) -> None:
    """Record every allocation and release from now on, without stack traces."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=max_events)


def stop_cuda_history() -> None:
    """Stop recording, and drop what was recorded."""
    torch.cuda.memory._record_memory_history(enabled=None)


def cuda_history(device: torch.device) -> list[tuple[int, int]]:
    """Return (address, bytes) of every allocation (positive) and release (negative) so far, in order."""
    sign = {"alloc": 1, "free_requested": -1}
    snapshot: Any = torch.cuda.memory._snapshot(device)
    entries = snapshot["device_traces"][device.index or 0]
    return [(e["addr"], sign[e["action"]] * e["size"]) for e in entries if e["action"] in sign]
