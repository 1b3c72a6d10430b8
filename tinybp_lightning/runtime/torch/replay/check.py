"""Did a replay save the same bits as the forward? Checked mode compares a hash of every saved tensor.

A hash is one integer, made on the tensor's device: its bytes as integers, each times an odd weight of its own, summed
with wraparound. One element that differs always changes the sum, because an odd weight has an inverse modulo 2^64;
more of them do but for one case in 2^64 or so. All hashes of a block are compared at once after its replay, so a
device waits once for each replayed block.

`HCBConfig(check=True)` or `HCB_CHECK=1` asks for it. The engine picks this book when a forward begins; off, none of
this runs.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from tinybp_lightning.errors import ConfigError, ReplayError
from tinybp_lightning.runtime.torch.replay.blocks import has_storage
from tinybp_lightning.runtime.torch.replay.places import fills_after_saving, running_op
from tinybp_lightning.runtime.torch.replay.saved_tensors import SavedTensors
from tinybp_lightning.runtime.torch.replay.slots import ADVICE, Reference, Slot

__all__ = ["CheckedSavedTensors", "fingerprint", "is_checking"]

_VARIABLE = "HCB_CHECK"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64: odd, with bits all over
# The integers that are alive at once are a small share of the tensor, so that checked steps keep their budgets.
_MIN_CHUNK, _MAX_CHUNKS = 256, 64


def is_checking(*, asked: bool) -> bool:
    """Return whether checked mode was `asked` for in code, or `HCB_CHECK` asks for it now.

    **Raises:** `ConfigError` if the variable says neither 0 nor 1.
    """
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ConfigError(f"`{_VARIABLE}={value}` is unknown: expected 1 (compare every replayed tensor) or 0.")
    return asked or value == "1"


def fingerprint(t: torch.Tensor) -> torch.Tensor | None:
    """Return a hash of a tensor's values, bit for bit, on its device; `None` where it has none to be compared.

    That is what cannot be read as bytes, and flat `uint8`: a recurrent kernel's workspace, part of which is padding
    that nobody writes.
    """
    if not has_storage(t) or t.device.type == "meta" or (t.dtype is torch.uint8 and t.dim() == 1):
        return None
    with torch.no_grad():
        integers = _as_integers(t.detach())
        size = max(_MIN_CHUNK, integers.numel() // _MAX_CHUNKS)
        total = torch.zeros((), dtype=torch.int64, device=t.device)
        weights = _weights(min(size, integers.numel()), t.device)
        for start in range(0, integers.numel(), size):
            chunk = integers[start : start + size].long()
            total = total * _GOLDEN + (chunk * weights[: chunk.numel()]).sum()
        return total


def _as_integers(t: torch.Tensor) -> torch.Tensor:
    plain = t.int_repr() if t.is_quantized else t.resolve_conj().resolve_neg()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return plain.contiguous().view(-1).view(_INTEGERS[plain.element_size()])


def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers without a pattern that small changes of neighbours could cancel in."""
    mixed = torch.arange(1, count + 1, device=device) * _GOLDEN
    return (mixed ^ (mixed >> 29)) * _GOLDEN | 1


class CheckedSavedTensors(SavedTensors):
    """A slot book that remembers a hash of every saved tensor, and the op that saved it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved: list[torch.Tensor | None] = []
        self._ops: list[str] = []
        self._replayed: dict[int, torch.Tensor] = {}

    def pack(self, t: torch.Tensor) -> Slot | Reference:
        """First sweep: take a saved tensor and its hash."""
        packed = super().pack(t)
        is_final = isinstance(packed, Slot) and not fills_after_saving()
        self._saved.append(fingerprint(t) if is_final else None)
        self._ops.append(running_op())
        return packed

    def fill_aliases(self, state: Sequence[Any]) -> None:
        """Fill the slots that are views of the boundary's leaves, which may have been computed anew."""
        super().fill_aliases(state)
        for alias in self._aliases:
            slot = alias.slot()
            if slot is not None and slot.value is not None:
                self._note(slot.position, slot.value)

    def fill_again(self, position: int, t: torch.Tensor) -> None:
        """Fill the slots of what was saved again, which the replay need not get to."""
        super().fill_again(position, t)
        for alias in self._again.get(position, ()):
            slot = alias.slot()
            if slot is not None and slot.value is not None:
                self._note(slot.position, slot.value)

    def check(self, position: int, t: torch.Tensor) -> None:
        """Raise `ReplayError` for another form, and take the hash."""
        super().check(position, t)
        self._note(position, t)

    def check_values(self) -> None:
        """Raise `ReplayError`, naming the first op, if the replay saved other values than the forward."""
        pairs = [(p, s, r) for p, r in sorted(self._replayed.items()) if (s := self._saved[p]) is not None]
        self._replayed = {}
        different: list[int] = []
        for device in sorted({r.device for _, _, r in pairs}, key=str):
            here = [(p, s, r) for p, s, r in pairs if r.device == device]
            unequal = torch.stack([s for _, s, _ in here]) != torch.stack([r for _, _, r in here])
            different += [here[int(k)][0] for k in unequal.nonzero()]
        if different:
            first = min(different)
            form = self._forms[first]
            raise ReplayError(
                f"the replay of block `{self._name}` saved other values than the forward: {len(different)} of "
                f"{len(pairs)} tensors differ, the first is number {first}, {tuple(form.shape)} {form.dtype}, saved by "
                f"{self._ops[first] or 'compiled code'}. {ADVICE}"
            )

    def _note(self, position: int, t: torch.Tensor) -> None:
        value = fingerprint(t)
        if value is not None:
            self._replayed[position] = value
