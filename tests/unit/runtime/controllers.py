"""Control loops and calibration states of chains that nobody runs, under a limit that nothing else changes."""

from dataclasses import replace
from typing import Any, cast

import torch

from tinybp_lightning.config import HCBConfig
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.profile import Limit
from tinybp_lightning.runtime.torch.cache.memory import PlanCache
from tinybp_lightning.runtime.torch.control_loop import ControlLoop, TargetContext
from tinybp_lightning.runtime.torch.controller import Task
from tinybp_lightning.runtime.torch.measure.memory_limit import TargetMemory
from tinybp_lightning.schedule.measured import MeasuredPlan
from tinybp_lightning.schedule.planner.planner import Planner

__all__ = ["control_loop_of", "middle_bytes", "task_of"]


class _FixedHeadroom:
    """Stands in for `Headroom`: its limit changes only by what the controller decides."""

    def __init__(self, budget_bytes: int) -> None:
        self._limit = Limit(budget_bytes)

    @property
    def optimizer_bytes(self) -> int:
        return self._limit.optimizer_bytes

    def read(self) -> Limit:
        return self._limit

    def share(self, limit: Limit) -> None:
        self._limit = replace(limit, size_bytes=self._limit.size_bytes)


def task_of(budget_bytes: int) -> Task:
    """Return the task of planning a net under so many bytes of activations."""
    return Task("net", HCBConfig(activation_budget=budget_bytes).budget)


def control_loop_of(found: Chain | MeasuredPlan, budget_bytes: int) -> ControlLoop:
    """Return a control loop with so many bytes."""
    headroom = cast("Any", _FixedHeadroom(budget_bytes))
    config = HCBConfig(activation_budget=budget_bytes, plan_cache=False)
    context = TargetContext("net", config, (), TargetMemory(None), PlanCache(config))
    return ControlLoop(context, found, headroom=headroom, device=torch.device("cpu"))


def middle_bytes(chain: Chain) -> int:
    """Return a budget halfway between the smallest and the one from which no plan gets faster."""
    planner = Planner(chain)
    return (planner.smallest_bytes + planner.largest_bytes) // 2
