"""Whatever a forward does, a replayed step is the plain step: loss, gradients, buffers and generator, bit for bit.

The first step under `hcb` flies the smallest plan, the later ones the plan for the budget: both are compared.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

import tinybp_lightning as tbp
from tests.unit.runtime.training import LossOf, Recorder, Residual, assert_all_same, residual_net, train

WIDTH = 16


def batch(rows: int = 64, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(batch()).square().mean()


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = residual_net(3)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


class SharedBlock(nn.Module):
    """One block called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.block(x)
        return self.last(x)


class ViewsAndAliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            a, b = layer(x).chunk(2, dim=1)
            view = torch.cat([b.sigmoid(), a.t().contiguous().t()], dim=1)
            x = view.view(-1, 2, WIDTH // 2).transpose(1, 2).reshape(-1, WIDTH) * x[:, :1].expand(-1, WIDTH)
        return x, x[:, 3:7].t()


class InPlace(nn.Module):
    """In-place ops on activations, some on a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            y[:, :4].mul_(0.5)
            y.relu_()
            x = (x + F.dropout(y, 0.1)).add_(1.0)
            x[:, 1:3].clamp_(max=2.0)
        return x


class AccumulatesAcross(nn.Module):
    """A running sum is changed in place in every layer and read by the next, which saves a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 1.0
        for layer in self.layers:
            h += torch.tanh(layer(h * 0.5))
        return h


class WritesIntoBatch(nn.Module):
    """Changes its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        y = self.body(x.clone())
        x.add_(1.0)
        return y


class NoGradInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = residual_net(2), residual_net(2, seed=1)
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with torch.no_grad():
            target = self.scale(x).tanh()
        y = self.second(x)
        return y * target + x.detach()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        (again,) = ctx.saved_tensors  # read twice: each read unpacks
        return gradient * 3 * x * again


class Shifted(torch.autograd.Function):
    """Two results, of which one wants no gradient; keeps a number and a mask of its own on `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.mask = x > shift
        ctx.shift = shift
        ctx.mark_non_differentiable(ctx.mask)
        return torch.where(ctx.mask, x, x * shift), ctx.mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.where(ctx.mask, gradient, gradient * ctx.shift), None


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, mask = Shifted.apply(Cube.apply(layer(x).sigmoid()), 0.1)
            x = x + mask
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True)
        self.body = residual_net(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (h, c) = self.lstm(x.view(8, 8, WIDTH))
        return self.body(y) + h.sum(0)[:, None] + c.sum()


class Checkpointed(nn.Module):
    """Checkpoints some of its own blocks, one inside another too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(6)

    def inner(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        return checkpoint(self.body[4], x, use_reentrant=False) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.body):
            x = checkpoint(layer, x, use_reentrant=False) if i % 2 else layer(x)
        return checkpoint(self.inner, x, scale=0.5, use_reentrant=False)


@dataclass
class Pair(ModelOutput):
    loss: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)

    def forward(
        self, x: torch.Tensor, *, labels: torch.Tensor | None = None, options: dict[str, Any] | None = None
    ) -> Pair:
        hidden = []
        for layer in self.body:
            x = layer(x) * (options or {}).get("scale", 1.0)
            hidden.append(x)
        loss = None if labels is None else F.mse_loss(x, labels)
        return Pair(loss=loss, hidden=tuple(hidden))


class Norms(nn.Module):
    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=momentum), nn.ReLU())
            for _ in range(5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class CountsCalls(nn.Module):
    """A buffer of its own that every forward moves, read by later ops."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x)
            self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            x = x - self.average
        return x


class NewBuffer(CountsCalls):
    """As above, but the buffer is a new tensor each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x)
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
            x = x - self.average
        return x


class ClipsItsWeights(nn.Module):
    """Changes parameters that want gradients, in the middle of the forward, and reads one before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(x + layer.bias.detach().sum())
            with torch.no_grad():
                layer.weight.clamp_(-0.1, 0.1)
                layer.bias.mul_(0.9)
            x = torch.sin(layer(x) + x)
        return x


class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = residual_net(2), residual_net(2, seed=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.first(x)
        return self.second(x.float())


class RandomEverywhere(nn.Module):
    """Draws by several ops, in the first and the last block too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4, dropout=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.randn_like(x)
        for layer in self.body:
            x = layer(x) * torch.bernoulli(torch.full_like(x, 0.9))
        return F.rrelu(x, training=True) + torch.rand(WIDTH)


def tokens_loss(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(128) % 11
    return F.cross_entropy(model(tokens), tokens.roll(1))


def both_outputs(model: nn.Module) -> torch.Tensor:
    x, view = model(batch())
    return x.square().mean() + view.sum()


def autocast_loss(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(batch()).float().square().mean()


def labelled(model: nn.Module) -> torch.Tensor:
    return model(x=batch(), labels=batch(seed=2), options={"scale": 0.9}).loss


def unused(model: nn.Module) -> torch.Tensor:
    return model(batch()).hidden[1].sum()


def input_with_gradient(model: nn.Module) -> torch.Tensor:
    x = batch().requires_grad_()
    y = model((2 * x).tanh()).square().mean()
    # The gradient of the input goes into the loss that is compared.
    (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
    return y + 0 * gradient.sum() + gradient.abs().sum().detach()


def frozen_net(where: slice) -> nn.Sequential:
    net = residual_net(5)
    for layer in list(net)[where]:
        layer.requires_grad_(False)
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], LossOf]] = {
    "residual": (residual_net, square_loss),
    "tied": (TiedWeights, tokens_loss),
    "shared-block": (SharedBlock, square_loss),
    "frozen-first": (lambda: frozen_net(slice(0, 2)), square_loss),
    "frozen-last": (lambda: frozen_net(slice(3, 5)), square_loss),
    "frozen-middle": (lambda: frozen_net(slice(1, 4)), square_loss),
    "input-with-gradient": (residual_net, input_with_gradient),
    "views": (ViewsAndAliases, both_outputs),
    "in-place": (InPlace, square_loss),
    "no-grad-inside": (NoGradInside, square_loss),
    "custom-function": (CustomFunction, square_loss),
    "lstm": (Recurrent, square_loss),
    "checkpointed": (Checkpointed, square_loss),
    "keywords": (Keywords, labelled),
    "unused-output": (Keywords, unused),
    "batch-norm": (Norms, square_loss),
    "own-buffer": (CountsCalls, square_loss),
    "new-buffer": (NewBuffer, square_loss),
    "clipped-weights": (ClipsItsWeights, square_loss),
    "autocast": (residual_net, autocast_loss),
    "autocast-inside": (AutocastInside, square_loss),
    "random": (RandomEverywhere, square_loss),
    "double": (lambda: residual_net().double(), lambda m: m(batch().double()).square().mean()),
    "bfloat16": (lambda: residual_net().bfloat16(), lambda m: m(batch().bfloat16()).square().mean()),
}


@pytest.mark.parametrize("case", CASES)
def test_same_training(case: str) -> None:
    make, loss_of = CASES[case]
    plain = make()
    want = train(copy.deepcopy(plain), loss_of)
    recorder = Recorder()
    got = train(tbp.hcb(plain, activation_budget="80%", observers=[recorder]), loss_of)
    assert_all_same(got, want)
    # Not by leaving it alone: the smallest plan replays.
    assert recorder.profiles[0].replayed_blocks > 0


@pytest.mark.parametrize("make", [AccumulatesAcross, WritesIntoBatch])
def test_a_value_written_throughout_leaves_one_block(make: Callable[[], nn.Module]) -> None:
    plain = make()
    want = train(copy.deepcopy(plain), square_loss)
    recorder = Recorder()
    assert_all_same(train(tbp.hcb(plain, activation_budget="1GiB", observers=[recorder]), square_loss), want)
    assert len(recorder.plans[-1].chain.blocks) == 1
