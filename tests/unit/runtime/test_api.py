"""`hcb`, `attach`, `restore`: what they take, what they leave behind, and what they say."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, assert_all_same, residual_net, train
from tinybp_lightning.errors import BudgetError, BudgetTooSmallError, ConfigError, HCBWarning, UnsupportedModuleError
from tinybp_lightning.runtime.torch import targets

WIDTH = 16


def square_loss(model: nn.Module) -> torch.Tensor:
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


class Wrapper(nn.Module):
    """Has the target inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = residual_net(4)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_the_same_object_and_the_same_keys() -> None:
    model = residual_net()
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    assert tbp.hcb(model, activation_budget="60%") is model
    train(model, square_loss)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == names
    residual_net(seed=1).load_state_dict(model.state_dict())
    model.load_state_dict(residual_net(seed=1).state_dict())


def test_evaluation_is_left_alone() -> None:
    model = tbp.hcb(residual_net().eval(), activation_budget=1)  # a budget that no training could meet
    with torch.no_grad():
        model(torch.ones(2, WIDTH))
        model.train()(torch.ones(2, WIDTH))
    model.eval()(torch.ones(2, WIDTH))  # with gradients on, as evaluation often is
    assert targets(model) == ()


def test_training_in_eval_mode_is_named_and_planned_from_the_second_step() -> None:
    want = train(residual_net().eval(), square_loss)
    model = tbp.hcb(residual_net().eval(), activation_budget="60%")
    with pytest.warns(HCBWarning, match=r"it is in `eval\(\)` mode; .* from the next step on") as caught:
        got = train(model, square_loss)
    assert_all_same(got, want)
    assert len(caught) == 1
    assert targets(model)[0].profile is not None


def test_restore_gives_the_plain_module_back() -> None:
    model = tbp.hcb(residual_net(), activation_budget="60%")
    recorder = Recorder()
    train(tbp.hcb(model, activation_budget="60%", observers=[recorder]), square_loss)
    num_profiles = len(recorder.profiles)
    assert num_profiles > 0
    assert tbp.restore(model) is model
    assert "forward" not in vars(model)
    train(model, square_loss)
    assert len(recorder.profiles) == num_profiles


def test_restore_of_what_was_never_attached_does_nothing() -> None:
    model = residual_net()
    assert tbp.restore(model) is model
    assert "forward" not in vars(model)


def test_a_forward_of_the_users_own_is_kept() -> None:
    """Some libraries set `module.forward` themselves."""
    model = residual_net()
    forward = model.forward

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * forward(x)

    model.forward = doubled  # type: ignore[method-assign]
    want = train(copy.deepcopy(residual_net()), lambda m: (2 * m(torch.ones(64, WIDTH))).square().mean())
    got = train(tbp.hcb(model, activation_budget="80%"), lambda m: m(torch.ones(64, WIDTH)).square().mean())
    assert_all_same(got, want)
    tbp.restore(model)
    assert model.forward is doubled


def test_hcb_twice_is_the_second() -> None:
    want = train(residual_net(), square_loss)
    first, second = Recorder(), Recorder()
    model = tbp.hcb(residual_net(), activation_budget="60%", observers=[first])
    tbp.hcb(model, activation_budget="80%", observers=[second])
    assert_all_same(train(model, square_loss), want)
    assert not first.plans
    assert not first.profiles
    assert second.profiles


def test_another_budget_in_mid_training() -> None:
    want = train(residual_net(), square_loss, steps=4)
    model = tbp.hcb(residual_net(), activation_budget="90%")
    got = train(model, square_loss, steps=2)
    tbp.hcb(model, activation_budget="60%")
    steps_left = iter([2, 3])

    def from_the_third(m: nn.Module) -> torch.Tensor:
        torch.manual_seed(next(steps_left))
        return square_loss(m)

    got += train(model, from_the_third, steps=2)
    assert_all_same(got, want)


# ---- inner and outer -------------------------------------------------------------------------------------------------


def test_hcb_of_an_inner_module_trains_it_alone() -> None:
    want = train(_wrapper(), square_loss)
    model, recorder = _wrapper(), Recorder()
    tbp.hcb(model.net, activation_budget="60%", observers=[recorder])
    assert_all_same(train(model, square_loss), want)
    assert {p.target for p in recorder.profiles} == {"Sequential"}


def test_inner_then_outer_is_planned_as_one() -> None:
    want = train(_wrapper(), square_loss)
    model, recorder = _wrapper(), Recorder()
    tbp.hcb(model.net, activation_budget="60%", observers=[recorder])
    tbp.hcb(model, activation_budget="60%", observers=[recorder])
    assert_all_same(train(model, square_loss), want)
    assert {p.target for p in recorder.profiles} == {"Wrapper"}
    assert "forward" not in vars(model.net)


def test_outer_then_inner_warns_and_is_planned_as_one() -> None:
    want = train(_wrapper(), square_loss)
    model, recorder = _wrapper(), Recorder()
    tbp.hcb(model, activation_budget="60%", observers=[recorder])
    tbp.hcb(model.net, activation_budget="60%", observers=[recorder])
    with pytest.warns(HCBWarning, match="`Sequential`, which is part of `Wrapper`"):
        got = train(model, square_loss)
    assert_all_same(got, want)
    assert {p.target for p in recorder.profiles} == {"Wrapper"}


def _wrapper() -> Wrapper:
    torch.manual_seed(0)
    return Wrapper()


def test_discovery_takes_the_outermost_modules_called_in_training() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = residual_net(3), residual_net(3, seed=1)

        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).detach()).square().mean() + self.one(x).mean()

    def loss_of(m: nn.Module) -> torch.Tensor:
        assert isinstance(m, Task)
        return m.training_step(torch.ones(64, WIDTH))

    want = train(Task(), loss_of)
    model = Task()
    session = tbp.attach(model, config=tbp.HCBConfig(activation_budget="1MiB"), discover=True)
    assert session.profile is None
    got = train(model, loss_of)
    assert_all_same(got, want)
    assert [t.name for t in session.targets] == ["Sequential", "Sequential"]
    assert session.profile is not None
    assert len(session.reports) >= 2
    session.detach()
    session.detach()
    assert not any("forward" in vars(m) for m in model.modules())


# ---- copies ----------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_copy_trains_its_own_weights(copied: Callable[[Any], Any], steps_before: int) -> None:
    plain = residual_net()
    train(plain, square_loss, steps=steps_before)
    model = tbp.hcb(residual_net(), activation_budget="60%")
    train(model, square_loss, steps=steps_before)
    other = copied(model)
    before = copy.deepcopy(model.state_dict())
    want = train(plain, square_loss)
    assert_all_same(train(other, square_loss), want)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The copy is under the same budget, by a plan of its own, and the original goes on.
    assert targets(other)[0].reports[0].budget_bytes == targets(other)[0].reports[0].plain_peak_bytes * 6 // 10
    assert_all_same(train(model, square_loss), want)


# ---- errors ----------------------------------------------------------------------------------------------------------


class NoParameters(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


def compiled_in_place() -> nn.Module:
    model = residual_net()
    model.compile()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(residual_net()), "`OptimizedModule` is the result of torch.compile"),
        (compiled_in_place, "`Sequential.compile\\(\\)` was called"),
        (NoParameters, "`NoParameters` has no parameters"),
        (lambda: nn.ModuleList([residual_net()]), "`ModuleList` has no forward"),
        (lambda: residual_net().forward, "`method` is not a torch.nn.Module"),
        (lambda: None, "`NoneType` is not a torch.nn.Module"),
        (lambda: residual_net, "`function` is not a torch.nn.Module"),
        (lambda: nn.Linear, "`type` is not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_trained_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=message):
        tbp.hcb(make(), activation_budget="50%")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory_budget": "1GiB", "activation_budget": "1GiB"}, BudgetError),
        ({"activation_budget": "20 furlongs"}, BudgetError),
        ({"activation_budget": "nan"}, BudgetError),
        ({"memory_budget": -1}, BudgetError),
        ({"memory_budget": True}, BudgetError),
        ({"executor": "fast"}, ConfigError),
        ({"config": tbp.HCBConfig(), "activation_budget": "50%"}, ConfigError),
        ({"config": tbp.HCBConfig(), "executor": "eager"}, ConfigError),
        ({"config": tbp.HCBConfig(), "on_oom": "raise"}, ConfigError),
        ({"on_oom": "retry"}, ConfigError),
        ({"config": tbp.HCBConfig(), "check": True}, ConfigError),
    ],
)
def test_wrong_options_leave_the_module_alone(options: dict[str, Any], error: type[Exception]) -> None:
    model = residual_net()
    with pytest.raises(error):
        tbp.hcb(model, **options)
    assert "forward" not in vars(model)


def test_a_budget_too_small_names_the_smallest() -> None:
    model = tbp.hcb(residual_net(), activation_budget="1KiB")
    with pytest.raises(BudgetTooSmallError) as caught:
        square_loss(model)
    error = caught.value
    assert error.budget_bytes == 1024
    assert "`activation_budget='1KiB'` (1024 bytes) cannot be met by `Sequential`" in str(error)
    assert str(error.smallest_bytes) in str(error)
    assert error.bottleneck in str(error)
    # The model is as it was: it can be given that budget, or none.
    want = train(residual_net(), square_loss)
    assert_all_same(train(tbp.hcb(model, activation_budget=error.smallest_bytes * 2), square_loss), want)


def test_a_memory_budget_counts_parameters_and_optimizer_state() -> None:
    model = residual_net()
    held = sum(p.nbytes for p in model.parameters())
    tbp.hcb(model, memory_budget=2 * held)
    with pytest.raises(BudgetTooSmallError) as caught:
        square_loss(model)
    assert caught.value.smallest_bytes > 3 * held  # parameters, and two copies for an optimizer such as Adam
    config = tbp.HCBConfig(memory_budget=2 * held, optimizer_state_bytes=0)
    with pytest.raises(BudgetTooSmallError) as less:
        square_loss(tbp.hcb(model, config=config))
    assert less.value.smallest_bytes == caught.value.smallest_bytes - 2 * held
