"""A step that is interrupted anywhere leaves the model usable, and two threads train two models at once."""

import contextlib
import copy
import gc
import random
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.variables import torch as dynamo_torch
from torch._dynamo.variables.torch import tracing_state_functions

import tinybp_lightning as tbp
from tests.unit.runtime import layered
from tests.unit.runtime.layered import Broken, Net
from tests.unit.runtime.training import Outcome, Residual, assert_same, outcome_of, train
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.torch import targets, traced_module
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

WIDTH = 16
X = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(1))
NUM_POINTS = 25


class Block(nn.Module):
    """Something to draw, something to count, and a change of precision."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual(WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.body(x)
        with torch.no_grad():
            scale = x.float().abs().mean()
        return self.norm(x.float()) / scale


def made(kind: type[Net]) -> nn.Module:
    torch.manual_seed(0)
    return kind(Block() for _ in range(5))


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def step(model: nn.Module) -> Outcome:
    torch.manual_seed(3)
    loss = square_loss(model)
    loss.backward()
    return outcome_of(model, loss)


class Interrupter:
    """Counts the lines of the engine and of the user's code that run, and raises at one of them."""

    def __init__(self, at: int | None) -> None:
        self.count = 0
        self._at = at

    def __enter__(self) -> "Interrupter":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        is_ours = "tinybp_lightning/runtime/torch/" in name
        if not (is_ours or "torch/nn/" in name or "eval_with_key" in name or name in (__file__, layered.__file__)):
            return None
        if event == "line":
            self.count += 1
            if self.count == self._at:
                raise KeyboardInterrupt
        return self._trace


def hooks_left() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("kind", [Net, Broken])
def test_interrupted_anywhere(kind: type[Net]) -> None:
    model = tbp.hcb(made(kind), activation_budget="75%")
    train(model, square_loss, steps=6, lr=0.0)
    start = copy.deepcopy(model.state_dict())
    plain = made(kind)
    plain.load_state_dict(start)
    want = step(plain)
    model.zero_grad()
    with Interrupter(None) as counted:
        assert_same(step(model), want)
    points = sorted(random.Random(5).sample(range(1, counted.count), NUM_POINTS))
    num_interrupted = 0
    for at in points:
        model.zero_grad()
        model.load_state_dict(start)
        try:
            with Interrupter(at):
                step(model)
        except KeyboardInterrupt:
            num_interrupted += 1
        assert hooks_left() is None, at
        assert torch.is_grad_enabled(), at
        assert not torch.is_autocast_enabled("cpu"), at
        assert (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1] == 0, at
        model.zero_grad()
        model.load_state_dict(start)
        assert_same(step(model), want)
    assert num_interrupted > NUM_POINTS // 2
    settle_pending()
    tbp.restore(model)
    assert all("forward" not in vars(m) and m._compiled_call_impl is None for m in model.modules())


def test_a_thread_whose_turn_it_was_not_does_not_measure_when_the_other_has_just_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between its question and its first trace the other may have begun its next."""
    config = tbp.HCBConfig(activation_budget="2MiB", plan_cache=False)
    model = tbp.hcb(Net(Block() for _ in range(5)), config=config)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(traced_module, "tracing_lock", lambda: contextlib.nullcontext(False))
        with pytest.warns(HCBWarning, match="not planned in this step"):
            square_loss(model).backward()
    assert not targets(model)[0].reports
    square_loss(model).backward()
    assert targets(model)[0].reports


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.filterwarnings("ignore:`\\w+` is not planned in this step")
@pytest.mark.parametrize("kinds", [(Net, Net), (Net, Broken)])
def test_two_threads_train_two_models(kinds: tuple[type[Net], ...]) -> None:
    """Without random numbers: those come from one generator, whose order no two threads agree on."""

    def make(kind: type[Net], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = kind(Block() for _ in range(5))
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return model

    def steps(model: nn.Module) -> list[Outcome]:
        outcomes = []
        for _ in range(12):
            loss = square_loss(model)
            loss.backward()
            outcomes.append(outcome_of(model, loss))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
                    p.grad = None
        return outcomes

    want = [steps(make(kind, seed)) for seed, kind in enumerate(kinds)]
    models = [tbp.hcb(make(kind, seed), activation_budget="2MiB") for seed, kind in enumerate(kinds)]
    got: dict[int, list[Outcome]] = {}
    failed: list[BaseException] = []
    together = threading.Barrier(len(models))

    def work(index: int) -> None:
        together.wait()
        try:
            got[index] = steps(models[index])
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle_pending()
    assert failed == []
    assert tracing_state_functions is dynamo_torch.tracing_state_functions  # each has put back what it replaced
    gc.collect()
    for index, expected in enumerate(want):
        for one, other in zip(got[index], expected, strict=True):
            assert torch.equal(one.loss, other.loss)
            assert all(torch.equal(one.gradients[n], g) for n, g in other.gradients.items() if g is not None)
            assert all(torch.equal(one.buffers[n], b) for n, b in other.buffers.items())
