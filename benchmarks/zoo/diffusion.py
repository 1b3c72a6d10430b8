"""Diffusion models of diffusers, built small from their configs."""

import torch
from torch import Tensor, nn

from benchmarks.zoo.architecture import Architecture, Batch, Phase, Workload

__all__ = ["DIFFUSION"]


def _noise_loss(module: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "noise"}
    return nn.functional.mse_loss(module(**inputs).sample, batch["noise"])


def _unet(seed: int) -> Workload:
    from diffusers.models.unets.unet_2d import UNet2DModel  # noqa: PLC0415 - seconds to import

    torch.manual_seed(seed)
    module = UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        dropout=0.1,
    ).train()
    batch = {
        "sample": torch.randn(4, 3, 32, 32),
        "timestep": torch.tensor([1, 40, 500, 999]),
        "noise": torch.randn(4, 3, 32, 32),
    }
    return Workload(module, batch, (Phase(_noise_loss),))


def _dit(seed: int) -> Workload:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: PLC0415 - seconds

    torch.manual_seed(seed)
    module = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        dropout=0.1,
        norm_num_groups=8,
        sample_size=16,
        num_embeds_ada_norm=10,
    ).train()
    batch = {
        "hidden_states": torch.randn(8, 4, 16, 16),
        "timestep": torch.randint(0, 1000, (8,)),
        "class_labels": torch.randint(0, 10, (8,)),
        "noise": torch.randn(8, 4, 16, 16),
    }
    return Workload(module, batch, (Phase(_noise_loss),))


def _autoencoder_loss(module: nn.Module, batch: Batch) -> Tensor:
    # Draws the latent from its posterior inside the forward.
    decoded = module(batch["sample"], sample_posterior=True).sample
    return nn.functional.l1_loss(decoded, batch["sample"])


def _autoencoder(seed: int) -> Workload:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: PLC0415 - seconds to import

    torch.manual_seed(seed)
    module = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    ).train()
    return Workload(module, {"sample": torch.randn(2, 3, 32, 32)}, (Phase(_autoencoder_loss),))


DIFFUSION = (
    Architecture("unet", _unet),
    Architecture("dit", _dit),
    Architecture("autoencoder_kl", _autoencoder),
)
