"""Find out how much memory a step may use: what the device has, less what is taken before the step begins."""

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.config import Budget, BudgetKind, HCBConfig
from tinybp_lightning.errors import BudgetError
from tinybp_lightning.runtime.profile import Limit
from tinybp_lightning.runtime.torch.measure.allocator import local_part

__all__ = ["Headroom", "OptimizerState", "TargetMemory", "fragmented_bytes", "limit_bytes"]

# What `"auto"` leaves free: fragmentation of the caching allocator and libraries that allocate beside it.
_AUTO_MARGIN = 0.05


def limit_bytes(budget: Budget, device: torch.device) -> int:
    """Return the bytes that a memory budget grants this process. Raises `BudgetError` if torch cannot tell the size."""
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
            f"`memory_budget={budget.text!r}` needs the size of `{device}`, which torch cannot tell: "
            "give the budget in bytes."
        )
    if budget.fraction is not None:
        return int(total * budget.fraction)
    return int((free + mine) * (1 - _AUTO_MARGIN))


def fragmented_bytes(device: torch.device) -> int:
    """Return the bytes that CUDA's allocator holds in pieces beside living tensors, and cannot give back."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0))


@dataclass(slots=True)
class TargetMemory:
    """What all plans of one target share: the optimizer's state, a cap, and the largest peak of plain training.

    `optimizer_state`: `None` where the budget does not count it; held only here, because Dynamo keeps our programs for
    longer than the target lives. `cap_bytes`: the most that any plan may use since one of them ran out of memory.
    `largest_plain_bytes`: what a budget that is a share is a share of, so that a small last batch may use as much.
    """

    optimizer_state: "OptimizerState | None"
    cap_bytes: int | None = None
    largest_plain_bytes: int = 0


class OptimizerState:
    """Counts the bytes of optimizer state, in the first step of each optimizer of `parameters`.

    `existed_bytes` were there before that step (from a checkpoint), `made_bytes` came with it, `unknown_bytes` are of
    the parameters that no optimizer has stepped yet. Make it before the step that it is to see: a closure runs after
    the first hook. The hooks live as long as it does: none may be removed while the optimizer goes through them.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._unknown = {id(p): _local_bytes(p) for p in parameters if p.requires_grad}
        self._before_bytes = 0
        self.has_seen = False
        self.existed_bytes = 0
        self.made_bytes = 0
        self.unknown_bytes = sum(self._unknown.values())
        before = register_optimizer_step_pre_hook(partial(_look, weakref.ref(self), False))
        after = register_optimizer_step_post_hook(partial(_look, weakref.ref(self), True))
        for handle in (before, after):
            weakref.finalize(self, handle.remove)

    def look(self, optimizer: torch.optim.Optimizer, *, has_stepped: bool) -> None:
        """Count what `optimizer` keeps for our parameters, just before or just after it steps."""
        groups: list[dict[str, Any]] = optimizer.param_groups if self._unknown else []
        mine: list[torch.Tensor] = [p for group in groups for p in group["params"] if id(p) in self._unknown]
        if not mine:
            return
        state: Mapping[torch.Tensor, Any] = optimizer.state
        kept = [(p, t) for p in mine for t in tree_leaves(state.get(p)) if isinstance(t, torch.Tensor)]
        now_bytes = sum(_local_bytes(t) for p, t in kept if t.device == p.device)  # a step counter may be on the CPU
        if not has_stepped:
            self._before_bytes = now_bytes
            return
        self.has_seen = True
        self.existed_bytes += self._before_bytes
        self.made_bytes += now_bytes - self._before_bytes
        self._before_bytes = 0
        for p in mine:
            del self._unknown[id(p)]
        self.unknown_bytes = sum(self._unknown.values())


def _look(state: "weakref.ref[OptimizerState]", has_stepped: bool, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let `state` look, without keeping it alive."""
    if (alive := state()) is not None:
        alive.look(optimizer, has_stepped=has_stepped)


def _local_bytes(t: torch.Tensor) -> int:
    local = local_part(t)
    return local.numel() * local.element_size()


class Headroom:
    """Bytes that a plan may use above what is alive when a step begins.

    **Arguments:** `tensors`: parameters, buffers and inputs of the step, as they are when it is first planned.
    """

    def __init__(
        self, config: HCBConfig, device: torch.device, tensors: Sequence[torch.Tensor], shared: TargetMemory
    ) -> None:
        self._shared = shared
        self._budget = config.budget
        self._device = device
        if device.type == "cuda":
            self._baseline_bytes = torch.cuda.memory_allocated(device)
        else:
            held = [*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)]
            self._baseline_bytes = sum({storage_key(t): t.untyped_storage().nbytes() for t in held}.values())
        self._assumed_bytes = config.optimizer_state_bytes
        state = shared.optimizer_state
        self._made_before_bytes = 0 if state is None else state.made_bytes

    def __call__(self, plain_peak_bytes: int) -> int:
        """Return the headroom, given the predicted peak of plain training."""
        return self.read().bytes_for(plain_peak_bytes)

    @property
    def cap_bytes(self) -> int | None:
        """The most that any plan of the target may use since one of them ran out of memory."""
        return self._shared.cap_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Optimizer state that was not there at first; until a step, as the user said, or two copies, as Adam keeps."""
        state = self._shared.optimizer_state
        if state is None:
            return 0
        if self._assumed_bytes is not None and not state.has_seen:
            return self._assumed_bytes
        if self._device.type == "cuda":  # the allocator's count includes what existed
            seen_bytes = state.made_bytes - self._made_before_bytes
        else:
            seen_bytes = state.existed_bytes + state.made_bytes
        return seen_bytes + 2 * state.unknown_bytes

    def read(self) -> Limit:
        """Return the limit as it is now."""
        budget, shared = self._budget, self._shared
        size_bytes, fraction = budget.size_bytes, budget.fraction
        if budget.kind is BudgetKind.MEMORY:
            taken_bytes = self._baseline_bytes + self.optimizer_bytes + fragmented_bytes(self._device)
            size_bytes, fraction = limit_bytes(budget, self._device) - taken_bytes, None
        return Limit(size_bytes, fraction, shared.largest_plain_bytes, shared.cap_bytes, self.optimizer_bytes)

    def share(self, limit: Limit) -> None:
        """Have all plans of the target share the cap and the largest plain peak of `limit`."""
        self._shared.cap_bytes = limit.cap_bytes
        self._shared.largest_plain_bytes = max(self._shared.largest_plain_bytes, limit.largest_plain_bytes)
