"""Train two copies of a network in lockstep, plainly and under a budget, and compare everything they leave behind."""

import copy
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tinybp_lightning as tbp
from tests.conformance.nets import DEVICE
from tinybp_lightning.runtime.profile import PlanReport, StepProfile

Step = Callable[[nn.Module, int], Sequence[Tensor]]
"""Takes one training step, from forward to the last backward; returns its losses."""

_BUDGETS = ("50%", "70%", "85%")


@dataclass(slots=True)
class Recorder:
    """An observer that counts steps, and the blocks that they replayed."""

    num_steps: int = 0
    num_replayed: int = 0

    def on_plan(self, plan: PlanReport) -> None: ...

    def on_replay(self, profile: StepProfile) -> None:
        self.num_steps += 1
        self.num_replayed += profile.replayed_blocks


@dataclass(frozen=True, slots=True)
class Row:
    """What is trained, and what its comparison asks for.

    `kept`: what a warning must say, if parts must be kept; without it, none may be given, but that a module is trained
    by its blocks; `replays`: whether blocks must be replayed, of every target; `parts`: the modules that get a budget,
    by their names in what `make` returns.
    """

    make: Callable[[], nn.Module]
    step: Step
    steps: int
    kept: str | None
    replays: bool
    parts: Sequence[str]


def assert_same_training(
    make: Callable[[], nn.Module],
    step: Step,
    *,
    steps: int = 4,
    kept: str | None = None,
    replays: bool = True,
    parts: Sequence[str] = ("",),
    at_named_size: bool = False,
) -> None:
    """Raise `AssertionError` at the first loss, gradient, buffer, parameter or generator that differs.

    **Arguments:** those of `Row`; `at_named_size`: where the largest share is refused, train at the size that the error
    says is enough.
    """
    row = Row(make, step, steps, kept, replays, parts)
    for budget in _BUDGETS[-1:] if at_named_size else _BUDGETS:
        try:
            _compare(row, budget)
            break
        except tbp.BudgetTooSmallError as error:  # it depends on the loop how much of a step no plan can change
            if at_named_size:
                _compare(row, error.smallest_bytes)
            elif budget == _BUDGETS[-1]:
                raise


def _compare(row: Row, budget: str | int) -> None:
    torch.manual_seed(3)
    plain = row.make().to(DEVICE)
    ours = copy.deepcopy(plain)
    recorders = {part: Recorder() for part in row.parts}
    for part, recorder in recorders.items():
        tbp.hcb(ours.get_submodule(part), activation_budget=budget, plan_cache=False, observers=[recorder])
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (plain, ours)]
    _seed(4)
    states = [_generators(), _generators()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tbp.HCBWarning)
        for i in range(row.steps):
            losses: list[Sequence[Tensor]] = []
            for k, (module, optimizer) in enumerate(zip((plain, ours), optimizers, strict=True)):
                _set_generators(states[k])
                optimizer.zero_grad()
                losses.append(row.step(module, i))
                states[k] = _generators()
            _assert_equal(i, "loss", enumerate(losses[0]), enumerate(losses[1]))
            gradients = [[(n, p.grad) for n, p in m.named_parameters()] for m in (plain, ours)]
            _assert_equal(i, "gradient", *gradients)
            _assert_equal(i, "buffer", plain.named_buffers(), ours.named_buffers())
            assert _same_generators(*states), f"step {i}: a generator stands elsewhere"
            for optimizer in optimizers:
                optimizer.step()
        _assert_equal(row.steps, "parameter", plain.named_parameters(), ours.named_parameters())
    said = [str(w.message) for w in caught]
    if row.kept is not None:
        assert any(re.search(row.kept, text) for text in said), said
    else:
        assert [text for text in said if "cannot be traced as one graph" not in text] == []
    replayed = {part: r.num_replayed for part, r in recorders.items() if r.num_steps}
    assert not row.replays or (replayed and all(replayed.values())), (
        f"not replayed, so not compared: {replayed}, {said}"
    )


def _assert_equal(step: int, what: str, wanted: Any, got: Any) -> None:
    for (name, want), (_, have) in zip(wanted, got, strict=True):
        same = (want is None and have is None) or (want is not None and have is not None and torch.equal(want, have))
        assert same, f"step {step}: {what} {name} differs"


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is what users draw from


def _generators() -> Any:
    cuda = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), cuda  # noqa: NPY002


def _set_generators(states: Any) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    if DEVICE.type == "cuda":
        torch.cuda.set_rng_state(states[3])


def _same_generators(a: Any, b: Any) -> bool:
    is_same_numpy = a[2][2] == b[2][2] and np.array_equal(a[2][1], b[2][1])
    return torch.equal(a[0], b[0]) and a[1] == b[1] and is_same_numpy and torch.equal(a[3], b[3])
