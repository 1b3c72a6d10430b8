"""Define the Hydra schema of `conf/`: every key there is a field of the same name here.

The classes are not frozen because OmegaConf writes into them while it composes a run. Nothing writes to them later.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from tinybp_lightning.errors import ConfigError

__all__ = [
    "Architecture",
    "CompareConfig",
    "ModelConfig",
    "ModelName",
    "OptimizerName",
    "Precision",
    "ResNetShape",
    "Shape",
    "SizeConfig",
    "TransformerShape",
    "UNetShape",
    "compose_config",
    "conf_dir",
    "load_config",
    "register_schemas",
    "save_config",
    "to_compare_config",
]


class ModelName(Enum):
    """The model families that the recipes train."""

    transformer = "transformer"
    resnet = "resnet"
    unet = "unet"


class Architecture(Enum):
    """The network of a family: Llama or GPT-2 for the transformer; the other families have one each."""

    llama = "llama"
    gpt2 = "gpt2"
    resnet = "resnet"
    unet = "unet"


class Precision(Enum):
    """Number format of parameters and activations (`fp32`, `bf16`), or of autocast regions alone (`bf16_autocast`)."""

    fp32 = "fp32"
    bf16 = "bf16"
    bf16_autocast = "bf16_autocast"


class OptimizerName(Enum):
    """The optimizer that runs between two steps. Its time and memory are not measured."""

    sgd = "sgd"
    adamw = "adamw"


@dataclass(slots=True)
class ModelConfig:
    """The model to train, at any size. `dropout` applies to GPT-2 and to the U-Net; Llama and ResNet have none."""

    name: ModelName = MISSING
    architecture: Architecture = MISSING
    dropout: float = 0.0
    optimizer: OptimizerName = OptimizerName.adamw
    learning_rate: float = 1e-3


@dataclass(slots=True)
class Shape:
    """The extents that every family has."""

    batch_size: int = MISSING
    precision: Precision = Precision.fp32


@dataclass(slots=True)
class TransformerShape(Shape):
    """Extents of a Llama or GPT-2. The input is bytes: `vocab_size` is at least 256; more only enlarges the logits."""

    num_tokens: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    vocab_size: int = 256


@dataclass(slots=True)
class ResNetShape(Shape):
    """Extents of a ResNet: blocks in each of its four stages, bottleneck blocks or basic ones."""

    image_size: int = MISSING
    depths: list[int] = MISSING
    bottleneck: bool = True
    channels_last: bool = False


@dataclass(slots=True)
class UNetShape(Shape):
    """Extents of a `diffusers.UNet2DModel`: one down and one up block for each entry of `channels`.

    The blocks whose index is in `attention` have self-attention.
    """

    image_size: int = MISSING
    channels: list[int] = MISSING
    layers_per_block: int = 2
    attention: list[int] = field(default_factory=list[int])
    norm_num_groups: int = 32
    channels_last: bool = False


@dataclass(slots=True)
class SizeConfig:
    """The length of one measurement: `steps` optimizer steps, of which the first `warmup_steps` are not timed."""

    name: str = MISSING
    steps: int = MISSING
    warmup_steps: int = MISSING
    timeout_s: float = MISSING


@dataclass(slots=True)
class CompareConfig:
    """One comparison: a model, its extents, a budget, and the modes that train it.

    `mode` is `all`, a mode's name, or a list of names. `naive` always runs, because the others are compared with it.
    `budget` bounds activations: bytes (`"2GiB"`) or a share of what plain training keeps (`"30%"`). `device` is `auto`,
    `cpu` or `cuda`. `threads=0` leaves the number of threads to torch.
    """

    model: ModelConfig = MISSING
    size: SizeConfig = MISSING
    shape: Shape = MISSING
    budget: str = "30%"
    mode: Any = "all"
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    deterministic: bool = False


SHAPES: dict[ModelName, type[Shape]] = {
    ModelName.transformer: TransformerShape,
    ModelName.resnet: ResNetShape,
    ModelName.unet: UNetShape,
}


def conf_dir() -> Path:
    """Return the absolute folder of the Hydra configuration: beside this package in a checkout, or else in the wheel.

    **Raises:** `ConfigError` when it is in neither place.
    """
    beside = Path(__file__).resolve().parent.parent
    for candidate in (beside / "conf", beside / "tinybp_lightning" / "conf"):
        if (candidate / "compare.yaml").is_file():
            return candidate
    raise ConfigError(f"`{beside}` has no `conf/compare.yaml`: reinstall the package, or run from a checkout.")


def register_schemas() -> None:
    """Register the dataclasses with Hydra, as the schemas that the YAML files name in their defaults."""
    store = ConfigStore.instance()
    store.store(name="compare_schema", node=CompareConfig)
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="size", name="size_schema", node=SizeConfig)
    for name, shape in SHAPES.items():
        store.store(group="shape", name=f"{name.value}_schema", node=shape)


def compose_config(overrides: list[str]) -> CompareConfig:
    """Return the configuration that `python -m recipes.compare <overrides>` would use.

    **Arguments:** `overrides`: Hydra overrides, `["model=resnet", "size=small"]`.

    **Raises:** Hydra's own errors for unknown keys, groups and values.
    """
    register_schemas()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return to_compare_config(compose(config_name="compare", overrides=overrides))


def save_config(config: CompareConfig, path: Path) -> None:
    """Write `config` as YAML that `load_config` reads back."""
    OmegaConf.save(OmegaConf.structured(config), path)


def load_config(path: Path) -> CompareConfig:
    """Return the configuration that `save_config` wrote.

    **Raises:** OmegaConf's own errors for keys and values that the schema does not allow.
    """
    saved = cast(DictConfig, OmegaConf.load(path))
    schema = OmegaConf.structured(
        CompareConfig(model=ModelConfig(), size=SizeConfig(), shape=SHAPES[ModelName[saved.model.name]]())
    )
    return to_compare_config(cast(DictConfig, OmegaConf.merge(schema, saved)))


def to_compare_config(config: DictConfig) -> CompareConfig:
    """Return the composed `config` as a `CompareConfig`.

    **Raises:** `omegaconf.MissingMandatoryValue` when an extent is not set.
    """
    return cast(CompareConfig, OmegaConf.to_object(config))
