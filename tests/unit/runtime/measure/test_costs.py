"""What a block is measured to need must not depend on how it is measured."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, residual_net, train
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch.measure import timer

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def _measured_chain(monkeypatch: pytest.MonkeyPatch, *, repeats: int) -> Chain:
    monkeypatch.setattr(timer, "_REPEATS", repeats)
    model, recorder = residual_net(), Recorder()
    # What the first measurement put on disk would serve the second.
    config = tbp.HCBConfig(activation_budget="100%", plan_cache=False)
    tbp.hcb(model, config=config, observers=[recorder])
    train(model, lambda m: m(X).square().mean(), steps=2)
    return recorder.plans[0].chain


def test_bytes_do_not_depend_on_how_often_a_block_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    once, often = (_measured_chain(monkeypatch, repeats=repeats) for repeats in (1, 4))
    for one, other in zip(once.blocks, often.blocks, strict=True):
        assert other.forward_peak_bytes == one.forward_peak_bytes
        for option, again in zip(one.options, other.options, strict=True):
            assert again.save_peak_bytes == option.save_peak_bytes
            # A replay that starts with the slots of the one before would hold them twice.
            assert again.replay_peak_bytes == option.replay_peak_bytes


class _Joining(nn.Module):
    """Like a U-Net: what its first convolution makes is joined with what comes long after."""

    def __init__(self, *, concatenates: bool) -> None:
        super().__init__()
        self.concatenates = concatenates
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.head = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.stem(F.silu(x))
        for conv in self.layers:
            x = conv(F.silu(x))
        x = F.silu(torch.cat([x, skip], 1) if self.concatenates else (x + skip).repeat(1, 2, 1, 1))
        return F.silu(self.head(x))


def _backward_of_the_stem(*, concatenates: bool) -> int:
    torch.manual_seed(0)
    model, recorder = _Joining(concatenates=concatenates), Recorder()
    tbp.hcb(model, config=tbp.HCBConfig(activation_budget="100%", plan_cache=False), observers=[recorder])
    train(model, lambda m: m(torch.ones(2, 8, 16, 16)).square().mean(), steps=1)
    stem, *_ = recorder.plans[0].chain.blocks
    return stem.options[0].backward_peak_bytes


def test_a_gradient_that_must_be_copied_first_is_measured_as_it_will_come() -> None:
    """The gradients of the parts of a concatenation are views of one tensor, and a convolution copies its own."""
    gradient_bytes = 2 * 8 * 16 * 16 * 4
    assert _backward_of_the_stem(concatenates=True) == _backward_of_the_stem(concatenates=False) + gradient_bytes
