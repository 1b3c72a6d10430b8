"""Build the networks that the recipes train, with their repeated blocks and their losses.

The networks come from public libraries and have random weights: nothing is downloaded. The ResNet is
`torchvision.models.ResNet` where torchvision can be imported, else transformers' `ResNetForImageClassification` (a
wheel built for CUDA cannot be imported beside a CPU-only torch). `Workload.source` names the one that was built.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, assert_never, cast

import torch
from torch import Tensor, nn

from recipes.config import (
    Architecture,
    ModelConfig,
    OptimizerName,
    Precision,
    ResNetShape,
    Shape,
    TransformerShape,
    UNetShape,
)
from recipes.data import NUM_NOISE_LEVELS, Batch
from tinybp_lightning.errors import ConfigError

__all__ = ["Workload", "build_workload", "make_optimizer"]

NUM_DIGITS = 10


@dataclass(frozen=True, slots=True)
class Workload:
    """A network ready to train. `blocks` are its repeated layers in execution order; `source` names its class."""

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    loss_of: Callable[[nn.Module, Batch], Tensor]
    precision: Precision
    source: str

    def loss(self, batch: Batch) -> Tensor:
        """Run the model on `batch` and return its loss, under autocast if the precision asks for it."""
        with self._autocast(next(self.model.parameters()).device.type):
            return self.loss_of(self.model, batch)

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.precision is Precision.bf16_autocast:
            return torch.autocast(device_type, dtype=torch.bfloat16)
        return nullcontext()


@dataclass(frozen=True, slots=True)
class _Network:
    model: nn.Module
    blocks: tuple[nn.Module, ...]
    loss_of: Callable[[nn.Module, Batch], Tensor]
    source: str
    is_channels_last: bool = False


def build_workload(model: ModelConfig, shape: Shape, *, seed: int, device: torch.device) -> Workload:
    """Return the network of `model` at the extents of `shape`, in training mode on `device`.

    **Returns:** a workload whose weights depend on the arguments alone.

    **Raises:** `ConfigError` when the architecture does not belong to the model's family.
    """
    torch.manual_seed(seed)
    network = _network(model, shape)
    network.model.to(device)
    if shape.precision is Precision.bf16:
        network.model.to(torch.bfloat16)
    if network.is_channels_last:
        cast(Any, network.model).to(memory_format=torch.channels_last)
    network.model.train()
    return Workload(network.model, network.blocks, network.loss_of, shape.precision, network.source)


def _network(model: ModelConfig, shape: Shape) -> _Network:
    match model.architecture, shape:
        case Architecture.llama, TransformerShape():
            return _llama(shape)
        case Architecture.gpt2, TransformerShape():
            return _gpt2(shape, model.dropout)
        case Architecture.resnet, ResNetShape():
            return _resnet(shape)
        case Architecture.unet, UNetShape():
            return _unet(shape, model.dropout)
        case _:
            raise ConfigError(
                f"`model.architecture={model.architecture.value}` does not fit a `shape` of type "
                f"`{type(shape).__name__}`: use llama or gpt2 for a transformer, resnet or unet for the others."
            )


def _llama(shape: TransformerShape) -> _Network:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  seconds to import; one family a run

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.num_tokens,
        # Training does not use the key-value cache, which would keep keys and values alive.
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    return _Network(model, tuple(model.model.layers), _own_loss, "transformers.LlamaForCausalLM")


def _gpt2(shape: TransformerShape, dropout: float) -> _Network:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415  seconds to import; one family a run

    config = GPT2Config(
        n_embd=shape.hidden_size,
        n_inner=shape.intermediate_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        vocab_size=shape.vocab_size,
        n_positions=shape.num_tokens,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    # Without it, the loss warns at every trace, and the warning breaks a compiled graph.
    model.loss_type = "ForCausalLM"
    return _Network(model, tuple(model.transformer.h), _own_loss, "transformers.GPT2LMHeadModel")


def _resnet(shape: ResNetShape) -> _Network:
    try:
        torchvision_resnet: Any = importlib.import_module("torchvision.models.resnet")
    except (ImportError, RuntimeError):
        # It is absent, or it was built for another torch (then its import raises RuntimeError).
        return _transformers_resnet(shape)
    layer = torchvision_resnet.Bottleneck if shape.bottleneck else torchvision_resnet.BasicBlock
    model = torchvision_resnet.ResNet(layer, list(shape.depths), num_classes=NUM_DIGITS)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    blocks = tuple(block for stage in stages for block in stage)
    return _Network(model, blocks, _cross_entropy, "torchvision.models.ResNet", shape.channels_last)


def _transformers_resnet(shape: ResNetShape) -> _Network:
    """Build the same network (version 1.5: the stride is in the 3x3 convolution) with transformers' module names."""
    from transformers import ResNetConfig, ResNetForImageClassification  # noqa: PLC0415  one family a run

    config: ResNetConfig = cast(Any, ResNetConfig)(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048] if shape.bottleneck else [64, 128, 256, 512],
        depths=list(shape.depths),
        layer_type="bottleneck" if shape.bottleneck else "basic",
        num_labels=NUM_DIGITS,
    )
    model = ResNetForImageClassification(config)
    stages = cast(Any, model).resnet.encoder.stages
    blocks = tuple(block for stage in stages for block in stage.layers)
    source = "transformers.ResNetForImageClassification"
    return _Network(model, blocks, _own_loss, source, shape.channels_last)


def _unet(shape: UNetShape, dropout: float) -> _Network:
    from diffusers.models.unets.unet_2d import UNet2DModel  # noqa: PLC0415  seconds to import; one family a run

    levels = range(len(shape.channels))
    down = tuple("AttnDownBlock2D" if level in shape.attention else "DownBlock2D" for level in levels)
    up = tuple("AttnUpBlock2D" if level in shape.attention else "UpBlock2D" for level in reversed(levels))
    model = cast(Any, UNet2DModel)(
        sample_size=shape.image_size,
        block_out_channels=tuple(shape.channels),
        layers_per_block=shape.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=shape.norm_num_groups,
        num_train_timesteps=NUM_NOISE_LEVELS,
        dropout=dropout,
    )
    parts = [*model.down_blocks, model.mid_block, *model.up_blocks]
    blocks = tuple(resnet for part in parts for resnet in part.resnets)
    return _Network(model, blocks, _noise_error, "diffusers.UNet2DModel", shape.channels_last)


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs).loss


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch.inputs["pixel_values"]), batch.inputs["labels"])


def _noise_error(model: nn.Module, batch: Batch) -> Tensor:
    assert batch.target is not None
    return nn.functional.mse_loss(model(**batch.inputs).sample, batch.target)


def make_optimizer(config: ModelConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over every parameter of `model`."""
    match config.optimizer:
        case OptimizerName.sgd:
            return torch.optim.SGD(model.parameters(), lr=config.learning_rate)
        case OptimizerName.adamw:
            return torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        case _:
            assert_never(config.optimizer)
