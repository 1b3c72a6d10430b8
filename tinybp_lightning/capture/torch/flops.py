"""How many floating-point operations does a kernel take? As torch counts them, attention excepted.

The formula of torch 2.11 for attention raises where keys and values have fewer heads than queries, which CUDA's kernels
for half precision take as they are (grouped-query attention: Llama, Qwen); that of 2.13 does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

__all__ = ["flops_of"]

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


def flops_of(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the floating-point operations of a call, 0 where no formula is known.

    **Arguments:** `packet`: the overload packet (`torch.ops.aten.mm`) that was called with `args` and `kwargs`, and
    returned `out`; of tensors only shapes are used.
    """
    if packet in _ATTENTION:
        return _attention_flops(*args[:3])
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Two products for every head of the queries; tensors are (batch, heads, length, width)."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])
