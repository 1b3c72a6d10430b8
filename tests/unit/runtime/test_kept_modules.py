"""A kept module runs once a step: marked by the user, or because its forward was seen to change Python state."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.layered import Broken, Net
from tests.unit.runtime.replay.chains import Layer, Log, layers
from tests.unit.runtime.training import (
    Recorder,
    Residual,
    assert_all_same,
    outcome_of,
    peak_bytes,
    residual_net,
    train,
)
from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.errors import HCBWarning, UnsupportedModuleError
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.runtime.torch.kept_modules import is_kept, pin_chain, pinned_paths
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import pin_program, replay_program_of
from tinybp_lightning.runtime.torch.side_effects import changed_state, python_state
from tinybp_lightning.runtime.torch.submodules import step_modules
from tinybp_lightning.schedule.actions import Forward, ForwardSave, Schedule
from tinybp_lightning.schedule.baselines import keep_all, revolve
from tinybp_lightning.schedule.notation import from_text, to_text
from tinybp_lightning.schedule.simulator import simulate

WIDTH = 16
X = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1))
RUNS: list[str] = []


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


@torch.library.custom_op("tbp_tests::noted", mutates_args=())
def noted(x: torch.Tensor) -> torch.Tensor:
    RUNS.append("noted")
    return x * 1.0


@noted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


noted.register_autograd(lambda ctx, gradient: gradient)


class Noted(nn.Module):
    """Writes down that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(noted(x))


def made(kind: type[Net], *, depth: int = 8, at: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return kind(Noted() if i == at else Residual(WIDTH) for i in range(depth))


def runs_of(model: nn.Module, *, ways: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> int:
    """Run one step and return how often the noted op ran in it."""
    RUNS.clear()
    ways(square_loss(model))
    model.zero_grad()
    return len(RUNS)


def twice(loss: torch.Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("kind", [Net, Broken])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_kept_module_runs_once_a_step(kind: type[Net], at: int) -> None:
    want = train(made(kind, at=at), square_loss, steps=4)
    model = made(kind, at=at)
    tbp.keep(model.layers[at])
    recorder = Recorder()
    tbp.hcb(model, activation_budget="70%", observers=[recorder])
    assert_all_same(train(model, square_loss, steps=4), want)
    assert recorder.profiles[-1].replayed_blocks > 0
    assert [runs_of(model), runs_of(model, ways=twice)] == [1, 1]


def test_the_budget_is_kept_with_a_kept_module() -> None:
    budget_bytes = int(0.6 * peak_bytes(made(Net), square_loss))
    model = made(Net)
    tbp.keep(model.layers[3])
    tbp.hcb(model, activation_budget=budget_bytes)
    train(model, square_loss, steps=5)
    assert peak_bytes(model, square_loss) <= budget_bytes


def test_gradients_taken_out_of_order_do_not_run_it_again() -> None:
    model, plain = made(Net), made(Net)
    tbp.hcb(tbp.keep(model.layers[3]) and model, activation_budget="70%")

    def step(net: nn.Module) -> Any:
        torch.manual_seed(3)
        loss = square_loss(net)
        for i in (6, 1, 5, 0):
            torch.autograd.grad(loss, net.layers[i].up.weight, retain_graph=True)
        loss.backward()
        return outcome_of(net, loss)

    train(model, square_loss, lr=0.0)
    train(plain, square_loss, lr=0.0)
    RUNS.clear()
    got = step(model)
    assert len(RUNS) == 1
    assert_all_same([got], [step(plain)])


def test_a_mark_is_part_of_the_module() -> None:
    layer = tbp.keep(residual_net(2))
    assert is_kept(copy.deepcopy(layer))
    assert is_kept(pickle.loads(pickle.dumps(layer)))
    whole = nn.Sequential(layer, nn.ModuleList([layer[0], tbp.keep(layer[1])]))
    assert pinned_paths(whole) == ("0", "0.1", "1.1")
    assert is_kept(tbp.restore(layer))
    assert list(layer.state_dict()) == list(residual_net(2).state_dict())


@pytest.mark.parametrize(("wrong", "message"), [(3, "`int` is no"), (nn.ModuleList([nn.Linear(1, 1)]), "never called")])
def test_what_cannot_be_kept(wrong: Any, message: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=message):
        tbp.keep(wrong)


def test_units_leave_a_kept_module_out_and_are_split_around_it() -> None:
    model = made(Net, depth=3, at=1)
    tbp.keep(model.layers[1].inner.up)
    assert list(step_modules(model)) == ["layers.0", "layers.1.inner.norm", "layers.1.inner.down", "layers.2"]
    tbp.keep(model.layers[2])
    assert "layers.2" not in step_modules(model)


# ---- pinned blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "pinned", "kept", "stored", "segments"),
    [
        ("F0 F1 F2 K3 B3 F0 F1 K2 B2 F0 K1 B1 K0 B0", {1}, [1, 3], {2}, ["K0!", "", "K2!", ""]),
        ("F0 S1 F1 F2 K3 B3 F1 K2 B2 K1 D1 B1 K0 B0", {0}, [0, 3], {1}, ["", "K1!", "F1 K2!", ""]),
        ("F0 F1 F2 K3 B3 F0 F1 K2 B2 F0 K1 B1 K0 B0", {3}, [3], set(), ["K0!", "F0 K1!", "F0 F1 K2!", ""]),
        # What is stored or saved on the way to the pinned block stays so; a block that saves may now stop early.
        ("F0 F1 F2 K3 B3 F0 S1 F1 K2 B2 K1 D1 B1 K0 B0", {1}, [1, 3], {2}, ["K0!", "D1", "F0 S1 K2!", ""]),
        ("F0 F1 F2 K3 B3 K0 F1 K2 B2 F0 K1 B1 B0", {1}, [1, 3], {2}, ["", "", "K0! K2!", ""]),
    ],
)
def test_pinned_blocks_are_left_out_of_segments(
    schedule: str, pinned: set[int], kept: list[int], stored: set[int], segments: list[str]
) -> None:
    script = pin_program(replay_program_of(from_text(schedule)), pinned)
    assert [i for i, is_kept_block in enumerate(script.kept) if is_kept_block] == kept
    assert script.stored == stored
    assert script.pinned == {b + 1 for b in pinned if b < 3}
    assert [
        " ".join(to_text(Schedule(1, (move.action,))) + ("!" if move.stops_early else "") for move in segment)
        for segment in script.steps
    ] == segments


def played(pinned: set[int], ways: Callable[[torch.Tensor, nn.Module], Any]) -> str:
    """What the engine runs for four layers of which nothing but the last is kept."""
    modules, log = layers(4), Log()
    script = pin_program(replay_program_of(from_text("F0 F1 F2 K3 B3 F0 F1 K2 B2 F0 K1 B1 K0 B0")), pinned)
    x = torch.ones(2, 4)
    externals = NonBoundaryInputs.of([x, *modules.parameters()])
    run = Run(script, externals, devices=())
    run.begin([x])
    state: list[Any] = [x]
    for i, module in enumerate(modules):
        state = run.sweep(Layer(i, module, log), state)
    ways(state[0].sum(), modules)
    return str(log)


def in_order(loss: torch.Tensor, _: nn.Module) -> None:
    loss.backward()


def rescued(loss: torch.Tensor, modules: nn.Module) -> None:
    for i in (0, 2, 3, 1, 2):
        torch.autograd.grad(loss, modules[i][0].weight, retain_graph=True)


@pytest.mark.parametrize(
    ("pinned", "ways", "expected"),
    [
        (set(), in_order, "f0 f1 f2 f3 b3 b2 a0 a1 a2 b1 a0 a1 b0 a0"),
        ({1}, in_order, "f0 f1 f2 f3 b3 b2 a2 b1 b0 a0"),
        ({0, 1}, in_order, "f0 f1 f2 f3 b3 b2 a2 b1 b0"),
    ],
)
def test_a_pinned_block_is_run_once(pinned: set[int], ways: Callable[..., Any], expected: str) -> None:
    assert played(pinned, ways) == expected


def test_a_pinned_block_is_run_once_whatever_is_asked_for() -> None:
    assert "a1" in played(set(), rescued)
    assert "a1" not in played({1}, rescued)


def test_no_schedule_runs_a_pinned_block_again() -> None:
    script = pin_program(replay_program_of(revolve(uniform_chain(30), num_slots=2)), {7, 8, 20, 29})
    runs = [m.action.block for s in script.steps for m in s if isinstance(m.action, (Forward, ForwardSave))]
    assert runs
    assert not {7, 8, 20, 29} & set(runs)


def test_a_pinned_chain_holds_what_its_pinned_blocks_save() -> None:
    chain = uniform_chain(6)
    pinned = pin_chain(chain, {2})
    verify_chain(pinned)
    option = chain.blocks[2].options[0]
    held_bytes = option.saved_bytes + sum(
        chain.storage_bytes[s] for s in {*option.storages, *chain.boundaries[3].storages}
    )
    assert held_bytes > 0
    assert pinned.storage_bytes[-1] == held_bytes
    assert all(pinned.boundaries[i].storages[-1] == len(chain.storage_bytes) for i in range(7))
    assert simulate(pinned, keep_all(pinned)).peak_bytes >= simulate(chain, keep_all(chain)).peak_bytes
    assert pin_chain(chain, frozenset()) is chain


# ---- side effects that are seen --------------------------------------------------------------------------------------


class Counts(Residual):
    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.calls = 0
        self.sizes: dict[str, list[int]] = {"rows": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes["rows"].append(len(x))
        return super().forward(x * self.calls)


class CountingNet(Broken):
    def __init__(self, kind: Callable[[], nn.Module] = Counts) -> None:
        super().__init__(kind() if i % 2 else Residual(WIDTH) for i in range(6))


@pytest.mark.filterwarnings("ignore:`CountingNet` cannot be traced")
@pytest.mark.parametrize("ways", [torch.Tensor.backward, twice])
def test_a_block_that_changes_python_state_is_kept(ways: Callable[[torch.Tensor], None]) -> None:
    def steps(model: nn.Module) -> list[Any]:
        outcomes = []
        for step in range(4):
            torch.manual_seed(step)
            loss = square_loss(model)
            ways(loss)
            outcomes.append(outcome_of(model, loss))
            model.zero_grad()
        return outcomes

    torch.manual_seed(0)
    plain = CountingNet()
    want = steps(copy.deepcopy(plain))
    recorder = Recorder()
    tbp.hcb(plain, activation_budget="95%", observers=[recorder])
    with pytest.warns(HCBWarning, match=r"`CountingNet.layers.1` \(`Counts`\) is kept.*changes `calls`") as caught:
        got = steps(plain)
    assert_all_same(got, want)
    assert [layer.calls for layer in plain.layers if isinstance(layer, Counts)] == [4, 4, 4]
    assert len([w for w in caught if "is kept" in str(w.message)]) == 1
    assert recorder.profiles[0].replayed_blocks > 0


def test_changed_state() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module.list, module.nested, module.nan, module.tensor = [1], {"a": [1, {2}]}, float("nan"), torch.ones(1)
    before = python_state(module)
    assert changed_state(before, python_state(module)) == []
    module.tensor = torch.ones(1)
    module.train(False)
    module[0].weight.requires_grad_(False)
    assert changed_state(before, python_state(module)) == []
    module.list.append(2)
    module.nested["a"][1].add(3)
    module[1].new = 1
    del module.nan
    assert changed_state(before, python_state(module)) == ["1.new", "list", "nan", "nested"]
