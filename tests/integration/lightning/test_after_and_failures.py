"""Is the module left as it was, after a fit, an exception in any phase, and an interrupt?"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on modules and parameters beside their values, losses and Lightning's own state aside."""
    per_module = {
        name: (
            sorted(key for key in vars(module) if key == "forward"),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }
    per_parameter = {
        name: [len(getattr(parameter, key) or ()) for key in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        for name, parameter in model.named_parameters()
    }
    return {"modules": per_module, "parameters": per_parameter}


def fail(error: type[BaseException]) -> Callable[..., None]:
    def raise_it(*_: Any) -> None:
        raise error("injected")

    return raise_it


def fail_in_training_step(model: Any, error: type[BaseException]) -> None:
    model.loss = fail(error)


def fail_in_forward(model: Any, error: type[BaseException]) -> None:
    model.net[4].register_forward_pre_hook(fail(error))


def fail_in_backward(model: Any, error: type[BaseException]) -> None:
    original = model.loss

    def loss(batch: torch.Tensor) -> torch.Tensor:
        value = original(batch)
        value.register_hook(fail(error))
        return value

    model.loss = loss


def fail_in_the_second_step(model: Any, error: type[BaseException]) -> None:
    original = model.loss

    def loss(batch: torch.Tensor) -> torch.Tensor:
        if model.losses:
            raise error("injected")
        return original(batch)

    model.loss = loss


# A forward that raises cannot be traced either, and the engine says so before the error comes.
@pytest.mark.filterwarnings("ignore:`Sequential` cannot be traced:tinybp_lightning.errors.HCBWarning")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inject", [fail_in_training_step, fail_in_forward, fail_in_backward, fail_in_the_second_step])
def test_an_exception_leaves_the_module_as_it_was(
    models: dict[str, Any],
    trainer_for: Callable[..., Any],
    batches: Any,
    strategy: Any,
    inject: Callable[..., None],
    error: type[BaseException],
) -> None:
    model, untouched = models["Model"](), models["Model"]()
    inject(model, error)
    before = footprint(model)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer_for(strategy).fit(model, batches(3))
    assert footprint(model) == before
    untouched.load_state_dict(model.state_dict())
    model.__dict__.pop("loss", None)
    model.net[4]._forward_pre_hooks.clear()
    assert_trains_as(model.net, untouched.net, batches)


def assert_trains_as(model: Any, expected: Any, batches: Any) -> None:
    gradients: list[list[torch.Tensor]] = []
    for each in (model, expected):
        each.train().zero_grad()
        torch.manual_seed(5)
        each(next(iter(batches(1)))).square().mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_fit_leaves_the_module_as_it_was(
    models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, strategy: Any, recorder: Any
) -> None:
    model, untouched = models["Model"](), models["Model"]()
    before = footprint(model)
    trainer_for(strategy).fit(model, batches(3))
    assert recorder.num_replayed > 0
    assert footprint(model) == before
    untouched.load_state_dict(model.state_dict())
    net, expected = model.net, untouched.net.state_dict()
    for trained in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        untouched.net.load_state_dict(expected)
        assert_trains_as(trained, untouched.net, batches)
        net.load_state_dict(expected)


def test_a_model_is_copied_and_pickled_in_the_middle_of_a_fit(
    models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, strategy: Any
) -> None:
    model = models["Model"]()
    copies: list[nn.Module] = []

    def on_train_batch_end(*_: Any) -> None:
        copies.append(copy.deepcopy(model.net))
        copies.append(pickle.loads(pickle.dumps(model.net)))

    model.on_train_batch_end = on_train_batch_end
    trainer_for(strategy, max_epochs=1).fit(model, batches(2))
    batch = next(iter(batches(1)))
    for copied in copies[-2:]:
        assert list(copied.state_dict()) == list(model.net.state_dict())
        assert torch.equal(copied.eval()(batch), model.net.eval()(batch))
        nn.init.zeros_(copied[-1].weight)
        nn.init.zeros_(copied[-1].bias)
        assert torch.count_nonzero(copied(batch)) == 0
