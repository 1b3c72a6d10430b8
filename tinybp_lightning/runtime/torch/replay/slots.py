"""What does autograd hold in place of a saved tensor? A slot, or a reference; and which slots are views of others.

Every saved tensor of a dropped block is one of three things. A *reference*: it aliases an external (a parameter, the
batch), which is alive anyway, and is kept as it is. An *alias*: it aliases a leaf of the boundary before the block, and
is a view to be rebuilt. Or it must be *replayed*. `slot_book` tells them apart.
"""

import weakref
from dataclasses import dataclass

import torch

from tinybp_lightning.errors import ReplayError

__all__ = ["ADVICE", "Alias", "Reference", "Slot", "alias_of", "offset_bytes", "view_of"]

ADVICE = (
    "It does not do the same thing twice: it has an op that is not deterministic "
    "(torch.use_deterministic_algorithms(True) makes it so, or names it), or it reads state that it changes "
    "(a counter, a cache, a generator of its own). `tbp.keep(module)` has a module run once only."
)


class Slot:
    """What autograd holds in place of one saved tensor; `value` is filled just before it is needed, and taken once."""

    __slots__ = ("__weakref__", "block", "position", "value", "version")

    def __init__(self, block: int, position: int) -> None:
        self.block = block
        self.position = position
        self.value: torch.Tensor | None = None
        self.version = 0

    def fill(self, value: torch.Tensor) -> None:
        """Put a tensor that shares its version counter with the one that the replay goes on with."""
        self.value, self.version = value, value._version

    def take(self, reader: str) -> torch.Tensor:
        """Return the tensor and let go of it. Raises as `read` does."""
        value = self.read(reader)
        self.value = None
        return value

    def read(self, reader: str) -> torch.Tensor:
        """Return the tensor. Raises `ReplayError` if there is none, or it was changed since it was put in."""
        if self.value is None:
            raise ReplayError(
                f"block `{reader}` saved tensor {self.position} in the forward, but its replay did not. {ADVICE}"
            )
        if self.value._version != self.version:  # autograd leaves this check to whoever packs
            raise ReplayError(
                f"block `{reader}` needs a tensor of shape {tuple(self.value.shape)} for its gradient, but changed it "
                f"in place after it was saved (version {self.value._version}, expected {self.version}). Plain training "
                "cannot do that either: use the out-of-place form of the op that changes it."
            )
        return self.value


@dataclass(frozen=True, slots=True)
class Reference:
    """A saved tensor that aliases an external: held as plain autograd holds it, with the same version check."""

    block: int
    tensor: torch.Tensor
    version: int

    def tensor_checked(self, reader: str) -> torch.Tensor:
        """Return the tensor. Raises `ReplayError` if it was changed in place since the forward."""
        if self.tensor._version != self.version:
            raise ReplayError(
                f"block `{reader}` needs a tensor of shape {tuple(self.tensor.shape)} for its gradient, but it was "
                f"changed in place after the forward (version {self.tensor._version}, expected {self.version})."
            )
        return self.tensor


@dataclass(frozen=True, slots=True)
class Alias:
    """A view of number `source` of the leaves of the boundary before the block, or of its saved tensors."""

    slot: "weakref.ref[Slot]"
    source: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset_bytes: int


def alias_of(slot: Slot, source: int, t: torch.Tensor, source_offset_bytes: int) -> Alias:
    """Return how `slot`, filled with `t`, is a view of source number `source`, which begins there in the storage."""
    return Alias(weakref.ref(slot), source, t.dtype, t.shape, t.stride(), offset_bytes(t) - source_offset_bytes)


def view_of(leaf: torch.Tensor, alias: Alias) -> torch.Tensor:
    """Return `alias` of `leaf`, which holds what its source held."""
    base = leaf.detach()
    start_bytes = offset_bytes(base) + alias.offset_bytes
    if alias.dtype != base.dtype:
        whole = torch.empty(0, dtype=alias.dtype, device=base.device)
        whole.set_(base.untyped_storage(), start_bytes // whole.element_size(), alias.shape, alias.stride)
        return whole
    return base.as_strided(alias.shape, alias.stride, start_bytes // base.element_size())


def offset_bytes(t: torch.Tensor) -> int:
    """Return where `t` begins in its storage."""
    return int(t.storage_offset()) * t.element_size()
