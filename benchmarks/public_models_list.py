"""List public architectures as installed, and build each tiny, with a batch and a loss.

transformers: every class of its auto mappings for language, pictures and sound. timm: one model of each of its modules.
diffusers: its main classes. Nothing is downloaded. A class that cannot be made tiny, or whose plain training step
fails, raises `NoTinyConfigError` with the reason.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import functools
import importlib
import importlib.util
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.public_models_configs import DIFFUSERS, OVERRIDES, tiny_values
from benchmarks.zoo import Architecture, Batch, Phase, Workload

__all__ = ["Library", "NoTinyConfigError", "PublicModel", "architecture_of", "listed"]

_MOST_PARAMETERS = 6_000_000
_MOST_PARAMETERS_OF_TIMM = 16_000_000  # its models have no configuration that could be made tiny
_LENGTH = 64
_SAMPLES = 8000
_NUM_CLASSES = 10
_SEED = 3


class Library(Enum):
    """Where a model comes from."""

    TRANSFORMERS = "transformers"
    TIMM = "timm"
    DIFFUSERS = "diffusers"


class NoTinyConfigError(Exception):
    """No tiny configuration of the class trains plainly; the message is the reason."""


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A class of a library. `task` says what its batch is; `source`: the `model_type`, or timm's module."""

    library: Library
    name: str
    task: str
    source: str

    @property
    def key(self) -> str:
        """The library and the class: the name of a row."""
        return f"{self.library.value}/{self.name}"


_TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text to text": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "picture": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "sound": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}


def listed() -> tuple[PublicModel, ...]:
    """Return every architecture of the libraries that are installed, in a fixed order."""
    return (*_of_transformers(), *_of_timm(), *_of_diffusers())


def _of_transformers() -> Iterator[PublicModel]:
    from transformers.models.auto import modeling_auto  # noqa: PLC0415 - seconds to import

    seen: set[str] = set()
    for task, mapping in _TASKS.items():
        for source, classes in getattr(modeling_auto, mapping).items():
            for name in [classes] if isinstance(classes, str) else classes:
                if name not in seen:
                    seen.add(name)
                    yield PublicModel(Library.TRANSFORMERS, name, task, source)


def _of_timm() -> Iterator[PublicModel]:
    """One model a module: of those whose names say that they are small, the one with the shortest name."""
    if importlib.util.find_spec("timm") is None:
        return
    timm: Any = importlib.import_module("timm")
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield PublicModel(Library.TIMM, min(names, key=_timm_size), "picture", module)


_SMALL = (
    "test_", "w18_small", "_002", "128s", "net121",
    "_atto", "_femto", "_pico", "_nano", "xxtiny", "xx_small", "xxs", "xtiny", "x_small", "_xs", "ti16",
    "_ti_", "_mini", "tiny", "_t0", "_s0", "_m0", "_b0", "_b_", "_050", "_035", "14d", "18", "small", "_s", "26",
)  # fmt: skip


def _timm_size(name: str) -> tuple[int, int, str]:
    rank = next((number for number, part in enumerate(_SMALL) if part in name), len(_SMALL))
    return rank, len(name), name


def _of_diffusers() -> Iterator[PublicModel]:
    if importlib.util.find_spec("diffusers") is None:
        return
    for name in DIFFUSERS:
        yield PublicModel(Library.DIFFUSERS, name, "noise", name)


def architecture_of(model: PublicModel) -> Architecture:
    """Return `model` as an architecture that trains: the first of its tiny forms whose plain step succeeds.

    **Raises:** `NoTinyConfigError` with the reason why none does.
    """
    makers = _MAKERS[model.library](model)
    reasons: list[str] = []
    with _quiet():
        for make in makers:
            try:
                build = _Repeatable(make)
                _try(build(_SEED))
            except Exception as error:  # noqa: BLE001 - the constructors of libraries raise anything
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                return Architecture(model.key, build)
    # The last form of a model of timm is the model as it is; the first form of the others is what the rule makes.
    reason = reasons[-1] if model.library is Library.TIMM else reasons[0]
    raise NoTinyConfigError(" ".join(reason.split())[:200])


def _try(workload: Workload) -> None:
    """Run one plain training step.

    **Raises:** what the step raises; `ValueError` if the loss is not finite, so that nothing could be compared.
    """
    (phase,) = workload.phases
    loss = phase.loss(workload.module, workload.batch)
    loss.backward()
    if not math.isfinite(loss.item()):
        raise ValueError(f"the loss of a plain step is {loss.item()}")


class _Repeatable:
    """Builds the workload with the same weights in each call, also where a library leaves them uninitialised."""

    def __init__(self, make: Callable[[], Workload]) -> None:
        self._make = make
        self._weights: dict[str, Tensor] | None = None

    def __call__(self, seed: int) -> Workload:
        torch.manual_seed(seed)
        with _quiet():
            workload = self._make()
        num_parameters = sum(p.numel() for p in workload.module.parameters())
        if num_parameters > _MOST_PARAMETERS_OF_TIMM:
            raise ValueError(f"it has {num_parameters:,} parameters, more than {_MOST_PARAMETERS_OF_TIMM:,}")
        if self._weights is None:
            with torch.no_grad():
                for parameter in workload.module.parameters():
                    if not (parameter.isfinite().all() and parameter.abs().max() < 100):
                        nn.init.normal_(parameter, std=0.02)
            self._weights = {name: value.clone() for name, value in workload.module.state_dict().items()}
        workload.module.load_state_dict(self._weights)
        return workload


@contextmanager
def _quiet() -> Generator[None]:
    """Drop what libraries print about unusual configurations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss, or the mean square of its outputs where it has none."""
    found = module(**batch)
    own = getattr(found, "loss", None)
    return own.mean() if isinstance(own, Tensor) else _mean_square(found)


def _mean_square(found: Any) -> Tensor:
    leaves: list[Any] = tree_leaves(dict(cast("Mapping[str, Any]", found)) if isinstance(found, Mapping) else found)
    outputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        raise ValueError("no output requires a gradient")
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


# transformers


def _transformers_makers(model: PublicModel) -> Iterator[Callable[[], Workload]]:
    for keeps_unknown_sizes in (False, True):
        for has_labels in (True, False):
            yield functools.partial(_transformers_workload, model, keeps_unknown_sizes, has_labels)


def _transformers_workload(model: PublicModel, keeps_unknown_sizes: bool, has_labels: bool) -> Workload:
    import transformers  # noqa: PLC0415 - seconds to import

    cls = getattr(transformers, model.name)
    config = _tiny_config(cls, keeps_unknown_sizes=keeps_unknown_sizes)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"it has {size:,} parameters, more than {_MOST_PARAMETERS:,}")
    module: nn.Module = cls(config).train()
    return Workload(module, _batch(module, model, config, has_labels=has_labels), (Phase(_loss),))


def _tiny_config(cls: Any, *, keeps_unknown_sizes: bool) -> Any:
    defaults = cls.config_class()
    values = {name: value for name, value in defaults.to_dict().items() if not name.startswith("_")}
    tiny = tiny_values(values, keeps_unknown_sizes=keeps_unknown_sizes)
    tiny |= OVERRIDES.get(defaults.model_type, {}) | OVERRIDES.get(cls.__name__, {})
    config = cls.config_class(**tiny)
    parts: list[Any] = [config, *vars(config).values()]
    for part in parts:
        if getattr(part, "use_cache", None):
            part.use_cache = False  # training uses no cache of keys and values
    return config


def _batch(module: nn.Module, model: PublicModel, config: Any, *, has_labels: bool) -> dict[str, Tensor]:
    takes = inspect.signature(module.forward).parameters
    batch, labels = _BATCHES[model.task](module, config, takes)
    if has_labels and "labels" in takes:
        batch["labels"] = labels
    elif "decoder_input_ids" in takes:
        batch["decoder_input_ids"] = _tokens(len(labels), 32)
    return batch


_Takes = Mapping[str, inspect.Parameter]


def _tokens(batch_size: int, length: int) -> Tensor:
    return torch.randint(3, 200, (batch_size, length))


def _text(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    tokens = _tokens(4, _LENGTH)
    return {"input_ids": tokens}, tokens


def _padded_text(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    tokens = _tokens(4, _LENGTH)
    mask = torch.arange(_LENGTH) < torch.tensor([64, 60, 40, 20])[:, None]
    batch = {"input_ids": tokens} | ({"attention_mask": mask.long()} if "attention_mask" in takes else {})
    return batch, tokens.masked_fill(~mask, -100)


def _text_to_text(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_ids": _tokens(4, _LENGTH)}, _tokens(4, 32)


def _picture(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    parts = [config, getattr(config, "vision_config", None)]
    side = next((s for part in parts if (s := getattr(part, "image_size", None)) is not None), 64)
    height, width = (side, side) if isinstance(side, int) else side
    channels = next((c for part in parts if (c := getattr(part, "num_channels", None)) is not None), 3)
    labels = torch.randint(0, max(1, min(_NUM_CLASSES, config.num_labels)), (4,))
    return {"pixel_values": torch.randn(4, channels, height, width)}, labels


def _sound_input(module: nn.Module, config: Any, takes: _Takes) -> dict[str, Tensor]:
    name = next(n for n in takes if n in ("input_values", "input_features"))
    if hasattr(config, "frequency_stride"):
        return {name: torch.randn(2, config.max_length, config.num_mel_bins)}
    if name == "input_values":
        return {name: torch.randn(2, _SAMPLES)}
    mel = next((m for n in _MELS if (m := getattr(config, n, None)) is not None), 16)
    if "max_source_positions" in vars(config) and "input_feat_per_channel" not in vars(config):
        return {name: torch.randn(2, mel, 2 * config.max_source_positions)}
    return {name: torch.randn(2, 2 * _LENGTH, mel)}


_MELS = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel")


def _ctc(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    return _sound_input(module, config, takes), torch.randint(3, 30, (2, 8))


def _sound(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    return _sound_input(module, config, takes), torch.randint(0, config.num_labels, (2,))


def _speech(module: nn.Module, config: Any, takes: _Takes) -> tuple[dict[str, Tensor], Tensor]:
    return _sound_input(module, config, takes), _tokens(2, 32)


_BATCHES: dict[str, Callable[[nn.Module, Any, _Takes], tuple[dict[str, Tensor], Tensor]]] = {
    "causal": _text,
    "masked": _padded_text,
    "text to text": _text_to_text,
    "picture": _picture,
    "ctc": _ctc,
    "sound": _sound,
    "speech to text": _speech,
}

# timm


_TIMM_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"embed_dim": 64, "depth": 4, "num_heads": 4, "img_size": 64},
    {"depths": (1, 1, 2, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "img_size": 64},
    {"depths": (1, 1, 2, 1), "embed_dim": 32, "img_size": 64},
    {"depths": (1, 1, 2, 1), "embed_dim": 32},
    {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64)},
    {"layers": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64)},
    {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    {"dim": 64, "depth": 4},
    {"layers": (1, 1, 1, 1)},
    {"img_size": 64},
    {},
)
"""Arguments that make models of timm smaller, where their constructors take them; the first that trains is used."""


def _timm_makers(model: PublicModel) -> Iterator[Callable[[], Workload]]:
    for arguments in _TIMM_ARGUMENTS:
        yield functools.partial(_timm_workload, model.name, arguments)


def _timm_workload(name: str, arguments: dict[str, Any]) -> Workload:
    timm: Any = importlib.import_module("timm")
    module = timm.create_model(name, pretrained=False, num_classes=_NUM_CLASSES, **arguments).train()
    settings: dict[str, Any] = module.pretrained_cfg
    channels, side, _ = settings["input_size"]
    if "img_size" in arguments or not settings.get("fixed_input_size"):
        side = 64
    batch = {"pictures": torch.randn(4, channels, side, side), "labels": torch.randint(0, _NUM_CLASSES, (4,))}
    return Workload(module, batch, (Phase(_classification_loss),))


def _classification_loss(module: nn.Module, batch: Batch) -> Tensor:
    found = module(batch["pictures"])
    if isinstance(found, Tensor) and found.shape == (4, _NUM_CLASSES):
        return nn.functional.cross_entropy(found, batch["labels"])
    return _mean_square(found)


# diffusers


def _diffusers_makers(model: PublicModel) -> Iterator[Callable[[], Workload]]:
    yield functools.partial(_diffusers_workload, model.name)


def _diffusers_workload(name: str) -> Workload:
    import diffusers  # noqa: PLC0415 - seconds to import

    arguments, inputs = DIFFUSERS[name]
    module = getattr(diffusers, name)(**arguments).train()
    batch = {key: _drawn(*value) for key, value in inputs.items()}
    return Workload(module, batch, (Phase(_loss),))


def _drawn(kind: str, *shape: int) -> Tensor:
    match kind:
        case "noise":
            return torch.randn(shape)
        case "steps":
            return torch.randint(0, 1000, shape)
        case "classes":
            return torch.randint(0, _NUM_CLASSES, shape)
        case "ones":
            return torch.ones(shape)
        case "flags":
            return torch.ones(shape, dtype=torch.bool)
        case _:
            raise ValueError(f"`{kind}` is not a kind of input")


_MAKERS: dict[Library, Callable[[PublicModel], Iterator[Callable[[], Workload]]]] = {
    Library.TRANSFORMERS: _transformers_makers,
    Library.TIMM: _timm_makers,
    Library.DIFFUSERS: _diffusers_makers,
}
