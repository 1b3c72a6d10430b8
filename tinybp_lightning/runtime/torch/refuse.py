"""Which modules must not be replayed at all? Those whose second run cannot be made equal to the first.

cuDNN's recurrent layers draw dropout between layers from a state of their own, seeded once and then advancing by
itself (ATen/native/cudnn/RNN.cpp): putting torch's generator back does not bring the mask back, so a replay would give
wrong gradients without a word. Found by reading; torch.utils.checkpoint has the same hole.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from tinybp_lightning.errors import UnsupportedModuleError

__all__ = ["redraws_dropout", "refuse_unrepeatable"]


def redraws_dropout(layer: nn.Module, device: torch.device) -> bool:
    """Whether a recurrent layer on `device` would draw another dropout mask in a replay."""
    if not isinstance(layer, nn.RNNBase):
        return False
    return device.type == "cuda" and layer.num_layers > 1 and layer.dropout > 0


def refuse_unrepeatable(module: nn.Module) -> None:
    """Raise `UnsupportedModuleError` if some part of `module` cannot be run twice with the same result."""
    parts = cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
    for name, part in parts:
        parameter = next(part.parameters(), None)
        if parameter is not None and redraws_dropout(part, parameter.device):
            raise UnsupportedModuleError(
                f"`{name or module.__class__.__name__}` is `{part.extra_repr()}` "
                "on CUDA: cuDNN's dropout mask cannot be drawn again, so a replay would give "
                "wrong gradients. Stack single-layer recurrent layers with nn.Dropout between them."
            )
