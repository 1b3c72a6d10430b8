"""Are layers that cannot be run twice with the same result refused, and only those?"""

from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tbp.hcb(m, observers=5), "`observers=5` is not a sequence"),
        (lambda m: tbp.hcb(m, observers="ab"), "is not a sequence"),
        (lambda m: tbp.hcb(m, observers=[5]), "a `int` without a method `on_plan`"),
        (lambda m: tbp.hcb(m, config={"memory_budget": "1GiB"}), "is not an HCBConfig"),
        (lambda m: tbp.attach(m, config="1GiB"), "is not an HCBConfig"),
        (lambda m: tbp.attach(m, discover="yes"), "`discover='yes'`"),
        (lambda m: tbp.hcb(m, executor=["eager"]), "is unknown"),
    ],
)
def test_options_of_a_wrong_type(call: Callable[[nn.Module], Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(tbp.ConfigError, match=message):
        call(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("call", [tbp.hcb, tbp.attach, tbp.restore, tbp.explain, tbp.keep])
def test_what_is_no_module(call: Callable[[Any], Any]) -> None:
    with pytest.raises(tbp.UnsupportedModuleError, match=r"`list` is not a torch\.nn\.Module"):
        call([nn.Linear(2, 2)])


class ObserverBase(nn.Module):
    """By the name that torch.ao's own have."""


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "TorchScript"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "DistributedDataParallel"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(2, 2), r"`1` \(`Linear`\) is quantised"),
        (ObserverBase, "observes ranges"),
    ],
)
def test_what_is_not_trained(make: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), make())
    with pytest.raises(tbp.UnsupportedModuleError, match=message):
        tbp.hcb(model, activation_budget="100%")
    assert "forward" not in vars(model)
    tbp.attach(model, discover=True)  # it may never be trained
    with pytest.raises(tbp.UnsupportedModuleError, match=message):
        model(torch.ones(3, 2))


def test_a_captured_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tbp.hcb(nn.Sequential(nn.Linear(2, 2)), activation_budget="1MiB")
    model(torch.ones(3, 2)).sum().backward()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(tbp.UnsupportedModuleError, match="CUDA graph"):
        model(torch.ones(3, 2))
    with torch.no_grad():
        model(torch.ones(3, 2))
