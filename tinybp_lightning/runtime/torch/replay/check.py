"""Check that a replay saves the same bits as the forward, by a hash of every saved tensor.

`HCBConfig(check=True)` or `HCB_CHECK=1` asks for this checked mode; otherwise none of this module runs in a step.

A hash is one integer, made on the tensor's device: the bytes as integers, each times an odd weight of its own, summed
with wraparound. One element that differs always changes the sum, because an odd weight has an inverse modulo 2^64.
Several elements that differ leave it unchanged in about one of 2^64 cases.
"""

import os
from typing import Any

import torch

from tinybp_lightning.errors import ConfigError, ReplayError
from tinybp_lightning.runtime.torch.replay.bits import as_integers, can_compare
from tinybp_lightning.runtime.torch.replay.saved_tensors import ADVICE, Reference, SavedTensors, Slot
from tinybp_lightning.runtime.torch.replay.source_op import fills_after_saving, running_op

__all__ = ["CheckedSavedTensors", "fingerprint", "is_checking"]

_VARIABLE = "HCB_CHECK"
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64: odd, with bits all over
# Only a small share of the tensor is alive as integers at once, so that checked steps stay within their budgets.
_MIN_CHUNK, _MAX_CHUNKS = 256, 64


def is_checking(*, asked: bool) -> bool:
    """Return whether code `asked` for checked mode, or `HCB_CHECK` does. Raises `ConfigError` unless that is 0 or 1."""
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ConfigError(f"`{_VARIABLE}={value}` is unknown: set it to 1 (compare every replayed tensor) or 0.")
    return asked or value == "1"


def fingerprint(t: torch.Tensor) -> torch.Tensor | None:
    """Return a hash of a tensor's values, bit for bit, on its device; `None` if the values cannot be compared."""
    if not can_compare(t):
        return None
    with torch.no_grad():
        integers = as_integers(t.detach())
        size = max(_MIN_CHUNK, integers.numel() // _MAX_CHUNKS)
        total = torch.zeros((), dtype=torch.int64, device=t.device)
        weights = _weights(min(size, integers.numel()), t.device)
        for start in range(0, integers.numel(), size):
            chunk = integers[start : start + size].long()
            total = total * _GOLDEN + (chunk * weights[: chunk.numel()]).sum()
        return total


def _weights(count: int, device: torch.device) -> torch.Tensor:
    # Odd, and without a pattern in which small changes of neighbours could cancel.
    mixed = torch.arange(1, count + 1, device=device) * _GOLDEN
    return (mixed ^ (mixed >> 29)) * _GOLDEN | 1


class CheckedSavedTensors(SavedTensors):
    """Saved tensors with a hash of each, and the op that saved it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved: list[torch.Tensor | None] = []
        self._ops: list[str] = []
        self._replayed: dict[int, torch.Tensor] = {}

    def pack(self, t: torch.Tensor) -> Slot | Reference:
        """Take a saved tensor and its hash."""
        packed = super().pack(t)
        is_final = isinstance(packed, Slot) and not fills_after_saving()
        self._saved.append(fingerprint(t) if is_final else None)
        self._ops.append(running_op())
        return packed

    def check_values(self) -> None:
        """Raise `ReplayError`, which names the first op, if the replay saved other values than the forward."""
        pairs = [(p, s, r) for p, r in sorted(self._replayed.items()) if (s := self._saved[p]) is not None]
        self._replayed = {}
        different = [p for p, s, r in pairs if not torch.equal(s, r)]
        if different:
            first = different[0]
            shape, dtype, _ = self._forms[first]
            raise ReplayError(
                f"the replay of block `{self._name}` saved other values than the forward: {len(different)} of "
                f"{len(pairs)} tensors differ, the first is number {first}, {tuple(shape)} {dtype}, saved by "
                f"{self._ops[first]}. {ADVICE}"
            )

    def note_value(self, position: int, t: torch.Tensor) -> None:
        """Take the hash of what a replay saved at `position`."""
        if (value := fingerprint(t)) is not None:
            self._replayed[position] = value
