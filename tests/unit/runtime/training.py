"""Train a model plainly and under replay, and compare the two bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinybp_lightning.runtime.profile import PlanReport, StepProfile
from tinybp_lightning.runtime.torch.measure.allocator import open_trace
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

__all__ = [
    "LossOf",
    "Outcome",
    "Recorder",
    "Residual",
    "assert_all_same",
    "assert_same",
    "outcome_of",
    "peak_bytes",
    "residual_net",
    "train",
]

LossOf = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything a training step leaves behind."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    random_state: torch.Tensor


def outcome_of(model: nn.Module, loss: torch.Tensor) -> Outcome:
    """Note what a step whose backward has ended left behind."""
    return Outcome(
        loss.detach().clone(),
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        {n: b.clone() for n, b in model.named_buffers()},
        torch.get_rng_state(),
    )


def train(model: nn.Module, loss_of: LossOf, *, steps: int = 3, lr: float = 0.1) -> list[Outcome]:
    """Take `steps` of plain gradient descent, each from a seed of its own."""
    outcomes: list[Outcome] = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = loss_of(model)
        loss.backward()
        outcomes.append(outcome_of(model, loss))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(lr * p.grad)
                p.grad = None
    settle_pending()
    return outcomes


def assert_same(got: Outcome, want: Outcome) -> None:
    """Raise `AssertionError`, naming the first part, unless both are equal bit for bit."""
    assert torch.equal(got.loss, want.loss), f"loss {got.loss} instead of {want.loss}"
    assert got.gradients.keys() == want.gradients.keys()
    for name, expected in want.gradients.items():
        gradient = got.gradients[name]
        assert (gradient is None) == (expected is None), f"gradient of {name}: {gradient} instead of {expected}"
        if gradient is not None and expected is not None:
            assert torch.equal(gradient, expected), f"gradient of {name} differs by {(gradient - expected).abs().max()}"
    assert got.buffers.keys() == want.buffers.keys()
    for name, buffer in want.buffers.items():
        assert torch.equal(got.buffers[name], buffer), f"buffer {name} differs"
    assert torch.equal(got.random_state, want.random_state), "the generator ended elsewhere"


def assert_all_same(got: Sequence[Outcome], want: Sequence[Outcome]) -> None:
    """Raise `AssertionError` unless the steps are equal one by one."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


def peak_bytes(model: nn.Module, loss_of: LossOf) -> int:
    """Return the most bytes one step had alive, from the allocator's events; parameters' gradients left out."""
    for p in model.parameters():
        p.grad = None
    settle_pending()
    torch.manual_seed(0)
    trace = open_trace(torch.device("cpu"))
    trace.mark("step")
    loss = loss_of(model)
    loss.backward()
    del loss
    trace.leave_out([p.grad for p in model.parameters() if p.grad is not None])
    return max(segment.peak_bytes for segment in trace.close())


@dataclass
class Recorder:
    """An observer that remembers."""

    plans: list[PlanReport] = field(default_factory=list)
    profiles: list[StepProfile] = field(default_factory=list)

    def on_plan(self, plan: PlanReport) -> None:
        self.plans.append(plan)

    def on_replay(self, profile: StepProfile) -> None:
        self.profiles.append(profile)


class Residual(nn.Module):
    """A block with something to save and something to draw."""

    def __init__(self, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def residual_net(depth: int = 4, *, width: int = 16, seed: int = 0, **options: Any) -> nn.Sequential:
    """`depth` residual blocks, always with the same weights."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Residual(width, **options) for _ in range(depth)))
