"""Does a fit under `hcb` give the plain strategy's losses, weights, buffers and predictions, bit for bit?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

# Dynamo in torch 2.13 reads `.grad` of a graph input that is no leaf: here, what the critic gets from the generator.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")

CASES = {
    "plain": ("Model", {}),
    "forward of the LightningModule": ("OwnForward", {}),
    "accumulation": ("Model", {"accumulate_grad_batches": 2}),
    "clipping": ("Model", {"gradient_clip_val": 0.1}),
    "bf16-mixed": ("Model", {"precision": "bf16-mixed"}),
    "validation": ("Validated", {"val_check_interval": 2}),
    "manual": ("Manual", {}),
    "two optimizers": ("GAN", {}),
    "two parts": ("Parts", {}),
    "loss and metric modules": ("StepMeasurement", {}),
    "frozen teacher": ("Distilled", {}),
    "a profiler": ("Model", {"profiler": "simple"}),
}


def assert_same(ours: Any, plain: Any) -> None:
    assert len(ours.losses) == len(plain.losses) > 0
    pairs = enumerate(zip(ours.losses, plain.losses, strict=True))
    assert [step for step, (found, expected) in pairs if not torch.equal(found, expected)] == []
    ours_state, plain_state = ours.state_dict(), plain.state_dict()
    assert list(ours_state) == list(plain_state)
    assert [name for name, value in plain_state.items() if not torch.equal(value, ours_state[name])] == []


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_fit(
    models: dict[str, Any],
    trainer_for: Callable[..., Any],
    batches: Any,
    strategy: Any,
    recorder: Any,
    name: str,
    options: dict[str, Any],
) -> None:
    trained: list[Any] = []
    for chosen in ("auto", strategy):
        model = models[name]()
        torch.manual_seed(2)
        trainer_for(chosen, **options).fit(model, batches(4), batches(2) if name == "Validated" else None)
        trained.append(model)
    plain, ours = trained
    assert_same(ours, plain)
    assert recorder.num_replayed > 0


def test_predict_and_validate_run_lightnings_own_code(
    models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, strategy: Any, recorder: Any
) -> None:
    model = models["Validated"]()
    plain, ours = trainer_for("auto"), trainer_for(strategy)
    for expected, found in zip(plain.predict(model, batches(2)), ours.predict(model, batches(2)), strict=True):
        assert torch.equal(expected, found)
    assert plain.validate(model, batches(2), verbose=False) == ours.validate(model, batches(2), verbose=False)
    assert recorder.plans == []


def test_predict_after_fit_and_fit_after_predict(
    models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, strategy: Any, recorder: Any
) -> None:
    outcomes: list[tuple[Any, list[torch.Tensor]]] = []
    for chosen in ("auto", strategy):
        model, trainer = models["Model"](), trainer_for(chosen)
        torch.manual_seed(2)
        trainer.fit(model, batches(3))
        predicted = trainer.predict(model, batches(2))
        trainer.fit_loop.max_epochs = 3
        trainer.fit(model, batches(3))
        outcomes.append((model, predicted))
    (plain, plain_predicted), (ours, ours_predicted) = outcomes
    assert_same(ours, plain)
    assert all(torch.equal(*pair) for pair in zip(plain_predicted, ours_predicted, strict=True))
    assert recorder.num_replayed > 0


def test_the_string_and_a_budget_from_the_environment(
    hcb: Any,
    models: dict[str, Any],
    trainer_for: Callable[..., Any],
    batches: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HCB_ACTIVATION_BUDGET", "60%")
    trained: list[Any] = []
    for chosen in ("auto", "hcb"):
        model = models["Model"]()
        torch.manual_seed(2)
        trainer = trainer_for(chosen)
        trainer.fit(model, batches(4))
        trained.append(model)
    assert_same(trained[1], trained[0])
    assert trainer.strategy.hcb_config.activation_budget == "60%"
    assert 0 < trainer.progress_bar_metrics["hcb/recompute_share"] < 1
    assert trainer.progress_bar_metrics["hcb/peak_mib"] > 0
