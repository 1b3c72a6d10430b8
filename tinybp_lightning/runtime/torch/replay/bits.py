"""Are two tensors equal, bit for bit? A NaN equals itself here, and 0 differs from -0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.runtime.torch.replay.blocks import has_storage

__all__ = ["UnwrittenOutputs", "as_integers", "can_compare", "same_bits"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def can_compare(t: torch.Tensor) -> bool:
    """Return whether the values of `t` say anything.

    A flat `uint8` tensor does not: it is the workspace of a recurrent kernel, with padding that nobody writes.
    """
    return has_storage(t) and t.device.type != "meta" and not (t.dtype is torch.uint8 and t.dim() == 1)


def as_integers(t: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `t` as a flat tensor of integers."""
    plain = t.int_repr() if t.is_quantized else t.resolve_conj().resolve_neg()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return plain.contiguous().view(-1).view(_INTEGERS[plain.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether `a` and `b`, of one shape and dtype, hold the same bits; of what cannot be compared, true."""
    if not (can_compare(a) and can_compare(b)):
        return True
    with torch.no_grad():
        return torch.equal(as_integers(a.detach()), as_integers(b.detach()))


class UnwrittenOutputs(TorchDispatchMode):
    """Notes the outputs of attention kernels that are not written in full: their values are no one's to compare.

    The efficient kernel pads its logarithms of sums to 32 rows, and without dropout cuDNN's leaves its seed as it was
    allocated (seen on an H200, torch 2.11).
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, torch.Tensor] = {}  # held, so that no later storage is mistaken for one of these

    def __contains__(self, t: torch.Tensor) -> bool:
        """Return whether `t` is such an output, or a view of one."""
        return has_storage(t) and storage_key(t) in self._found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out: Any = func(*args, **(kwargs or {}))
        if "attention" in func.__name__:
            _, *others = tree_leaves(out)
            self._found |= {storage_key(t): t for t in others if isinstance(t, torch.Tensor) and has_storage(t)}
        return out
