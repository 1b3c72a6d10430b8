"""Shapes for ops that torch runs, and cannot trace: without them a model that uses one is trained by module steps.

`_grouped_mm` (the experts of a mixture) runs in float32 and float16, but its shape function admits bfloat16 only. The
shape is the same (`torch/_meta_registrations.py`, torch 2.11 to 2.14, where this module reaches into private API).
"""

from typing import Any

import torch
from torch import Tensor
from torch._meta_registrations import _create_grouped_mm_output_tensor  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from torch._subclasses import fake_impls

__all__ = ["register_fake_ops"]


def register_fake_ops() -> None:
    """Add what is missing, once; what torch has by itself stays."""
    known: dict[Any, Any] = fake_impls.op_implementations_dict
    known.setdefault(torch.ops.aten._grouped_mm.default, _grouped_mm)


def _grouped_mm(
    mode: Any,
    op: Any,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    if mat_a.dtype is torch.bfloat16 or mat_a.dtype is not mat_b.dtype or bias is not None:
        return NotImplemented  # torch's own, which also says what is wrong
    with mode:
        return _create_grouped_mm_output_tensor(mat_a, mat_b, offs, out_dtype)
