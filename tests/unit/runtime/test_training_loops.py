"""What happens around forward and backward in real training: hooks, exceptions, modes, optimizers, other models."""

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tinybp_lightning as tbp
from tests.unit.runtime.layered import broken_net
from tests.unit.runtime.training import (
    Recorder,
    assert_all_same,
    assert_same,
    outcome_of,
    residual_net,
    train,
)
from tinybp_lightning.errors import HCBWarning, ReplayError
from tinybp_lightning.runtime.torch import targets
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

WIDTH, ROWS = 16, 64
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def both(run: Callable[[nn.Module], Any], *, make: Callable[[], nn.Module] = residual_net, budget: Any = "70%") -> None:
    """Run a training loop plainly and under replay, and compare all it returns and leaves behind."""
    plain, replayed = make(), tbp.hcb(make(), activation_budget=budget)
    torch.manual_seed(0)
    want = run(plain)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    got = run(replayed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(replayed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert any(target.profile is not None for target in targets(replayed))


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=False),
        lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3),
    ],
    ids=["adamw", "sgd", "lbfgs"],
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_optimizers(optimizer: Callable[[Any], torch.optim.Optimizer], set_to_none: bool) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        stepper = optimizer(model.parameters())
        losses = []

        def closure() -> torch.Tensor:
            stepper.zero_grad(set_to_none=set_to_none)
            loss = square_loss(model)
            loss.backward()
            losses.append(loss.detach())
            return loss

        for _ in range(4):
            stepper.step(closure)
        return losses

    both(run)


def test_an_optimizer_that_steps_inside_backward() -> None:
    """A parameter changes as soon as its gradient is there, while earlier blocks are still to be replayed."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        def step(p: torch.Tensor) -> None:
            with torch.no_grad():
                p.sub_(0.1 * p.grad)
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
        losses = []
        for _ in range(4):
            loss = square_loss(model)
            loss.backward()
            losses.append(loss.detach())
        for handle in handles:
            handle.remove()
        return losses

    both(run)


def test_gradient_scaling_and_clipping() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        seen = []
        for _ in range(3):
            (square_loss(model) * 1024).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.div_(1024)
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad)
            model.zero_grad()
        return seen

    both(run)


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("make", [residual_net, broken_net])
@pytest.mark.parametrize("name", ["1.up.weight", "1.up.bias", "0.norm.bias"])
def test_a_parameter_changed_before_backward_is_an_error(make: Callable[[], nn.Module], name: str) -> None:
    """Even one that autograd has not saved, such as a bias: a replay would use its new value."""
    model = tbp.hcb(make(), activation_budget="70%")
    loss = square_loss(model)
    (parameter,) = (p for n, p in model.named_parameters() if n.endswith(name))
    with torch.no_grad():
        parameter.mul_(2.0).add_(1.0)
    with pytest.raises(ReplayError, match=r"changed\s+in place after the forward"):
        loss.backward()


# ---- hooks -----------------------------------------------------------------------------------------------------------


def hook_on_the_model(model: nn.Module, seen: list[torch.Tensor]) -> list[Any]:
    return [
        model.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        model.register_forward_hook(lambda _, args, out: seen.append(out.detach().sum())),
        model.register_full_backward_hook(lambda _, grads, out: seen.append(out[0].sum())),
    ]


def forward_hook_that_changes(model: nn.Module, seen: list[torch.Tensor]) -> list[Any]:
    return [model[1].register_forward_hook(lambda _, args, out: out * 0.5 + args[0].mean())]  # type: ignore[index]


def hook_on_a_parameter(model: nn.Module, seen: list[torch.Tensor]) -> list[Any]:
    return [p.register_hook(lambda g: seen.append(g.sum()) or g * 2) for p in model.parameters()]


def post_accumulate(model: nn.Module, seen: list[torch.Tensor]) -> list[Any]:
    return [p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum())) for p in model.parameters()]


# torch: the input of the whole model wants no gradient, so its hook gets none.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "register", [hook_on_the_model, forward_hook_that_changes, hook_on_a_parameter, post_accumulate]
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "in-mid-training"])
def test_hooks(register: Callable[[nn.Module, list[torch.Tensor]], list[Any]], late: bool) -> None:
    def run(model: nn.Module) -> list[Any]:
        seen: list[torch.Tensor] = []
        handles = [] if late else register(model, seen)
        first = train(model, square_loss)
        handles = handles or register(model, seen)
        second = train(model, square_loss)
        for handle in handles:
            handle.remove()
        third = train(model, square_loss)
        settle_pending()
        return [*seen, *(step.loss for step in [*first, *second, *third])]

    both(run)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_module_hook_fires_once_a_step() -> None:
    model = tbp.hcb(residual_net(), activation_budget="70%")
    calls = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.register_full_backward_hook(lambda *_: calls.append("backward"))
    train(model, square_loss)
    assert calls == ["forward", "backward"] * 3


class TensorHooks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x)
            x.register_hook(lambda g: g * 0.9)
        return x


def test_tensor_hooks_in_the_forward() -> None:
    both(lambda model: [step.loss for step in train(model, square_loss)], make=TensorHooks)


# ---- exceptions ------------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    """Raises in its forward where told to, in the middle of the blocks, under autocast and no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)

    def forward(self, x: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            bias = table[index]  # out of range: only the run can know
        return x + bias.float().sum(0)


def failing_loss(model: nn.Module, index: int) -> torch.Tensor:
    return model(X, torch.ones(3, WIDTH), torch.tensor([index])).square().mean()


def test_an_exception_in_forward_leaves_everything_usable() -> None:
    model = Fails()
    want = train(copy.deepcopy(model), lambda m: failing_loss(m, 0))
    tbp.hcb(model, activation_budget="70%")
    train(model, lambda m: failing_loss(m, 0), lr=0.0)
    for _ in range(2):
        with pytest.raises(IndexError):
            failing_loss(model, 7)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert_all_same(train(model, lambda m: failing_loss(m, 0)), want)


def test_an_exception_in_the_first_forward_leaves_everything_usable() -> None:
    model = Fails()
    want = train(copy.deepcopy(model), lambda m: failing_loss(m, 0))
    tbp.hcb(model, activation_budget="70%")
    with pytest.raises(IndexError):
        failing_loss(model, 7)
    assert torch.is_grad_enabled()
    assert_all_same(train(model, lambda m: failing_loss(m, 0)), want)


def test_an_exception_in_backward_leaves_everything_usable() -> None:
    model = residual_net()
    want = train(copy.deepcopy(model), square_loss)
    tbp.hcb(model, activation_budget="70%")

    def explode(gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    for _ in range(2):
        handle = model.get_parameter("1.up.weight").register_hook(explode)
        with pytest.raises(KeyError, match="mine"):
            square_loss(model).backward()
        handle.remove()
        model.zero_grad()
    assert_all_same(train(model, square_loss), want)


def test_a_wrong_call_is_the_users_own_error() -> None:
    model = tbp.hcb(residual_net(), activation_budget="70%")
    with pytest.raises(TypeError, match="argument"):
        model(X, X)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        model(torch.ones(3, WIDTH + 1))
    # Nothing stays behind: the model is traced as if this had never happened.
    recorder = Recorder()
    train(tbp.hcb(model, activation_budget="70%", observers=[recorder]), square_loss)
    for wrong in ((X, X), (torch.ones(3, WIDTH + 1),)):
        with pytest.raises((TypeError, RuntimeError)):
            model(*wrong)
    train(model, square_loss)
    assert targets(model)[0].module_steps is None


# ---- modes, shapes and other models ----------------------------------------------------------------------------------


def test_train_and_eval_in_turns() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        seen = []
        for _ in range(3):
            seen += [step.loss for step in train(model.train(), square_loss, steps=2)]
            with torch.no_grad():
                seen.append(model.eval()(X).sum())
            seen.append(model(X).sum().detach())  # evaluation with gradients on
        return seen

    both(run)


def test_parts_in_evaluation_mode() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        losses = [step.loss for step in train(model, square_loss, steps=2)]
        model.get_submodule("1").eval()
        losses += [step.loss for step in train(model, square_loss, steps=2)]
        model.train()
        return losses + [step.loss for step in train(model, square_loss, steps=2)]

    both(run)


def test_freezing_in_mid_training() -> None:
    def run(model: nn.Module) -> list[Any]:
        outcomes = train(model, square_loss, steps=2)
        model.get_submodule("0").requires_grad_(requires_grad=False)
        model.get_submodule("2").requires_grad_(requires_grad=False)
        outcomes += train(model, square_loss, steps=2)
        model.requires_grad_()
        outcomes += train(model, square_loss, steps=2)
        return [[o.loss, {n: g for n, g in o.gradients.items() if g is not None}] for o in outcomes]

    both(run)


@pytest.mark.parametrize("rows", [[64, 64, 17, 64, 17, 1], [16, 32, 64, 32, 16]])
def test_shapes_that_change(rows: list[int]) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        losses = []
        for number in rows:
            losses += [o.loss for o in train(model, lambda m, n=number: m(X[:n]).square().mean(), steps=1)]
        return losses

    both(run, budget=80_000)


def test_a_small_last_batch_may_use_what_the_full_ones_use() -> None:
    recorder = Recorder()
    model = tbp.hcb(residual_net(), activation_budget="60%", observers=[recorder])
    for rows in (64, 64, 4, 64):
        train(model, lambda m, n=rows: m(X[:n]).square().mean(), steps=1)
    assert len({plan.budget_bytes for plan in recorder.plans}) == 1


def test_two_instances_of_one_class() -> None:
    want = [train(residual_net(seed=seed), square_loss) for seed in (0, 1)]
    models = [tbp.hcb(residual_net(seed=seed), activation_budget="70%") for seed in (0, 1)]
    got: list[list[Any]] = [[], []]
    for step in range(3):
        for model, outcomes in zip(models, got, strict=True):
            torch.manual_seed(step)
            loss = square_loss(model)
            loss.backward()
            outcomes.append(outcome_of(model, loss))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
                    p.grad = None
    settle_pending()
    for one, other in zip(got, want, strict=True):
        assert_all_same(one, other)


def test_two_models_in_one_loss() -> None:
    """As a generator and its critic: forwards and backwards of the two are interleaved."""

    class Pair(nn.Module):
        def __init__(self, budget: str | None) -> None:
            super().__init__()
            self.one, self.two = residual_net(4), residual_net(4, seed=1)
            for net in (self.one, self.two):
                if budget is not None:
                    tbp.hcb(net, activation_budget=budget)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = self.one(x)
            return self.two(made) + self.two(x) + made

    want = train(Pair(None), square_loss, steps=4)
    assert_all_same(train(Pair("1MiB"), square_loss, steps=4), want)


def test_a_changed_attribute_is_seen() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        losses = []
        for rate in (0.1, 0.5, 0.0, 0.1):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
            losses += [o.loss for o in train(model, square_loss, steps=2)]
        return losses

    both(run, budget="90%")


class Counts(nn.Module):
    """Keeps plain Python state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(3)
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(x.shape[0])
        for layer in self.body:
            x = layer(x)
        return x


def test_python_state_changes_once_a_step() -> None:
    """It is traced anew for each number; after some of that, module steps take over."""
    want = train(Counts(), square_loss, steps=12)
    model = tbp.hcb(Counts(), activation_budget="1MiB")
    with pytest.warns(HCBWarning, match="`Counts`.*traced anew again and again") as caught:
        assert_all_same(train(model, square_loss, steps=12), want)
    assert len(caught) == 1
    assert isinstance(model, Counts)
    assert model.calls == 12
    assert model.seen == [ROWS] * 12
    assert len(targets(model)[0].traced_modules) < 12


def test_checkpointing_that_is_switched_on_is_switched_off_with_a_warning() -> None:
    class Switched(nn.Sequential):
        gradient_checkpointing = True

        def gradient_checkpointing_disable(self) -> None:
            self.gradient_checkpointing = False

    model = Switched(*residual_net(3))
    with pytest.warns(HCBWarning, match="`Switched` had gradient checkpointing enabled"):
        tbp.hcb(model, activation_budget="70%")
    assert not model.gradient_checkpointing


def test_functional_call_uses_the_given_weights() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        seen = []
        for scale in (1.0, 0.5):
            weights = {n: (p * scale).detach().requires_grad_() for n, p in model.named_parameters()}
            loss = torch.func.functional_call(model, weights, (X,)).square().mean()
            seen += [loss.detach(), *torch.autograd.grad(loss, list(weights.values()))]
        return seen

    both(run)


def test_load_state_dict_and_new_weights() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        losses = [o.loss for o in train(model, square_loss, steps=2)]
        model.load_state_dict(residual_net(seed=5).state_dict())
        losses += [o.loss for o in train(model, square_loss, steps=2)]
        model.load_state_dict(residual_net(seed=6).state_dict(), assign=True)
        losses += [o.loss for o in train(model, square_loss, steps=2)]
        model.double()
        return losses + [o.loss for o in train(model, lambda m: m(X.double()).square().mean(), steps=2)]

    both(run)


def test_a_profiler_of_the_user() -> None:
    """It may run at any time: steps are then not measured, and nothing breaks."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        losses = [o.loss for o in train(model, square_loss, steps=1)]
        loss = square_loss(model)
        loss.backward()
        model.zero_grad()
        settle_pending()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            losses += [o.loss for o in train(model, square_loss, steps=2)]
        assert len(profiler.key_averages()) > 0
        return losses + [o.loss for o in train(model, square_loss, steps=2)]

    both(run)


def test_a_profiler_of_the_user_around_everything() -> None:
    plain = residual_net()
    want = train(copy.deepcopy(plain), square_loss)
    tbp.hcb(plain, activation_budget="70%")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HCBWarning)
        with profile(activities=[ProfilerActivity.CPU]):
            got = train(plain, square_loss)
    assert_all_same(got, want)


def test_garbage_collection_in_backward() -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        handle = model.get_parameter("2.up.weight").register_hook(lambda g: (gc.collect(), g)[1])
        losses = [o.loss for o in train(model, square_loss)]
        handle.remove()
        return losses

    both(run)


def test_observers_hear_of_plans_and_steps_and_their_errors_reach_the_user() -> None:
    class Objects:
        def on_plan(self, plan: Any) -> None:
            raise KeyError("mine")

        def on_replay(self, profile: Any) -> None: ...

    recorder = Recorder()
    train(tbp.hcb(residual_net(), activation_budget="70%", observers=[recorder]), square_loss, steps=5)
    assert [p.step for p in recorder.profiles] == [1, 2, 3, 4, 5]
    assert recorder.plans
    assert recorder.profiles[-1].recompute_share > 0
    assert recorder.profiles[-1].plan_summary == recorder.plans[-1].summary
    with pytest.raises(KeyError, match="mine"):
        train(tbp.hcb(residual_net(), activation_budget="70%", observers=[Objects()]), square_loss, steps=2)


def test_plain_outcome_helpers_notice_a_difference() -> None:
    one, other = (train(residual_net(seed=seed), square_loss, steps=1)[0] for seed in (0, 1))
    with pytest.raises(AssertionError, match="loss"):
        assert_same(one, other)
