"""Dispatch modes, and switches that turn compilers off: the step is planned all the same, and modes see it alone."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tinybp_lightning as tbp
from tests.unit.runtime.training import Outcome, assert_same, residual_net, train
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.torch import targets

WIDTH, ROWS = 16, 64
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


class Calls(TorchDispatchMode):
    """Counts operators, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] - torch annotates it in part
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.counts[str(func)] += 1
        return func(*args, **kwargs or {})


def step(model: nn.Module) -> Outcome:
    """One training step that leaves the weights as they are."""
    (outcome,) = train(model, lambda m: m(X).square().mean(), steps=1, lr=0.0)
    return outcome


def counted(model: nn.Module) -> Counter[str]:
    with Calls() as calls:
        step(model)
    return calls.counts


def num_products(counts: Counter[str]) -> int:
    return counts["aten.addmm.default"] + counts["aten.mm.default"]


def test_a_mode_sees_the_forward_and_no_probe_runs() -> None:
    plain, replayed = residual_net(), tbp.hcb(residual_net(), activation_budget="60%")
    with Calls() as of_replayed:
        replayed(X)  # the first: blocks are measured, forward and backward, before it runs
    with Calls() as of_plain:
        plain(X)
    assert num_products(of_replayed.counts) == num_products(of_plain.counts) > 0
    (target,) = targets(replayed)
    assert target.module_steps is None


def test_a_mode_after_some_steps_sees_replays_too() -> None:
    plain, replayed = residual_net(), tbp.hcb(residual_net(), activation_budget="60%")
    for _ in range(4):
        step(replayed)
    before = targets(replayed)[0].counts
    assert num_products(counted(replayed)) > num_products(counted(plain))
    assert targets(replayed)[0].counts == before


def test_flops_of_replays_are_counted() -> None:
    plain, replayed = residual_net(), tbp.hcb(residual_net(), activation_budget="60%")
    step(replayed)
    with FlopCounterMode(display=False) as of_replayed:
        step(replayed)
    with FlopCounterMode(display=False) as of_plain:
        step(plain)
    assert of_replayed.get_total_flops() > of_plain.get_total_flops()


def test_modes_are_back_after_an_error() -> None:
    replayed = tbp.hcb(residual_net(), activation_budget="60%")
    with Calls() as calls:
        with pytest.raises(RuntimeError, match="expected input with shape"):
            replayed(X[:, 1:])
        calls.counts.clear()
        torch.ones(2).add(1)
    assert calls.counts["aten.add.Tensor"] == 1
    assert_same(step(replayed), step(residual_net()))


@pytest.mark.parametrize("stance", ["force_eager", "fail_on_recompile"])
def test_a_stance_does_not_switch_the_budget_off(stance: str) -> None:
    replayed = tbp.hcb(residual_net(), activation_budget="60%")
    with torch.compiler.set_stance(stance):
        got = step(replayed)
    assert_same(got, step(residual_net()))
    assert len(targets(replayed)[0].traced_modules) == 1


def test_a_switch_for_compilers_does_not_switch_the_budget_off() -> None:
    replayed = tbp.hcb(residual_net(), activation_budget="60%")
    with torch._dynamo.config.patch(disable=True):  # pyright: ignore[reportUnknownMemberType] - as above
        got = step(replayed)
    assert_same(got, step(residual_net()))
    assert len(targets(replayed)[0].traced_modules) == 1


def test_without_the_tracer_there_are_module_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    replayed = tbp.hcb(residual_net(), activation_budget="60%")
    with pytest.warns(HCBWarning, match="TORCHDYNAMO_DISABLE=1"):
        got = step(replayed)
    assert_same(got, step(residual_net()))
    assert targets(replayed)[0].module_steps is not None


def test_a_limit_that_the_users_own_compilation_reaches_is_not_ours() -> None:
    models = [tbp.hcb(nn.Sequential(nn.Linear(WIDTH, width)), activation_budget="1GiB") for width in range(1, 13)]
    for model in models:
        step(model)
    with torch._dynamo.config.patch(recompile_limit=8):  # pyright: ignore[reportUnknownMemberType] - as above
        # Sequentials share code: after twelve of them the limit is reached at once, if that is counted together.
        compile_it: Any = torch.compile  # torch annotates it in part
        compile_it(nn.Sequential(nn.Linear(WIDTH, 20)), backend="eager")(X)
    later = tbp.hcb(nn.Sequential(nn.Linear(WIDTH, 21)), activation_budget="1GiB")
    step(later)
    assert len(targets(later)[0].traced_modules) == 1


class GivesBack(nn.Module):
    """Has a parameter and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_forward_without_operators_gives_back_its_input() -> None:
    model = tbp.hcb(GivesBack(), activation_budget="50%")
    x = X.clone().requires_grad_()
    for _ in range(2):
        y = model(x)
        assert torch.equal(y, x)
        y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))
