"""Several calls before one backward: the same training, and all of them together within the budget."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinybp_lightning as tbp
from tests.unit.runtime.layered import Broken, Net
from tests.unit.runtime.training import Recorder, Residual
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.runtime.torch import targets
from tinybp_lightning.runtime.torch.measure.allocator import open_trace
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

pytestmark = pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")

WIDTH, DEPTH = 32, 4
KINDS: dict[str, Callable[[list[Residual]], nn.Module]] = {"traced": Net, "by blocks": Broken}
LossOf = Callable[[nn.Module, int], Tensor]


def made(kind: str, depth: int = DEPTH) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]([Residual(WIDTH, 0.1) for _ in range(depth)])


def batch(step: int, rows: int = 64) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))


def siamese(net: nn.Module, step: int) -> Tensor:
    return (net(batch(step)) - net(batch(step + 50))).square().mean()


def crops(net: nn.Module, step: int) -> Tensor:
    return torch.stack([net(batch(step + k, rows)).square().mean() for k, rows in enumerate((64, 64, 32, 32))]).sum()


def chunks(net: nn.Module, step: int) -> Tensor:
    """One call's result is the next one's input, seven times: more calls than are planned before they are known."""
    x = batch(step)
    for _ in range(7):
        x = net(x)
    return x.square().mean()


def one_to_three(net: nn.Module, step: int) -> Tensor:
    return torch.stack([net(batch(step + k)).square().mean() for k in range(1 + step % 3)]).sum()


def one_call(net: nn.Module, step: int) -> Tensor:
    return net(batch(step)).square().mean()


def plain_bytes(net: nn.Module, loss_of: LossOf, step: int) -> int:
    """Return the peak of one plain step, without gradients of parameters."""
    net.zero_grad()
    settle_pending()
    trace = open_trace(torch.device("cpu"))
    trace.mark("step")
    loss_of(net, step).backward()
    trace.leave_out([p.grad for p in net.parameters() if p.grad is not None])
    return max(segment.peak_bytes for segment in trace.close())


def train_both(plain: nn.Module, ours: nn.Module, loss_of: LossOf, steps: int) -> None:
    """Train both and raise `AssertionError` at the first difference."""
    for step in range(steps):
        losses: list[Tensor] = []
        for net in (plain, ours):
            torch.manual_seed(step)
            net.zero_grad()
            losses.append(loss_of(net, step))
            losses[-1].backward()
        assert torch.equal(*losses), f"step {step}: the loss differs"
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), f"step {step}: {name}"  # noqa: PT018
    settle_pending()


@pytest.mark.parametrize(
    ("loss_of", "budget"), [(siamese, "45%"), (siamese, "80%"), (crops, "45%"), (chunks, "60%"), (one_to_three, "60%")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_all_calls_share_the_budget(kind: str, loss_of: LossOf, budget: str) -> None:
    plain, recorder = made(kind), Recorder()
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget=budget, plan_cache=False, observers=[recorder])
    allowed_bytes = max(plain_bytes(plain, loss_of, step) for step in range(3)) * float(budget[:-1]) / 100
    train_both(plain, ours, loss_of, steps=16)
    peaks = [p.measured_peak_bytes for p in recorder.profiles if p.measured_peak_bytes is not None]
    assert 0.7 * allowed_bytes < peaks[-1] <= 1.02 * allowed_bytes
    assert sum(profile.replayed_blocks for profile in recorder.profiles[-3:]) > 0
    assert recorder.profiles[-1].measured_peak_bytes is None, "it has settled"


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_one_call_has_the_whole_budget_again_when_longer_ones_are_over(kind: str) -> None:
    plain, recorder = made(kind), Recorder()
    budget_bytes = int(1.2 * _smallest(kind, siamese))
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget=budget_bytes, plan_cache=False, observers=[recorder])
    before = _replayed(plain, ours, recorder, one_call)
    assert _replayed(plain, ours, recorder, siamese) > before
    train_both(plain, ours, one_call, steps=17)
    if kind == "traced":  # module steps plan for the largest step that may come
        assert _replayed(plain, ours, recorder, one_call) == before


def _replayed(plain: nn.Module, ours: nn.Module, recorder: Recorder, loss_of: LossOf) -> int:
    train_both(plain, ours, loss_of, steps=6)
    return recorder.profiles[-1].replayed_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_do_not_fit_together_are_refused(kind: str) -> None:
    ours = tbp.hcb(made(kind), activation_budget=_smallest(kind, one_call), plan_cache=False)
    with pytest.raises(BudgetTooSmallError, match="cannot be met"):
        train_both(made(kind), ours, siamese, steps=4)


def _smallest(kind: str, loss_of: LossOf) -> int:
    ours = tbp.hcb(made(kind), activation_budget="90%", plan_cache=False)
    train_both(made(kind), ours, loss_of, steps=4)
    return targets(ours)[0].smallest_bytes


def test_a_graph_that_nobody_used_does_not_count() -> None:
    plain, recorder = made("traced"), Recorder()
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget="60%", plan_cache=False, observers=[recorder])

    def with_a_look(net: nn.Module, step: int) -> Tensor:
        assert net(batch(step + 9)).requires_grad  # its graph is gone at once
        return one_call(net, step)

    train_both(plain, ours, with_a_look, steps=5)
    assert len(recorder.plans[-1].chain.blocks) == len(recorder.plans[0].chain.blocks)


def test_a_call_that_fails_leaves_nothing_of_its_step() -> None:
    plain, recorder = made("traced"), Recorder()
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget="60%", plan_cache=False, observers=[recorder])

    def broken_second(net: nn.Module, step: int) -> Tensor:
        first = net(batch(step))
        with pytest.raises(RuntimeError):
            net(torch.randn(3, WIDTH + 1))
        return first.square().mean()

    train_both(plain, ours, broken_second, steps=5)
    train_both(plain, ours, one_call, steps=3)


def test_generator_and_discriminator_share_one_target() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.judge = made("traced", 3), made("traced", 3)

        def forward(self, x: Tensor, *, fool: bool) -> Tensor:
            images = self.make(x)
            return self.judge(images if fool else images.detach()).mean()

    def loss_of(net: nn.Module, step: int) -> Tensor:
        noise: Any = batch(step)
        if step % 2:
            return net(noise, fool=True)
        return net(noise, fool=False) - net(batch(step + 30), fool=True) * 0.1

    torch.manual_seed(0)
    plain = Pair()
    train_both(plain, tbp.hcb(copy.deepcopy(plain), activation_budget="70%", plan_cache=False), loss_of, steps=8)
