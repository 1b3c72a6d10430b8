"""Refuse wrong arguments, and modules whose second run cannot be made equal to the first.

cuDNN's recurrent layers draw the dropout between layers from a state of their own, which is seeded once and then
advances by itself (ATen/native/cudnn/RNN.cpp). Restoring torch's generator does not restore the mask, so a replay would
silently give wrong gradients. torch.utils.checkpoint has the same defect.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from tinybp_lightning.capture.torch.private import is_checkpointed, is_forward_ad, is_jit_tracing, is_transformed
from tinybp_lightning.errors import UnsupportedModuleError

__all__ = [
    "redraws_dropout",
    "refuse_capture",
    "refuse_other_than_module",
    "refuse_unrepeatable",
    "refuse_unsupported",
    "why_not_replayed",
]


def refuse_other_than_module(value: object) -> None:
    """Raise `UnsupportedModuleError` if `value` is not a module."""
    if not isinstance(value, nn.Module):
        raise UnsupportedModuleError(f"`{type(value).__name__}` is not a torch.nn.Module: pass the model itself.")


def refuse_unsupported(root: nn.Module) -> None:
    """Raise `UnsupportedModuleError` if `root` has a part of a kind that the engine does not train."""
    for name, part in cast("Iterator[tuple[str, nn.Module]]", root.named_modules()):
        if (why := _why_unsupported(part)) is not None:
            kind = type(part).__name__
            raise UnsupportedModuleError(f"`{name}` (`{kind}`) {why}" if name else f"`{kind}` {why}")


def _why_unsupported(part: nn.Module) -> str | None:
    if isinstance(part, torch.jit.ScriptModule):
        return "is TorchScript, which runs outside of Python: pass the eager module."
    if isinstance(part, nn.DataParallel):
        return "copies its module in every forward, and each copy would need a plan: use DistributedDataParallel."
    if type(part).__module__.startswith("torch.ao.nn.quantized"):
        return "is quantised and has no backward: train the float module and quantise it afterwards."
    if any(c.__name__ in ("FakeQuantizeBase", "ObserverBase") for c in type(part).__mro__):
        return "observes ranges while it runs, and a replay would update them again: leave it out of the module."
    return None


def refuse_capture() -> None:
    """Raise `UnsupportedModuleError` while a CUDA graph is captured: plans change, and a captured step cannot."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModuleError(
            "a training forward under a budget cannot be captured into a CUDA graph: its replays are decided step by "
            "step. Capture the model without `hcb` (`tbp.restore(model)`), or do not capture."
        )


def why_not_replayed(tensors: Sequence[torch.Tensor]) -> str | None:
    """Return why a forward on `tensors` runs plainly, as a clause that ends with the remedy; `None` if it need not."""
    if is_transformed():
        return "a `torch.func` transform (vmap, grad, jvp) surrounds the call: its tensors exist only inside it."
    if is_forward_ad():
        return "forward-mode AD surrounds the call: its tangents are no part of what is replayed."
    if is_checkpointed():
        return "`torch.utils.checkpoint` surrounds the call and recomputes it whole: leave that checkpoint out."
    if is_jit_tracing():
        return "`torch.jit.trace` records the call."
    if any(t.is_nested for t in tensors):
        return "nested tensors are passed: pass padded ones with a mask."
    return None


def redraws_dropout(layer: nn.Module, device: torch.device) -> bool:
    """Return whether a recurrent layer on `device` would draw another dropout mask in a replay."""
    return isinstance(layer, nn.RNNBase) and device.type == "cuda" and layer.num_layers > 1 and layer.dropout > 0


def refuse_unrepeatable(module: nn.Module) -> None:
    """Raise `UnsupportedModuleError` if some part of `module` cannot be run twice with the same result, or at all."""
    refuse_unsupported(module)
    for name, part in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        parameter = next(part.parameters(), None)
        if parameter is not None and redraws_dropout(part, parameter.device):
            raise UnsupportedModuleError(
                f"`{name or module.__class__.__name__}` is `{part.extra_repr()}` on CUDA: cuDNN cannot draw its "
                "dropout mask again, so a replay would give wrong gradients. Stack single-layer recurrent layers with "
                "nn.Dropout between them."
            )
