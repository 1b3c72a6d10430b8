"""A step leaves nothing behind: no tensors, no slots, no runs, no trace that is still on."""

import gc
import json
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
from tests.unit.runtime.layered import broken_net
from tests.unit.runtime.training import residual_net
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending
from tinybp_lightning.runtime.torch.replay import engine
from tinybp_lightning.runtime.torch.replay.saved_tensors import SavedTensors, Slot

WIDTH = 16
X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


def alive(kind: type) -> int:
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


def counts() -> tuple[int, ...]:
    """Count what is alive once nothing more can be collected.

    One pass is not enough: torch gives the Python object of a tensor to the next pass where only garbage held the
    tensor itself. What an earlier test left behind would be taken for ours, and missed later.
    """
    while gc.collect():
        pass
    return alive(torch.Tensor), alive(Slot), alive(SavedTensors), alive(engine.Run), alive(torch.autograd.graph.Node)


def step(model: nn.Module, *, backward: bool = True) -> None:
    loss = model(X).square().mean()
    if backward:
        loss.backward()
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("make", [residual_net, broken_net])
@pytest.mark.parametrize("backward", [True, False])
def test_sixty_steps_leave_nothing(make: Callable[[], nn.Module], backward: bool) -> None:
    model = tbp.hcb(make(), activation_budget="80%")
    for _ in range(6):
        step(model)
    settle_pending()
    before = counts()
    for _ in range(60):
        step(model, backward=backward)
    settle_pending()
    assert counts() == before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("make", [residual_net, broken_net])
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
@pytest.mark.parametrize("make", [residual_net, broken_net])
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


# ---- processes that end ----------------------------------------------------------------------------------------------

_SETUP = """
import threading
from tinybp_lightning.runtime.torch.measure import step_monitor
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)))
tbp.hcb(model, activation_budget="1MiB")
x, loss = torch.ones(32, 8), []
"""
_THREAD = """
def work():
    loss.append(model(x).sum())
    loss[0]{rest}
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert len(step_monitor._MONITORS.tracing) == 1
"""
_STEP = "loss.append(model(x).sum())\n"
# A profiler that is left on takes the process down while it exits. Nobody but the thread that began it can stop it.
_ENDINGS = {
    "forward-only": _STEP,
    "backward": _STEP + "loss[0].backward()",
    "exit": _STEP + "loss[0].backward(retain_graph=True); raise SystemExit(0)",
    "thread-forward-only": _THREAD.format(rest=""),
    "thread-backward-elsewhere": _THREAD.format(rest="") + "loss[0].backward()",
    "thread-whole-step": _THREAD.format(rest=".backward()")
    + "for _ in range(3): model(x).sum().backward()\n"
    + "step_monitor.stop_tracing()\nassert not step_monitor._MONITORS.tracing",
}
# One process imports torch and is forked for each ending; a child goes on as the main program, and ends as one.
_FORKED = """
import json, os, sys
import torch, tinybp_lightning as tbp
import torch._dynamo, tinybp_lightning.runtime.torch.dispatcher
endings, folder = json.loads(sys.argv[1]), sys.argv[2]
children = {}
for name, ending in endings.items():
    children[os.fork()] = name
    if 0 in children:
        break
if 0 not in children:
    ended = dict(os.wait() for _ in children)
    print(json.dumps({name: os.waitstatus_to_exitcode(ended[child]) for child, name in children.items()}))
else:
    os.dup2(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY), 2)
    exec(ending, {"torch": torch, "tbp": tbp})
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and errors of a process of each ending."""
    folder = tmp_path_factory.mktemp("endings")
    endings = json.dumps({name: _SETUP + ending for name, ending in _ENDINGS.items()} | {"broken": "raise KeyError"})
    command = [sys.executable, "-c", _FORKED, endings, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    codes = json.loads(done.stdout.splitlines()[-1])
    return {name: (code, (folder / name).read_text()) for name, code in codes.items()}


@pytest.mark.parametrize("ending", _ENDINGS)
def test_a_process_ends_well_at_any_point(ending: str, ended: dict[str, tuple[int, str]]) -> None:
    code, errors = ended[ending]
    assert code == 0, errors


def test_a_process_that_ends_badly_is_seen(ended: dict[str, tuple[int, str]]) -> None:
    code, errors = ended["broken"]
    assert code == 1
    assert "KeyError" in errors
