"""Is the caller's attention mask answered for without a break in the graph, and never for another mask?"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinybp_lightning as tbp
from tinybp_lightning.capture.torch.masks import mask_functions
from tinybp_lightning.runtime.torch.api import targets

_ONES = torch.ones(2, 8, dtype=torch.long)
_PADDED = torch.ones(2, 8, dtype=torch.long).index_fill(1, torch.tensor([6, 7]), 0)


def _forward(x: Any = None, attention_mask: Any = None, decoder_attention_mask: Any = None, batch: Any = None) -> None:
    _ = (x, attention_mask, decoder_attention_mask, batch)


@pytest.mark.parametrize(
    ("args", "kwargs", "answer"),
    [
        pytest.param((), {"attention_mask": _ONES}, "ones", id="ones"),
        pytest.param((), {"attention_mask": _PADDED}, "padding", id="padding"),
        pytest.param((None, _PADDED), {}, "padding", id="positional"),
        pytest.param((), {"batch": {"attention_mask": _ONES.bool()}}, "ones", id="in a batch"),
        pytest.param((), {"attention_mask": _ONES, "decoder_attention_mask": _ONES}, "ones", id="both"),
        pytest.param((), {"attention_mask": _ONES, "decoder_attention_mask": _PADDED}, "", id="one of two"),
        pytest.param((), {"attention_mask": _ONES[:, None, None]}, "", id="not one number a token"),
        pytest.param((_ONES,), {}, "", id="no mask"),
        pytest.param((), {"mistyped": _ONES}, "", id="a wrong call"),
    ],
)
def test_the_answer_is_about_the_masks_that_are_passed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], answer: str
) -> None:
    functions = mask_functions(_forward, args, kwargs)
    assert {name for _, name, _ in functions} == (
        {"_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"} if answer else set()
    )
    assert {function.__name__.rpartition("_")[2] for _, _, function in functions} == ({answer} if answer else set())


def _llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


class _ComputesItsMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask * (input_ids >= 0)).logits


class _PassesItsMask(_ComputesItsMask):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


class _ReshapesItsMask(_ComputesItsMask):
    """As GPT-2 does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.bool().view(input_ids.shape[0], -1)
        return self.inner(input_ids=input_ids, attention_mask=mask).logits


def _train_both(build: Callable[[], nn.Module], masks: list[Tensor]) -> nn.Module:
    plain, ours = build().train(), build().train()
    ours.load_state_dict(plain.state_dict())
    tbp.hcb(ours, activation_budget="90%", executor="eager")
    tokens = torch.randint(0, 64, (2, 8))
    for mask in masks:
        losses: list[Tensor] = []
        for module in (plain, ours):
            module.zero_grad()
            losses.append(module(tokens, attention_mask=mask).square().mean())
            losses[-1].backward()
        assert torch.equal(*losses)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    return ours


@pytest.mark.parametrize("build", [_PassesItsMask, _ReshapesItsMask])
def test_each_answer_has_a_graph_and_both_are_what_eager_execution_runs(build: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", tbp.HCBWarning)
        ours = _train_both(build, [_ONES, _PADDED, _ONES, _PADDED, _ONES])
    (target,) = targets(ours)
    assert len(target.traced_modules) == 2


def test_a_mask_that_is_computed_goes_to_module_steps() -> None:
    with pytest.warns(tbp.HCBWarning, match="cannot be traced as one graph"):
        ours = _train_both(_ComputesItsMask, [_ONES, _PADDED])
    (target,) = targets(ours)
    assert target.module_steps is not None
