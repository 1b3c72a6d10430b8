"""The same training in every loop that users write: what happens between forward, backward and step."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.conformance.lockstep import Step, assert_same_training
from tests.conformance.nets import NETS, ROWS, WIDTH, batch


def loss_of(module: nn.Module, step: int, rows: int = ROWS) -> Tensor:
    return module(batch(step, rows)).square().mean()


def plain(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    loss.backward()
    return [loss]


def zero_grad_in_between(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    module.zero_grad()
    loss.backward()
    return [loss]


def accumulation(module: nn.Module, step: int) -> Sequence[Tensor]:
    return [plain(module, 10 * step + i)[0] for i in range(3)]


def two_calls_before_backward(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step) + loss_of(module, step + 50)
    loss.backward()
    return [loss]


def two_sizes(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step, ROWS if step % 2 else 2 * ROWS)
    loss.backward()
    return [loss]


def retain_graph_for_each_task(module: nn.Module, step: int) -> Sequence[Tensor]:
    out = module(batch(step))
    losses = [out.square().mean(), out.abs().mean()]
    for loss in losses:
        loss.backward(retain_graph=True)
    return losses


def one_gradient_asked_for_first(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    weight = module.get_parameter("layers.1.up.weight")
    (asked,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.backward()
    return [loss, asked]


def eval_pass_in_between(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    module.eval()
    with torch.no_grad():
        validation = loss_of(module, step + 70)
    loss.backward()
    module.train()
    return [loss, validation]


def trained_in_eval_mode(module: nn.Module, step: int) -> Sequence[Tensor]:
    module.eval()
    loss = loss_of(module, step)
    loss.backward()
    module.train()
    return [loss]


def hooks_taken_off(module: nn.Module, step: int) -> Sequence[Tensor]:
    def steer(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out * 1.5 + 0.1

    handles = [module.get_submodule(f"layers.{i}.up").register_forward_hook(steer) for i in range(4)]
    loss = loss_of(module, step)
    for handle in handles:
        handle.remove()
    loss.backward()
    return [loss]


def hooks_put_on(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    layers = [module.get_submodule(f"layers.{i}.up") for i in range(4)]
    handles = [layer.register_forward_hook(lambda _, __, out: out * 2) for layer in layers]
    loss.backward()
    for handle in handles:
        handle.remove()
    return [loss]


def hooks_that_look(module: nn.Module, step: int) -> Sequence[Tensor]:
    seen: list[Tensor] = []
    layers = [module.get_submodule(f"layers.{i}.up") for i in range(4)]
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out.detach().sum())) for layer in layers]
    loss = loss_of(module, step)
    loss.backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == 4, "a hook fired in a replay"
    return [loss, *seen]


def other_weights(module: nn.Module, step: int) -> Sequence[Tensor]:
    weights = {name: p * 1.01 for name, p in module.named_parameters()}
    loss = functional_call(module, weights, (batch(step),)).square().mean()
    loss.backward()
    return [loss]


def changed_batch(module: nn.Module, step: int) -> Sequence[Tensor]:
    """The batch's buffer is filled anew before backward; plain training saves a copy of nothing of it."""
    x = batch(step)
    loss = module(x + 0).square().mean()
    x.zero_()
    loss.backward()
    return [loss]


LOOPS: dict[str, Step] = {
    f.__name__: f
    for f in (
        plain,
        zero_grad_in_between,
        accumulation,
        two_calls_before_backward,
        two_sizes,
        retain_graph_for_each_task,
        one_gradient_asked_for_first,
        eval_pass_in_between,
        trained_in_eval_mode,
        hooks_taken_off,
        hooks_put_on,
        hooks_that_look,
        other_weights,
        changed_batch,
    )
}


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("net", NETS)
def test_same_training(net: str, loop: str) -> None:
    assert_same_training(NETS[net], LOOPS[loop])


def around(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Step:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        with context():
            return plain(module, step)

    return step


@pytest.mark.parametrize("net", NETS)
def test_inside_a_checkpoint_it_is_plain_and_says_so(net: str) -> None:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        out = torch.utils.checkpoint.checkpoint(module, batch(step), use_reentrant=False)
        loss = out.square().mean()
        loss.backward()
        return [loss]

    assert_same_training(NETS[net], step, kept="`torch.utils.checkpoint` surrounds the call", replays=False)


@pytest.mark.parametrize("net", ["traced"])  # a value cannot be looked at inside vmap
def test_inside_a_transform_it_is_plain_and_says_so(net: str) -> None:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        module.eval()  # statistics cannot be changed inside a transform
        weights = {name: p.detach() for name, p in module.named_parameters()}
        loss_and_gradients = torch.func.grad_and_value(
            lambda w: functional_call(module, w, (batch(step),)).square().mean()
        )
        gradients, loss = loss_and_gradients(weights)
        for name, p in module.named_parameters():
            p.grad = gradients[name]
        module.train()
        return [loss]

    assert_same_training(NETS[net], step, kept="`torch.func` transform", replays=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_is_plain_and_says_so() -> None:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        with torch.autograd.forward_ad.dual_level():
            x = batch(step)
            out = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            primal, tangent = torch.autograd.forward_ad.unpack_dual(out)
            loss = primal.square().mean() + tangent.square().mean()
        loss.backward()
        return [loss]

    def without_attention() -> nn.Module:
        return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())))

    assert_same_training(without_attention, step, kept="forward-mode AD", replays=False)
