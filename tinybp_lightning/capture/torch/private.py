"""Which private parts of torch does this package use? All of them pass through here.

The exceptions are Dynamo's (`dynamo.py`, `masks.py`) and Kineto's (`allocator.py`). Each part works from torch 2.11 to
2.14; when one moves, this is the file to change.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# Everything here is private by definition.

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - no stub lists it
from torch.autograd import forward_ad
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

__all__ = [
    "accumulation_hooks",
    "buffers_of",
    "call_impl",
    "compiled_call_impl",
    "cuda_history",
    "cuda_history_is_on",
    "forward_hooks",
    "graph_task_id",
    "has_gradient_hooks",
    "hold_cuda",
    "is_checkpointed",
    "is_forward_ad",
    "is_jit_tracing",
    "is_profiling",
    "is_transformed",
    "keeps_graph",
    "leaving_transforms",
    "modes_back",
    "modes_set_aside",
    "order_attention_backends",
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
_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue] - no stub lists it
set_grad_enabled_op: Any = torch._C._set_grad_enabled
"""The function that Dynamo's graphs call where a `no_grad` region begins or ends."""


def storage_key(t: torch.Tensor) -> int:
    """Return the identity of the storage behind `t`, valid while the storage is alive."""
    return t.untyped_storage()._cdata


def untransformed(t: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor inside `t`, which `torch.func` transforms (`vmap`) may have wrapped."""
    while _transforms.is_functorch_wrapped_tensor(t):
        t = _transforms.get_unwrapped(t)
    return t


def leaving_transforms(call: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
    """Wrap a call so that it leaves every `torch.func` transform that it entered, also when it stops early."""

    def left(arguments: list[Any]) -> Sequence[Any]:
        depth = _transforms.get_dynamic_layer_stack_depth()
        try:
            return call(arguments)
        except BaseException:
            _transforms.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            raise

    return left


def is_transformed() -> bool:
    """Return whether a `torch.func` transform surrounds this line."""
    return bool(_transforms.get_dynamic_layer_stack_depth())


def is_forward_ad() -> bool:
    """Return whether a level of forward-mode AD surrounds this line."""
    return forward_ad._current_level >= 0


def is_jit_tracing() -> bool:
    """Return whether `torch.jit.trace` records this line."""
    state: Any = torch._C._get_tracing_state()
    return state is not None


def is_checkpointed() -> bool:
    """Return whether the non-reentrant `torch.utils.checkpoint` surrounds this line, in its forward or its replay."""
    hooks: Any = _autograd._top_saved_tensors_default_hooks(True)
    name = str(getattr(hooks[0], "__qualname__", "")) if hooks else ""
    return name.startswith(("_checkpoint_hook.", "_recomputation_hook."))


def keeps_graph() -> bool:
    """Return whether the backward that runs leaves its graph for another one (`retain_graph`, `create_graph`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def graph_task_id() -> int:
    """Return the number of the backward that runs on this thread, -1 outside of a backward."""
    return torch._C._current_graph_task_id()


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks that run before and after the forward of `module`."""
    tables: Any = (module._forward_pre_hooks, module._forward_hooks)
    return [hook for table in tables for hook in table.values()]


def queue_callback(callback: Callable[[], None]) -> None:
    """Call `callback` when the current backward has ended (as DDP and FSDP do)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def is_profiling() -> bool:
    """Return whether a profiler runs on this thread."""
    return torch.autograd._profiler_enabled()


def compiled_call_impl(module: nn.Module) -> Callable[..., Any] | None:
    """Return the call that `Module.compile` installed in the module, if any."""
    return module._compiled_call_impl


def call_impl(module: nn.Module) -> Callable[..., Any]:
    """Return the function that a call of `module` runs, hooks included."""
    return module._compiled_call_impl or module._call_impl


def set_call_impl(module: nn.Module, impl: Callable[..., Any] | None) -> None:
    """Make a call of `module` run `impl`, around all of its hooks; `None` restores the plain call.

    The attribute is the one of `Module.compile`, which `copy.deepcopy` and `pickle` do not copy.
    """
    module._compiled_call_impl = impl


def accumulation_hooks(parameter: nn.Parameter) -> list[Any]:
    """Return the hooks that run after a gradient has been accumulated into `parameter`."""
    return list((parameter._post_accumulate_grad_hooks or {}).values())


def has_gradient_hooks(t: torch.Tensor) -> bool:
    """Return whether `t` has hooks that run before or after its gradient is accumulated.

    Hooks on its accumulation node, which C++ code and distributed training install, are not found.
    """
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the module's own buffers by name: the dictionary in which they are registered, not a copy."""
    return module._buffers


def swap_buffer(owner: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    """Register `buffer` as `name` in place of the old one, which is returned."""
    own = owner._buffers[name]
    owner._buffers[name] = buffer
    return own


def cuda_history_is_on() -> bool:
    """Return whether the CUDA allocator's history is being recorded already."""
    return bool(torch._C._cuda_isHistoryEnabled()) if hasattr(torch._C, "_cuda_isHistoryEnabled") else False


def hold_cuda(cycles: int) -> None:
    """Keep the current stream busy for `cycles` clock cycles of the device."""
    torch.cuda._sleep(cycles)


def start_cuda_history(max_events: int) -> None:
    """Begin to record every allocation and release, without stack traces."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=max_events)


def stop_cuda_history() -> None:
    """Stop recording and discard the records."""
    torch.cuda.memory._record_memory_history(enabled=None)


def cuda_history(device: torch.device) -> list[tuple[int, int]]:
    """Return (address, bytes) of every allocation (positive) and release (negative) so far, in order."""
    sign = {"alloc": 1, "free_requested": -1}
    snapshot: Any = torch.cuda.memory._snapshot(device)
    entries = snapshot["device_traces"][device.index or 0]
    return [(e["addr"], sign[e["action"]] * e["size"]) for e in entries if e["action"] in sign]


# Note [Dispatch modes]
# A `TorchDispatchMode` sees every operator: `FlopCounterMode` counts, others log or check. Dynamo traces nothing while
# one is active (from torch 2.13 it runs the forward and then raises), and the user's counter should not count profiling
# runs. So the modes are set aside while a forward is traced and planned, and put back around the step's own operators.
class _Aside(threading.local):
    """The modes that this thread has set aside; the last one acts first."""

    modes: tuple[TorchDispatchMode, ...] = ()


_aside = _Aside()


@cache
def order_attention_backends() -> None:
    """Have torch choose a kernel for attention on CUDA once, and run none.

    On cards where cuDNN's is the fastest, the first choice of a process puts it first in the order of backends for good
    (`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`; seen in torch 2.11 on an H200).
    """
    with _disable_current_modes():
        q = torch.empty(1, 1, 16, 64, dtype=torch.bfloat16, device="cuda")
        torch._fused_sdp_choice(q, q, q)


@contextlib.contextmanager
def modes_set_aside() -> Generator[None]:
    """Take the user's dispatch modes off their stack. See Note [Dispatch modes]."""
    before = _aside.modes
    # Torch's own modes (fake tensors, proxies) stay in place.
    modes = tuple(m for m in _get_current_dispatch_mode_stack() if not m.is_infra_mode())
    for _ in modes:
        _pop_mode()
    _aside.modes = modes
    try:
        yield
    finally:
        _aside.modes = before
        for mode in modes:
            _push_mode(mode)


@contextlib.contextmanager
def modes_back() -> Generator[None]:
    """Put the modes that `modes_set_aside` took back in place while the body runs."""
    modes, _aside.modes = _aside.modes, ()
    for mode in modes:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in modes:
            _pop_mode()
        _aside.modes = modes
