"""Are gradients of compiled blocks as near to float64 as those of plain compiled training?

The error of a way to train is the distance of all gradients, taken as one vector, from those that float64 gives,
relative to their length. It may be larger than plain `torch.compile`'s by `TOLERANCE` at most, about one rounding of
float32 (2^-23), whatever is replayed: another cut lets Inductor fuse, and so round, other sums.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder

TOLERANCE = 2.0**-23


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer() -> nn.Module:
    return nn.Sequential(*(Layer(32) for _ in range(4)), nn.LayerNorm(32), nn.Linear(32, 50))


class Stage(nn.Module):
    """A residual convolution with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def conv_net() -> nn.Module:
    return nn.Sequential(*(Stage() for _ in range(6)), nn.Flatten(), nn.Linear(16 * 32 * 32, 10))


def gradients_of(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """All gradients of the third step, as one vector in float64: by then a plan for the budget is flown."""
    for _ in range(3):
        model.zero_grad()
        call(x).square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def errors(make: Callable[[], nn.Module], x: torch.Tensor, budget: str) -> tuple[float, float, int]:
    """Return the error of compiled blocks under `budget`, that of plain `torch.compile`, and how much was replayed."""
    torch.manual_seed(0)
    model = make()
    exact, plain, ours = (copy.deepcopy(model) for _ in range(3))
    want = gradients_of(exact.double(), exact, x.double())
    compiled = gradients_of(plain, torch.compile(plain), x)
    recorder = Recorder()
    tbp.hcb(ours, activation_budget=budget, executor="inductor", observers=[recorder])
    got = gradients_of(ours, ours, x)
    length = want.norm()
    replayed = sum(p.replayed_blocks for p in recorder.profiles)
    return float((got - want).norm() / length), float((compiled - want).norm() / length), replayed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("make", "shape", "budget"), [(transformer, (8, 64, 32), "50%"), (conv_net, (8, 16, 32, 32), "60%")]
)
def test_gradients_are_as_near_to_float64_as_plain_compiled_training(
    make: Callable[[], nn.Module], shape: tuple[int, ...], budget: str
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, plain, num_replayed = errors(make, x, budget)
    assert num_replayed > 0
    assert 0 < ours <= plain + TOLERANCE
