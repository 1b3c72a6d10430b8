"""A step leaves nothing behind: no tensors, no slots, no runs, no trace that is still on."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import residual_net
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending
from tinybp_lightning.runtime.torch.replay import engine
from tinybp_lightning.runtime.torch.replay.saved_tensors import SavedTensors, Slot

WIDTH = 16
X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(residual_net(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def alive(kind: type) -> int:
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


def counts() -> tuple[int, ...]:
    gc.collect()
    return alive(torch.Tensor), alive(Slot), alive(SavedTensors), alive(engine.Run), alive(torch.autograd.graph.Node)


def step(model: nn.Module, *, backward: bool = True) -> None:
    loss = model(X).square().mean()
    if backward:
        loss.backward()
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("make", [residual_net, Broken])
@pytest.mark.parametrize("backward", [True, False])
def test_two_hundred_steps_leave_nothing(make: Callable[[], nn.Module], backward: bool) -> None:
    model = tbp.hcb(make(), activation_budget="80%")
    for _ in range(6):
        step(model)
    settle_pending()
    before = counts()
    for _ in range(200):
        step(model, backward=backward)
    settle_pending()
    assert counts() == before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("make", [residual_net, Broken])
def test_a_thousand_steps_leave_nothing_with_the_process(make: Callable[[], nn.Module]) -> None:
    """Saved tensors of a step are 112 KiB: were one of a hundred lost, a MiB would be missed in the second half."""
    model = tbp.hcb(make(), activation_budget="80%")

    def half() -> tuple[int, int, int]:
        for _ in range(500):
            step(model)
        settle_pending()
        gc.collect()
        return resident_bytes(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before, after = half(), half()
    assert after[0] - before[0] < 2**20
    assert after[1:] == before[1:]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[engine.Run]"]:
    """Weak references to every run that begins."""
    seen: list[weakref.ref[engine.Run]] = []
    original = engine.Run.begin

    def begin(self: engine.Run, root: list[object]) -> None:
        seen.append(weakref.ref(self))
        original(self, root)

    monkeypatch.setattr(engine.Run, "begin", begin)
    return seen


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("make", [residual_net, Broken])
def test_a_run_dies_with_its_graph(make: Callable[[], nn.Module], runs: list["weakref.ref[engine.Run]"]) -> None:
    """By counting references, not by the garbage collector: what it holds must go at once."""
    model = tbp.hcb(make(), activation_budget="80%")
    gc.disable()
    try:
        for _ in range(5):
            loss = model(X).square().mean()
            loss.backward()
            settle_pending()
            del loss
            assert all(run() is None for run in runs)
    finally:
        gc.enable()
    assert runs


def test_a_run_dies_without_a_backward(runs: list["weakref.ref[engine.Run]"]) -> None:
    model = tbp.hcb(residual_net(), activation_budget="80%")
    for _ in range(3):
        y = model(X)
        del y
        gc.collect()
        assert all(run() is None for run in runs)


def test_backward_frees_what_it_has_used() -> None:
    """Stored boundaries and slots do not wait for the loss to be deleted."""
    model = tbp.hcb(residual_net(6), activation_budget="60%")
    for _ in range(4):
        step(model)
    settle_pending()
    before = {id(o) for o in gc.get_objects() if type(o) is torch.Tensor}
    loss = model(X).square().mean()
    loss.backward()
    model.zero_grad()
    gc.collect()
    held = [o for o in gc.get_objects() if type(o) is torch.Tensor and id(o) not in before]
    assert [o is loss for o in held] == [True]


def test_models_die() -> None:
    model = tbp.hcb(residual_net(), activation_budget="80%")
    for _ in range(4):
        step(model)
    settle_pending()
    tbp.restore(model)
    parameter = weakref.ref(next(model.parameters()))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize(
    "ending",
    ["", "loss.backward()", "loss.backward(retain_graph=True); raise SystemExit(0)"],
    ids=["forward-only", "backward", "exit"],
)
def test_a_process_ends_well_at_any_point(ending: str) -> None:
    """A profiler that is left on takes the process down while it exits."""
    script = f"""
import torch, tinybp_lightning as tbp
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)))
tbp.hcb(model, activation_budget="1MiB")
loss = model(torch.ones(32, 8)).sum()
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("rest", "ending"),
    [
        ("", ""),
        ("", "loss[0].backward()"),
        (
            ".backward()",
            "[model(x).sum().backward() for _ in range(3)]; stop_tracing(); assert not _MONITORS.tracing",
        ),
    ],
    ids=["forward-only", "backward-elsewhere", "whole-step"],
)
def test_a_process_ends_well_whose_thread_left_a_trace_on(rest: str, ending: str) -> None:
    """Nobody but the thread can stop its profiler, and it has ended."""
    script = f"""
import threading, torch, tinybp_lightning as tbp
from tinybp_lightning.runtime.torch.measure.step_monitor import _MONITORS, stop_tracing
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)))
tbp.hcb(model, activation_budget="1MiB")
x, loss = torch.ones(32, 8), []
def work():
    loss.append(model(x).sum())
    loss[0]{rest}
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert len(_MONITORS.tracing) == 1
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
