"""Vision models of transformers, built small from their configs, as classifiers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo.architecture import Architecture, Batch, Blocks, Phase, Workload

__all__ = ["VISION"]

_NUM_CLASSES = 10


def _classification_loss(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch["pixel_values"]).logits, batch["labels"])


def _classifier(
    name: str, *, batch_size: int = 8, side: int = 32, head: str = "ForImageClassification", **config: object
) -> Callable[[int], Workload]:
    def build(seed: int) -> Workload:
        import transformers  # noqa: PLC0415 - seconds to import

        torch.manual_seed(seed)
        made = getattr(transformers, f"{name}Config")(num_labels=_NUM_CLASSES, **config)
        module = getattr(transformers, f"{name}{head}")(made).train()
        batch = {
            "pixel_values": torch.randn(batch_size, 3, side, side),
            "labels": torch.randint(0, _NUM_CLASSES, (batch_size,)),
        }
        return Workload(module, batch, (Phase(_classification_loss),))

    return build


def _segmentation_loss(module: nn.Module, batch: Batch) -> Tensor:
    return module(**batch).loss


def _segformer(seed: int) -> Workload:
    import transformers  # noqa: PLC0415 - seconds to import

    torch.manual_seed(seed)
    config = transformers.SegformerConfig(
        num_labels=_NUM_CLASSES,
        hidden_sizes=[16, 32, 48, 64],
        depths=[2, 2, 2, 2],
        num_attention_heads=[1, 2, 3, 4],
        sr_ratios=[4, 2, 2, 1],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32,
        drop_path_rate=0.2,
    )
    module = transformers.SegformerForSemanticSegmentation(config).train()
    batch = {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.randint(0, _NUM_CLASSES, (4, 64, 64))}
    return Workload(module, batch, (Phase(_segmentation_loss),))


_TRANSFORMER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

VISION = (
    Architecture("vit", _classifier("ViT", **_TRANSFORMER, **_DROPOUT), is_fast=True),
    Architecture("deit", _classifier("DeiT", **_TRANSFORMER, **_DROPOUT)),
    Architecture(
        "beit", _classifier("Beit", **_TRANSFORMER, **_DROPOUT, drop_path_rate=0.2, use_relative_position_bias=True)
    ),
    Architecture(
        "dinov2",
        _classifier(
            "Dinov2",
            hidden_size=64,
            mlp_ratio=2,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            drop_path_rate=0.2,
        ),
    ),
    Architecture(
        "swin",
        _classifier(
            "Swin",
            image_size=32,
            patch_size=2,
            embed_dim=32,
            depths=[2, 2, 2],
            num_heads=[2, 4, 8],
            window_size=4,
            mlp_ratio=2.0,
            drop_path_rate=0.2,
        ),
    ),
    Architecture("segformer", _segformer, blocks=Blocks.MODULE),  # installs hooks under a lock in its first forward
    Architecture(
        "convnext",
        _classifier("ConvNext", hidden_sizes=[16, 32, 64, 96], depths=[2, 2, 2, 2], patch_size=2, drop_path_rate=0.2),
    ),
    Architecture(
        "resnet",
        _classifier("ResNet", embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[3, 3, 3, 2], side=64),
        is_fast=True,
    ),
    Architecture(
        "regnet",
        _classifier(
            "RegNet", embedding_size=16, hidden_sizes=[16, 32, 64, 96], depths=[3, 3, 3, 2], groups_width=8, side=64
        ),
    ),
    Architecture(
        "efficientnet",
        _classifier(
            "EfficientNet",
            width_coefficient=0.3,
            depth_coefficient=0.6,
            hidden_dim=384,
            dropout_rate=0.2,
            drop_connect_rate=0.2,
            side=64,
        ),
    ),
    Architecture("mobilenet_v2", _classifier("MobileNetV2", depth_multiplier=0.35, side=64, finegrained_output=False)),
)
