"""Can a fit be stopped under one strategy and resumed under the other, in both directions?"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def fit(
    pl: ModuleType, hcb: ModuleType, models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any
) -> Callable[..., tuple[Any, Path]]:
    """Fit to `max_epochs` under the named strategy; return the model and its last checkpoint."""

    def run(name: str, folder: Path, *, max_epochs: int, ckpt_path: Path | None = None) -> tuple[Any, Path]:
        strategy = "auto" if name == "plain" else hcb.HCBStrategy(activation_budget="60%", executor="eager")
        callback = pl.callbacks.ModelCheckpoint(folder, save_last=True)
        trainer = trainer_for(strategy, callbacks=[callback], enable_checkpointing=True, max_epochs=max_epochs)
        # Dropout draws from the global generator, which a checkpoint does not hold: every run starts from one seed.
        torch.manual_seed(3)
        model = models["Model"]()
        trainer.fit(model, batches(3), ckpt_path=ckpt_path, weights_only=False)
        return model, folder / "last.ckpt"

    return run


@pytest.mark.parametrize(("first", "second"), [("plain", "hcb"), ("hcb", "plain"), ("hcb", "hcb")])
def test_resume(fit: Callable[..., tuple[Any, Path]], tmp_path: Path, first: str, second: str) -> None:
    _, reference_ckpt = fit("plain", tmp_path / "reference", max_epochs=1)
    expected, expected_ckpt = fit("plain", tmp_path / "expected", max_epochs=2, ckpt_path=reference_ckpt)
    _, ckpt = fit(first, tmp_path / "first", max_epochs=1)
    found, found_ckpt = fit(second, tmp_path / "second", max_epochs=2, ckpt_path=ckpt)
    assert len(found.losses) == len(expected.losses) == 3
    assert all(torch.equal(*pair) for pair in zip(found.losses, expected.losses, strict=True))
    saved = [torch.load(path, weights_only=False) for path in (found_ckpt, expected_ckpt)]
    assert list(saved[0]) == list(saved[1])
    torch.testing.assert_close(saved[0]["state_dict"], saved[1]["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(saved[0]["optimizer_states"], saved[1]["optimizer_states"], rtol=0, atol=0)


def test_a_checkpoint_under_hcb_loads_without_it(
    fit: Callable[..., tuple[Any, Path]], models: dict[str, Any], tmp_path: Path
) -> None:
    trained, ckpt = fit("hcb", tmp_path, max_epochs=1)
    loaded = models["Model"].load_from_checkpoint(ckpt, weights_only=False)
    expected = trained.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
