"""Models of `transformers` train without the caches that they fill by default, and say so; who asks for one gets it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import tinybp_lightning as tbp
from tests.unit.runtime.training import assert_all_same, train
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.torch import targets

IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))


def gpt2() -> Any:
    torch.manual_seed(0)
    config: Any = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=2
    )
    assert config.use_cache is True
    model: Any = GPT2LMHeadModel(config)
    return model.train()


class Broken(nn.Module):
    """Looks at a value, so that the layers' calls become the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()
        self.config = self.model.config

    def forward(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        if int(ids.sum()) < 0:
            raise ValueError("no token is negative")
        return self.model(ids, **kwargs)


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("kind", [gpt2, Broken])
def test_same_training_in_the_memory_that_it_takes_without_a_cache(kind: Callable[[], Any]) -> None:
    model = tbp.hcb(kind(), activation_budget="70%", plan_cache=False)
    with pytest.warns(HCBWarning, match="is trained without its cache of keys and values"):
        got = train(model, lambda m: m(IDS, labels=IDS).loss)
    assert_all_same(got, train(kind(), lambda m: m(IDS, labels=IDS).loss))
    (report,) = targets(model)[0].reports
    assert report.num_kept < len(report.chain.blocks)
    assert model.config.use_cache is True


@pytest.mark.parametrize("given", [{"use_cache": True}, {"use_cache": False}])
def test_who_says_what_he_wants_gets_it_without_a_word(given: dict[str, bool]) -> None:
    model = tbp.hcb(gpt2(), activation_budget="100%", plan_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HCBWarning)
        out = model(IDS, labels=IDS, **given)
    assert (out.past_key_values is not None) is given["use_cache"]


@pytest.mark.filterwarnings("ignore:`GPT2LMHeadModel` is trained without its cache")
def test_evaluation_and_generation_keep_their_cache() -> None:
    model, plain = tbp.hcb(gpt2(), activation_budget="70%", plan_cache=False), gpt2()
    assert model(IDS, labels=IDS).past_key_values is None
    with torch.no_grad():
        assert model(IDS).past_key_values is not None
    found = [m.eval().generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, plain)]
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:`GPT2LMHeadModel` is trained without its cache")
def test_the_option_is_as_it_was_after_an_error() -> None:
    model = tbp.hcb(gpt2(), activation_budget="70%", plan_cache=False)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        model(torch.zeros(1, 1000, dtype=torch.long))
    assert model.config.use_cache is True
    assert copy.deepcopy(model).config.use_cache is True
