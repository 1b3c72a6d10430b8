"""What the caller does with a module's results sets what backward holds: presumed at first, then seen."""

import copy

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import LossOf, Recorder, assert_all_same, peak_bytes, residual_net, train

WIDTH, CLASSES, ROWS = 16, 512, 64


class Scores(nn.Module):
    """A body, a wide head, and two results: what is differentiated is the caller's choice."""

    def __init__(self, *, with_loss: bool) -> None:
        super().__init__()
        self.body = residual_net(4, dropout=0.0)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.with_loss = with_loss

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(x)
        scores = self.head(hidden)
        return (scores.float().logsumexp(-1).mean() if self.with_loss else hidden), scores


X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def through_first(model: nn.Module) -> torch.Tensor:
    return model(X)[0].square().mean()


def through_both(model: nn.Module) -> torch.Tensor:
    first, scores = model(X)
    return first.square().mean() + scores.square().mean()


@pytest.mark.parametrize("with_loss", [True, False], ids=["loss", "hidden"])
@pytest.mark.parametrize("loss_of", [through_first, through_both])
def test_the_prediction_follows_what_is_differentiated(with_loss: bool, loss_of: LossOf) -> None:
    """A gradient of the scores (128 KiB) is counted where the caller makes one, and only there."""
    plain, recorder = Scores(with_loss=with_loss), Recorder()
    model = copy.deepcopy(plain)
    expected = train(plain, loss_of, steps=4)
    plain_bytes = peak_bytes(plain, loss_of)
    tbp.hcb(model, activation_budget=int(0.9 * plain_bytes), observers=[recorder])
    assert_all_same(train(model, loss_of, steps=4), expected)
    measured_bytes = peak_bytes(model, loss_of)
    assert measured_bytes <= 0.9 * plain_bytes
    assert recorder.plans[-1].predicted_peak_bytes == pytest.approx(measured_bytes, rel=0.01)
