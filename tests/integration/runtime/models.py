"""The three kinds of model that the exactness tests train: unmodified library code, by configuration, small."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

__all__ = ["WORKLOADS", "Workload", "checkpointed"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A model with its loss; `layers` are what people checkpoint one by one."""

    make: Callable[[], nn.Module]
    loss_of: Callable[[nn.Module], torch.Tensor]
    layers: Callable[[nn.Module], list[nn.Module]]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


TOKENS = torch.randint(0, 128, (4, 32), generator=generator())
IMAGES = torch.randn(4, 3, 32, 32, generator=generator())
LABELS = torch.arange(4)
NOISE = torch.randn(4, 3, 16, 16, generator=generator())
TIMES = torch.tensor([1, 20, 300, 900])


def transformer() -> nn.Module:
    """GPT-2 with its dropout."""
    config = GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=5,
        n_head=4,
        n_positions=64,
        use_cache=False,
        loss_type="ForCausalLM",
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    """Many narrow layers behind a modest stem, with BatchNorm."""
    config = ResNetConfig(num_labels=10, embedding_size=8, hidden_sizes=[32, 64], depths=[4, 4], layer_type="basic")
    return ResNetForImageClassification(config)


def unet() -> nn.Module:
    """Skips from every layer of the way down to the way up, attention in the middle, dropout."""
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        dropout=0.1,
    )


def denoising_loss(model: nn.Module) -> torch.Tensor:
    return F.mse_loss(model(NOISE, TIMES).sample, NOISE.flip(0))


WORKLOADS = {
    "transformer": Workload(
        transformer, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, lambda m: list(m.transformer.h)
    ),
    "resnet": Workload(
        resnet,
        lambda m: F.cross_entropy(m(pixel_values=IMAGES).logits, LABELS),
        lambda m: [m.resnet.embedder, *(layer for stage in m.resnet.encoder.stages for layer in stage.layers)],
    ),
    "unet": Workload(unet, denoising_loss, lambda m: [*m.down_blocks, m.mid_block, *m.up_blocks]),
}


def checkpointed(workload: Workload) -> nn.Module:
    """Return the model with every layer checkpointed, as people do by hand."""
    model = made(workload)
    for layer in workload.layers(model):
        forward = layer.forward

        def replayed(*args: object, forward: Callable[..., object] = forward, **kwargs: object) -> object:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        layer.forward = replayed  # type: ignore[method-assign]
    return model


def made(workload: Workload) -> nn.Module:
    """Return a new model, always with the same weights, in training mode."""
    torch.manual_seed(0)
    return workload.make().train()
