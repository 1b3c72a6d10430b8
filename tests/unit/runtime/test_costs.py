"""What a block is measured to need must not depend on how it is measured."""

import pytest
import torch

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, residual_net, train
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch import clock

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def _measured_chain(monkeypatch: pytest.MonkeyPatch, *, repeats: int) -> Chain:
    monkeypatch.setattr(clock, "_REPEATS", repeats)
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
