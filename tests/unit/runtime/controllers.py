"""Pilots of chains that nobody runs, under a budget that nothing changes."""

from typing import Any, cast

import torch

from tinybp_lightning.config import HCBConfig
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch.controller import Controller
from tinybp_lightning.schedule.measured import MeasuredPlan
from tinybp_lightning.schedule.planner.planner import Planner

__all__ = ["controller_of", "middle_bytes"]


class _FixedRoom:
    cap_bytes: int | None = None
    optimizer_bytes = 0

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes

    def __call__(self, plain_peak_bytes: int) -> int:
        return self._budget_bytes


def controller_of(chain: Chain, budget_bytes: int, known: MeasuredPlan | None = None) -> Controller:
    """Return a controller with so many bytes."""
    budget = HCBConfig(activation_budget=budget_bytes).budget
    room = cast("Any", _FixedRoom(budget_bytes))
    return Controller("net", chain, budget=budget, room=room, device=torch.device("cpu"), observers=[], known=known)


def middle_bytes(chain: Chain) -> int:
    """Return a budget halfway between the smallest and the one from which no plan gets faster."""
    planner = Planner(chain)
    return (planner.smallest_bytes + planner.largest_bytes) // 2
