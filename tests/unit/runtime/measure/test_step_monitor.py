"""A step that cannot be measured is trained all the same, and the next one is measured."""

import copy
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, assert_all_same, residual_net, train
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.torch.measure import allocator, step_monitor
from tinybp_lightning.runtime.torch.measure.allocator import AllocatorTrace, LostTraceError, open_trace

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


class _LosingTrace:
    """A trace that has no result."""

    def __init__(self, trace: AllocatorTrace) -> None:
        self._trace = trace
        self.mark, self.leave_out, self.abandon = trace.mark, trace.leave_out, trace.abandon

    def close(self) -> NoReturn:
        self._trace.close()
        raise LostTraceError("the history has 2 of 4 marks")


def _loss_of(net: nn.Module) -> torch.Tensor:
    return net(X).square().mean()


def test_a_step_whose_trace_is_lost_is_not_measured_and_the_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = residual_net(4, width=16, dropout=0.1)
    model, recorder = copy.deepcopy(plain), Recorder()
    tbp.hcb(model, activation_budget="60%", observers=[recorder])
    opened = list[AllocatorTrace]()

    def open_and_lose(device: torch.device, **how: Any) -> AllocatorTrace:
        opened.append(open_trace(device, **how))
        return _LosingTrace(opened[-1]) if len(opened) == 1 else opened[-1]

    monkeypatch.setattr(step_monitor, "open_trace", open_and_lose)
    with pytest.warns(HCBWarning, match="could not be measured: the history has 2 of 4 marks"):
        found = train(model, _loss_of, steps=6)
    assert_all_same(found, train(plain, _loss_of, steps=6))
    measured = [profile.measured_peak_bytes is not None for profile in recorder.profiles]
    assert measured[:3] == [False, True, True]
    assert not measured[-1]


def test_marks_that_are_gone_from_the_allocators_history_are_a_lost_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def empty(*_: int, **__: object) -> torch.Tensor:
        made.append(torch.zeros(1, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(allocator, "cuda_history_is_on", lambda: True)
    monkeypatch.setattr(allocator.torch, "empty", empty)
    # Restarted after the first mark: that one is not in it.
    monkeypatch.setattr(allocator, "cuda_history", lambda _: [(t.data_ptr(), 512) for t in made[1:]])
    trace = open_trace(torch.device("cuda", 0))
    trace.mark("forward")
    with pytest.raises(LostTraceError, match="has 1 of 2 marks"):
        trace.close()
    assert allocator.can_trace(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["activation", "memory"])
def test_what_a_step_needs_does_not_depend_on_where_gradients_are_zeroed(kind: str) -> None:
    def peaks(*, is_between: bool) -> list[int]:
        """The measured peaks of the later steps, which find gradients of the one before."""
        model, recorder = residual_net(6, width=64, dropout=0.0), Recorder()
        budget: dict[str, Any] = {"activation_budget": "70%"} if kind == "activation" else {"memory_budget": "2MiB"}
        tbp.hcb(model, **budget, observers=[recorder], plan_cache=False)
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            loss = model(x).square().mean()
            if is_between:
                model.zero_grad()
            loss.backward()
            if not is_between and kind == "activation":
                model.zero_grad()
        step_monitor.settle_pending()
        return [p.measured_peak_bytes for p in recorder.profiles if p.measured_peak_bytes is not None]

    between, after = peaks(is_between=True), peaks(is_between=False)
    gradient_bytes = sum(p.numel() * 4 for p in residual_net(6, width=64).parameters())
    assert abs(between[-1] - after[-1]) < gradient_bytes / 4


def test_a_budget_that_a_step_shows_to_be_too_small_is_refused_by_the_next_forward_not_by_the_optimizer() -> None:
    model = residual_net(4, width=16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    tbp.hcb(model, activation_budget="60%", plan_cache=False)
    outs: list[torch.Tensor] = []

    def train_on() -> None:
        for _ in range(3):
            outs.append(model(X))
            torch.stack([outs[-1] * k for k in range(1, 100)]).square().mean().backward()
            optimizer.step()

    with pytest.raises(tbp.BudgetTooSmallError, match="cannot be met") as error:
        train_on()
    frames = [entry.name for entry in error.traceback]
    assert "begin_step" in frames
    assert "step" not in frames


def test_no_trace_is_opened_inside_a_backward() -> None:
    """The reentrant checkpoint runs forwards there; the engine's thread state would take the profiler with it."""
    net = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.Tanh())))
    recorder = Recorder()
    tbp.hcb(net, activation_budget="70%", plan_cache=False, observers=[recorder])
    for _ in range(3):
        checkpoint(net, X.clone().requires_grad_(), use_reentrant=True).square().mean().backward()
    assert [profile.measured_peak_bytes for profile in recorder.profiles] == [None] * 3
    assert all(profile.replayed_blocks > 0 for profile in recorder.profiles)
