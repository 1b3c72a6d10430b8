"""A module that is trained without being called says so once; a called one has no hooks of ours left."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import Residual
from tinybp_lightning.capture.torch.private import has_gradient_hooks
from tinybp_lightning.errors import HCBWarning

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Residual(16, 0.0), Residual(16, 0.0)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


def has_hooks(model: nn.Module) -> bool:
    return any(has_gradient_hooks(p) for p in model.parameters())


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_training_by_another_method_than_forward_says_so_once(method: str) -> None:
    model = tbp.hcb(TwoWays(), activation_budget="80%")
    losses = [getattr(model, method)(X).square().mean() for _ in range(3)]
    with pytest.warns(HCBWarning, match="`TwoWays` is trained plainly, .* `forward` had not run") as caught:
        torch.autograd.backward(losses)
    assert len(caught) == 1
    assert has_hooks(model)
    tbp.restore(model)
    assert not has_hooks(model)


def test_a_model_that_is_called_has_no_hooks_left() -> None:
    model = tbp.hcb(TwoWays(), activation_budget="100%", plan_cache=False)
    with torch.no_grad():
        model(X)
    assert has_hooks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HCBWarning)
        model(X).square().mean().backward()
        assert not has_hooks(model)
        model.encode(X).square().mean().backward()  # beside the steps that are planned: a penalty, say


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_can_be_made_and_watch_nothing(copied: object) -> None:
    model = tbp.hcb(TwoWays(), activation_budget="100%", plan_cache=False)
    other = copied(model)  # type: ignore[operator]
    assert has_hooks(model)
    assert not has_hooks(other)
