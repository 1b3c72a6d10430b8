"""How much memory does the device have, and how much of it is taken before a step begins?"""

import os
import weakref
from collections.abc import Sequence

import torch

from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.config import Budget, BudgetKind, HCBConfig
from tinybp_lightning.errors import BudgetError

__all__ = ["PlainPeak", "Room", "room_bytes", "static_bytes"]

# What `"auto"` leaves free: fragmentation of the caching allocator and libraries that allocate beside it.
_AUTO_MARGIN = 0.05


def static_bytes(device: torch.device, tensors: Sequence[torch.Tensor]) -> int:
    """Return the device bytes taken before the step allocates anything.

    On CUDA the allocator knows. On CPU nobody does: it is the parameters, buffers and inputs of the step (`tensors`)
    with the gradients they hold.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    held = [*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)]
    storages = {storage_key(t): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


def room_bytes(budget: Budget, device: torch.device) -> int:
    """Return the bytes that a memory budget grants this process on `device`.

    **Raises:** `BudgetError` where the device cannot tell its size.
    """
    if budget.size_bytes is not None:
        return budget.size_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine = torch.cuda.memory_reserved(device)
    elif device.type == "cpu":
        page = os.sysconf("SC_PAGE_SIZE")
        total, free, mine = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page, 0
    else:
        raise BudgetError(
            f"`memory_budget={budget.text!r}` needs the size of `{device}`, which cannot be asked: "
            "give the budget in bytes."
        )
    if budget.fraction is not None:
        return int(total * budget.fraction)
    return int((free + mine) * (1 - _AUTO_MARGIN))


class PlainPeak:
    """The largest peak that plain training of one target was seen to need, over all shapes.

    A share is of that: a small last batch must not be held to a share of its own small peak.
    """

    def __init__(self) -> None:
        self._largest_bytes = 0

    def largest(self, plain_peak_bytes: int) -> int:
        """Take one more peak into account and return the largest."""
        self._largest_bytes = max(self._largest_bytes, plain_peak_bytes)
        return self._largest_bytes


class Room:
    """Bytes a plan may use above what is alive when a step begins.

    **Arguments:** `tensors`: parameters, buffers and inputs of the step, as they are when it is first planned;
    `plain`: what a share is of, one for all programs of a target.
    """

    def __init__(
        self, config: HCBConfig, device: torch.device, tensors: Sequence[torch.Tensor], plain: "PlainPeak"
    ) -> None:
        self._plain = plain
        self._budget = config.budget
        self._device = device
        self._parameters = [weakref.ref(t) for t in tensors if t.requires_grad and t.is_leaf]
        self._static = static_bytes(device, tensors)
        self._reserve = config.optimizer_state_bytes

    def __call__(self, plain_peak_bytes: int) -> int:
        """Return the room, given the predicted peak of plain training."""
        budget = self._budget
        if budget.kind is BudgetKind.ACTIVATION:
            if budget.fraction is None:
                return budget.size_bytes or 0
            return int(self._plain.largest(plain_peak_bytes) * budget.fraction)
        return room_bytes(budget, self._device) - self._static - self._reserved_bytes()

    def _reserved_bytes(self) -> int:
        """Optimizer state that does not exist yet: by default two copies of the trainable parameters, as Adam keeps."""
        if self._reserve is not None:
            return self._reserve
        parameters = [p for r in self._parameters if (p := r()) is not None]
        return 2 * sum(p.numel() * p.element_size() for p in parameters)
