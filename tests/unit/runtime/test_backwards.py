"""However a backward is run, gradients are plain autograd's, bit for bit."""

import copy

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import LossOf, Recorder, assert_same, outcome_of, residual_net
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

WIDTH = 16


def batch(rows: int = 64, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def retain_graph(model: nn.Module) -> torch.Tensor:
    loss = model(batch()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def functional(model: nn.Module) -> torch.Tensor:
    loss = model(batch()).square().mean()
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = g
    return loss


def some_parameters_first(model: nn.Module) -> torch.Tensor:
    """The last block's gradients, then the first's, then all."""
    loss = model(batch()).square().mean()
    last, first = model[-1].up.weight, model[0].up.weight
    last.grad = torch.autograd.grad(loss, last, retain_graph=True)[0]
    first.grad = torch.autograd.grad(loss, first, retain_graph=True)[0]
    loss.backward()
    return loss


def double_backward(model: nn.Module) -> torch.Tensor:
    x = batch().requires_grad_()
    loss = model(x).square().mean()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + gradient.square().sum()
    total.backward()
    return total


def penalty_on_parameters(model: nn.Module) -> torch.Tensor:
    loss = model(batch()).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    total = loss + sum(g.square().sum() for g in gradients)
    total.backward()
    return total


def partial(model: nn.Module) -> torch.Tensor:
    loss = model(batch())[:3].square().mean()
    loss.backward(inputs=[model[0].up.weight, model[1].down.bias])
    return loss


def several_losses(model: nn.Module) -> torch.Tensor:
    y = model(batch())
    one, two = y[:, :8].square().mean(), y.abs().mean()
    one.backward(retain_graph=True)
    two.backward()
    return one + two


def two_forwards_one_backward(model: nn.Module) -> torch.Tensor:
    one = model(batch()).square().mean()
    two = model(batch(seed=2)).abs().mean()
    loss = one + two
    loss.backward()
    return loss


def two_forwards_backwards_in_order(model: nn.Module) -> torch.Tensor:
    one = model(batch()).square().mean()
    two = model(batch(seed=2)).abs().mean()
    one.backward()
    two.backward()
    return one + two


def two_forwards_backwards_reversed(model: nn.Module) -> torch.Tensor:
    one = model(batch()).square().mean()
    two = model(batch(seed=2)).abs().mean()
    two.backward()
    one.backward()
    return one + two


def model_of_its_own_output(model: nn.Module) -> torch.Tensor:
    loss = model(model(batch())).square().mean()
    loss.backward()
    return loss


def forward_without_backward(model: nn.Module) -> torch.Tensor:
    model(batch(seed=3))
    loss = model(batch()).square().mean()
    loss.backward()
    return loss


def accumulation(model: nn.Module) -> torch.Tensor:
    losses = []
    for seed in range(3):
        losses.append(model(batch(seed=seed)).square().mean())
        losses[-1].backward()
    return torch.stack([loss.detach() for loss in losses])


def evaluation_between(model: nn.Module) -> torch.Tensor:
    y = model(batch())
    model.eval()
    seen = model(batch(seed=4)).mean()
    with torch.no_grad():
        model.train()
        seen = seen + model(batch(seed=5)).mean()
    loss = y.square().mean() + seen.detach()
    loss.backward()
    return loss


def output_hook(model: nn.Module) -> torch.Tensor:
    y = model(batch())
    y.register_hook(lambda g: g * 2)
    loss = y.square().mean()
    loss.backward()
    return loss


def hook_that_draws(model: nn.Module) -> torch.Tensor:
    """Random numbers drawn in backward, between the replays, come from the user's generator."""
    y = model(batch())
    handles = [p.register_hook(lambda g: g + torch.rand_like(g)) for p in model.parameters()]
    loss = y.square().mean()
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss


def last_partial_batch(model: nn.Module) -> torch.Tensor:
    for rows in (64, 24, 64):
        loss = model(batch(rows)).square().mean()
        loss.backward()
    return loss


def anomaly_mode(model: nn.Module) -> torch.Tensor:
    loss = model(batch()).square().mean()
    with torch.autograd.set_detect_anomaly(mode=True, check_nan=False):
        loss.backward()
    return loss


# Each with the budget of the later steps: a share, or bytes where the code around the model needs memory of its own.
WAYS: list[tuple[LossOf, int | str]] = [
    (retain_graph, "60%"),
    (functional, "60%"),
    (some_parameters_first, "60%"),
    (double_backward, 300_000),
    (penalty_on_parameters, 350_000),
    (partial, "60%"),
    (several_losses, "60%"),
    (two_forwards_one_backward, "60%"),
    (two_forwards_backwards_in_order, "60%"),
    (two_forwards_backwards_reversed, "60%"),
    (model_of_its_own_output, 200_000),
    (forward_without_backward, "60%"),
    (accumulation, "60%"),
    (evaluation_between, "80%"),
    (output_hook, "60%"),
    (hook_that_draws, "60%"),
    (last_partial_batch, 100_000),
    (anomaly_mode, "60%"),
]


def steps(model: nn.Module, way: LossOf, *, num: int = 3) -> list[object]:
    outcomes = []
    for step in range(num):
        torch.manual_seed(step)
        outcomes.append(outcome_of(model, way(model)))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad)
                p.grad = None
    settle_pending()
    return outcomes


@pytest.mark.parametrize(("way", "budget"), WAYS, ids=lambda value: getattr(value, "__name__", None))
def test_same_gradients(way: LossOf, budget: int | str) -> None:
    plain = residual_net(5)
    want = steps(copy.deepcopy(plain), way)
    recorder = Recorder()
    got = steps(tbp.hcb(plain, activation_budget=budget, observers=[recorder]), way)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)
    assert recorder.profiles[0].replayed_blocks > 0
