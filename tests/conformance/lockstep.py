"""Train two copies of a network in lockstep, plainly and under a budget, and compare everything they leave behind."""

import copy
import random
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tinybp_lightning as tbp
from tests.conformance.nets import DEVICE
from tinybp_lightning.runtime.torch.api import targets

Step = Callable[[nn.Module, int], Sequence[Tensor]]
"""Takes one training step, from forward to the last backward; returns its losses."""

_BUDGETS = ("50%", "70%", "85%")


def assert_same_training(
    make: Callable[[], nn.Module], step: Step, *, steps: int = 4, kept: str | None = None, replays: bool = True
) -> None:
    """Raise `AssertionError` at the first loss, gradient, buffer, parameter or generator that differs.

    **Arguments:** `kept`: what a warning must say, if parts must be kept; `replays`: whether blocks must be replayed.
    """
    for budget in _BUDGETS:
        try:
            _compare(make, step, budget, steps, kept, replays)
            break
        except tbp.BudgetTooSmallError:  # it depends on the loop how much of a step no plan can change
            if budget == _BUDGETS[-1]:
                raise


def _compare(make: Callable[[], nn.Module], step: Step, budget: str, steps: int, kept: Any, replays: bool) -> None:
    torch.manual_seed(3)
    plain = make().to(DEVICE)
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget=budget, plan_cache=False)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (plain, ours)]
    _seed(4)
    states = [_generators(), _generators()]
    replayed = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tbp.HCBWarning)
        for i in range(steps):
            losses: list[Sequence[Tensor]] = []
            for k, (module, optimizer) in enumerate(zip((plain, ours), optimizers, strict=True)):
                _set_generators(states[k])
                optimizer.zero_grad()
                losses.append(step(module, i))
                states[k] = _generators()
            _assert_equal(i, "loss", enumerate(losses[0]), enumerate(losses[1]))
            gradients = [[(n, p.grad) for n, p in m.named_parameters()] for m in (plain, ours)]
            _assert_equal(i, "gradient", *gradients)
            _assert_equal(i, "buffer", plain.named_buffers(), ours.named_buffers())
            assert _same_generators(*states), f"step {i}: a generator stands elsewhere"
            for optimizer in optimizers:
                optimizer.step()
            replayed += sum(t.profile.replayed_blocks for t in targets(ours) if t.profile is not None)
        _assert_equal(steps, "parameter", plain.named_parameters(), ours.named_parameters())
    said = [str(w.message) for w in caught]
    if kept is not None:
        assert any(re.search(kept, text) for text in said), said
    assert not replays or replayed > 0, f"nothing was replayed, so nothing was compared: {said}"


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
