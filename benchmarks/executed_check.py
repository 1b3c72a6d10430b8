"""Measure whether a plan needs the memory and the time that it predicts: one recipe, one budget, on the CPU.

Two copies of the network train in lockstep, plainly and under the budget, and are compared bit for bit after every
step. When the plan has settled, its replays are timed, and `recipes.measure`, which shares no code with the package,
measures one more step from allocator events. The prediction that counts is the one that the active plan made before its
own first step: after that step the package corrects the prediction by the measurement.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.listener import Listener
from recipes.budget import budget_bytes
from recipes.config import CompareConfig, compose_config
from recipes.data import Batch, make_batches
from recipes.measure import record_memory
from recipes.models import Workload, build_workload, make_optimizer
from recipes.modes import Mode
from recipes.peers import apply_mode
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.runtime.profile import PlanReport, StepProfile
from tinybp_lightning.runtime.torch.explanation import Explanation, explain

__all__ = ["MINIMUM", "BelowMinimum", "Execution", "execute", "first_difference", "first_told"]

MINIMUM = "min"
"""Stands for the smallest budget that can be met, as the package reports it."""

NUM_TIMED = 7
_DEVICE = torch.device("cpu")
_NUM_WARMUP = 2
# A plan is traced and repaired for at most five steps, after the first.
_MAX_STEPS = 6 + NUM_TIMED
_MAX_RAISES = 6


@dataclass(frozen=True, slots=True)
class Execution:
    """One recipe trained under one budget.

    Peaks are bytes of activations in a step, without parameters' gradients. `predicted_peak_bytes` and
    `predicted_recompute_s` are the active plan's, from before its first step. `replays_s` and `steps_s` are the settled
    steps', `plain_steps_s` those of the plain copy. `first_difference` from plain training is empty where the losses
    and gradients of all `num_steps` were equal. `load` is the machine's load average, on `num_cores`.
    """

    model: str
    budget: str
    budget_bytes: int
    plain_peak_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    predicted_recompute_s: float
    predicted_step_s: float
    replays_s: tuple[float, ...]
    steps_s: tuple[float, ...]
    plain_steps_s: tuple[float, ...]
    num_blocks: int
    num_kept: int
    num_steps: int
    first_difference: str
    load: float
    num_cores: int


@dataclass(frozen=True, slots=True)
class BelowMinimum:
    """No plan meets the budget: the smallest budget that can be met is `smallest_bytes`."""

    model: str
    budget: str
    budget_bytes: int
    plain_peak_bytes: int
    smallest_bytes: int


def execute(model: str, size: str, budget: str) -> Execution | BelowMinimum:
    """Train the recipe `model` at `size` plainly and under `budget`, on the CPU, and return how they compare.

    **Arguments:** `budget`: a share of plain training's measured activation peak such as `"30%"`, bytes, or `"min"`.

    **Raises:** `RuntimeError` if the model is not one target or its plan does not settle; errors of building and of
    training.
    """
    config = compose_config([f"model={model}", f"size={size}", "device=cpu"])
    batches = make_batches(config.model.name, config.shape, num_batches=_MAX_STEPS + 1, seed=config.seed)
    plain_peak_bytes = _plain_peak(config, batches)
    if budget != MINIMUM:
        allowed_bytes = budget_bytes(budget, naive_peak_bytes=plain_peak_bytes)
        try:
            return _execute(config, batches, budget, allowed_bytes, plain_peak_bytes)
        except BudgetTooSmallError as error:
            return BelowMinimum(model, budget, allowed_bytes, plain_peak_bytes, error.smallest_bytes)
    allowed_bytes = 1
    for _ in range(_MAX_RAISES):
        try:
            return _execute(config, batches, budget, allowed_bytes, plain_peak_bytes)
        except BudgetTooSmallError as error:  # the first step may show that a little more is needed
            allowed_bytes = max(error.smallest_bytes, allowed_bytes + 1)
    raise RuntimeError(
        f"`{model}`: {allowed_bytes} bytes were reported as the smallest budget and still cannot be met."
    )


def _plain_peak(config: CompareConfig, batches: Sequence[Batch]) -> int:
    trainee = _Trainee(config)
    for batch in batches[:_NUM_WARMUP]:
        trainee.step(batch)
    return trainee.measured_peak_bytes(batches[_NUM_WARMUP])


class _Trainee:
    """Trains one copy of the recipe's network."""

    def __init__(self, config: CompareConfig) -> None:
        self.workload: Workload = build_workload(config.model, config.shape, seed=config.seed, device=_DEVICE)
        self._optimizer = make_optimizer(config.model, self.workload.model)

    def step(self, batch: Batch) -> tuple[float, torch.Tensor]:
        """Run one optimizer step; return the seconds of its forward and backward, and its loss. Gradients stay."""
        self._optimizer.zero_grad(set_to_none=True)
        begin_s = time.perf_counter()
        loss = self.workload.loss(batch)
        loss.backward()
        wall_s = time.perf_counter() - begin_s
        self._optimizer.step()
        return wall_s, loss.detach()

    def measured_peak_bytes(self, batch: Batch) -> int:
        """Return the activation peak of a step, without an optimizer step."""

        def step() -> None:
            self.workload.loss(batch).backward()

        self._optimizer.zero_grad(set_to_none=True)
        return record_memory(step, self.workload.model).memory.activation_peak_bytes


def _execute(
    config: CompareConfig, batches: Sequence[Batch], budget: str, allowed_bytes: int, plain_peak_bytes: int
) -> Execution:
    plain, ours, listener = _Trainee(config), _Trainee(config), Listener()
    apply_mode(
        Mode.hcb_eager,
        ours.workload,
        budget=f"{allowed_bytes}B",
        naive_peak_bytes=plain_peak_bytes,
        observers=(listener,),
    )
    settled: list[StepProfile] = []
    plain_steps_s: list[float] = []
    different = ""
    num_steps = 0
    while len(settled) < NUM_TIMED:
        if num_steps == _MAX_STEPS:
            raise RuntimeError(f"`{config.model.name.value}`: the plan has not settled after {num_steps} steps.")
        batch = batches[num_steps]
        num_steps += 1
        _, loss = ours.step(batch)
        plain_s, plain_loss = plain.step(batch)
        told = first_difference(plain_loss, plain.workload.model, loss, ours.workload.model)
        different = different or (told and f"step {num_steps}: {told}")
        if listener.profiles[-1].measured_peak_bytes is None:
            settled.append(listener.profiles[-1])
            plain_steps_s.append(plain_s)
    executed = first_told(listener.plans, explain(ours.workload.model))
    return Execution(
        model=config.model.name.value,
        budget=budget,
        budget_bytes=allowed_bytes,
        plain_peak_bytes=plain_peak_bytes,
        predicted_peak_bytes=executed.predicted_peak_bytes,
        measured_peak_bytes=ours.measured_peak_bytes(batches[num_steps]),
        predicted_recompute_s=executed.predicted_recompute_s,
        predicted_step_s=executed.predicted_step_s,
        replays_s=tuple(profile.replay_s for profile in settled),
        steps_s=tuple(profile.step_s for profile in settled),
        plain_steps_s=tuple(plain_steps_s),
        num_blocks=len(executed.chain.blocks),
        num_kept=executed.num_kept,
        num_steps=num_steps,
        first_difference=different,
        load=os.getloadavg()[0],
        num_cores=os.cpu_count() or 1,
    )


def first_told(told: Sequence[PlanReport], explained: Explanation) -> PlanReport:
    """Return the report of the active plan from when it was first chosen."""
    if len(explained.counts) != 1:
        raise RuntimeError(
            f"{len(explained.counts)} modules have plans of their own: expected the model to be one target."
        )
    in_force = explained.plans[-1]  # a model that changes a setting in its first step is traced twice
    return next(plan for plan in told if plan.schedule == in_force.schedule)


def first_difference(plain_loss: torch.Tensor, plain: nn.Module, loss: torch.Tensor, ours: nn.Module) -> str:
    """Name the first of the loss and the parameters' gradients whose bits differ; empty where none does."""
    if not torch.equal(plain_loss, loss):
        return f"the loss is {loss.item()}, plainly {plain_loss.item()}"
    found = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        gradients = parameter.grad, found[name].grad
        if (gradients[0] is None) != (gradients[1] is None):
            return f"`{name}` has a gradient in one of the two only"
        if gradients[0] is not None and gradients[1] is not None and not torch.equal(gradients[0], gradients[1]):
            return f"the gradient of `{name}` differs"
    return ""
