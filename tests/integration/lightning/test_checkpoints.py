"""Can a fit be stopped under one strategy and resumed under the other, in both directions?"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def fit(hcb: ModuleType, models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any) -> Callable[..., Any]:
    """Fit to `max_epochs` under the named strategy, save at the end of the training, return the model."""

    def run(name: str, saved: Path, *, max_epochs: int, ckpt_path: Path | None = None) -> Any:
        strategy = "auto" if name == "plain" else hcb.HCBStrategy(activation_budget="60%", executor="eager")
        trainer = trainer_for(strategy, max_epochs=max_epochs)
        model = models["Model"]()
        model.on_train_end = lambda: trainer.save_checkpoint(saved)
        # Dropout draws from the global generator, which a checkpoint does not hold: every run starts from one seed.
        torch.manual_seed(3)
        trainer.fit(model, batches(3), ckpt_path=ckpt_path, weights_only=False)
        return model

    return run


@pytest.mark.parametrize(("first", "second"), [("plain", "hcb"), ("hcb", "plain"), ("hcb", "hcb")])
def test_resume(fit: Callable[..., Any], tmp_path: Path, first: str, second: str) -> None:
    fit("plain", tmp_path / "reference", max_epochs=1)
    expected = fit("plain", tmp_path / "expected", max_epochs=2, ckpt_path=tmp_path / "reference")
    fit(first, tmp_path / "first", max_epochs=1)
    found = fit(second, tmp_path / "second", max_epochs=2, ckpt_path=tmp_path / "first")
    assert len(found.losses) == len(expected.losses) == 3
    assert all(torch.equal(*pair) for pair in zip(found.losses, expected.losses, strict=True))
    ours, plain = (torch.load(tmp_path / name, weights_only=False) for name in ("second", "expected"))
    assert list(ours) == list(plain)
    torch.testing.assert_close(ours["state_dict"], plain["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer_states"], plain["optimizer_states"], rtol=0, atol=0)


def test_a_checkpoint_under_hcb_loads_without_it(
    fit: Callable[..., Any], models: dict[str, Any], tmp_path: Path
) -> None:
    trained = fit("hcb", tmp_path / "saved", max_epochs=1)
    loaded = models["Model"].load_from_checkpoint(tmp_path / "saved", weights_only=False)
    expected = trained.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
