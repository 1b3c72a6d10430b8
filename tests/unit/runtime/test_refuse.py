"""Are layers that cannot be run twice with the same result refused, and only those?"""

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tinybp_lightning.runtime.torch import refuse


@pytest.mark.parametrize(
    ("layer", "device", "expected"),
    [
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), "cuda", True),
        (nn.GRU(2, 2, num_layers=2, dropout=0.1), "cuda", True),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), "cpu", False),
        (nn.LSTM(2, 2, num_layers=2), "cuda", False),
        (nn.Dropout(0.1), "cuda", False),
    ],
)
def test_what_redraws_its_dropout(layer: nn.Module, device: str, expected: bool) -> None:
    assert refuse.redraws_dropout(layer, torch.device(device)) is expected


def test_the_first_training_step_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_recurrent(layer: nn.Module, _: torch.device) -> bool:
        return isinstance(layer, nn.RNNBase)

    monkeypatch.setattr(refuse, "redraws_dropout", is_recurrent)
    model = tbp.hcb(nn.Sequential(nn.LSTM(2, 2, num_layers=2, dropout=0.1)), activation_budget="100%")
    with pytest.raises(tbp.UnsupportedModuleError, match=r"num_layers=2, dropout=0\.1"):
        model(torch.randn(3, 1, 2))
