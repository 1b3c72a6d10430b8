"""Make batches of real data that installed packages contain, so that nothing is downloaded.

The text is CPython's own language reference (`pydoc_data.topics`), read as bytes. The images are scikit-learn's
handwritten digits (`load_digits`) and its two photographs (`load_sample_images`). Batches depend on the seed alone, and
have a random generator of their own, so they do not touch the model's random numbers. The text differs between Python
versions, so each run reports a digest of its batches.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.config import ModelName, ResNetShape, Shape, TransformerShape, UNetShape
from tinybp_lightning.errors import ConfigError

__all__ = [
    "Batch",
    "batches_sha256",
    "digit_images",
    "make_batches",
    "photographs",
    "topics_text",
]

# The noise schedule of the denoising task: linear variances, as in DDPM (Ho et al. 2020, section 4).
NUM_NOISE_LEVELS = 1000
FIRST_VARIANCE, LAST_VARIANCE = 1e-4, 2e-2


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's data: the model's keyword arguments, and the target if the model does not compute its own loss."""

    inputs: Mapping[str, Tensor]
    target: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`."""
        target = None if self.target is None else self.target.to(device)
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, target)


def make_batches(name: ModelName, shape: Shape, *, num_batches: int, seed: int) -> tuple[Batch, ...]:
    """Return the first `num_batches` batches for a model of family `name`, on the CPU.

    **Returns:** the same tensors, bit for bit, for the same arguments and package versions.

    **Raises:** `ConfigError` when the data has no sample of the size that `shape` asks for.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_batch(name, shape, generator) for _ in range(num_batches))


def _batch(name: ModelName, shape: Shape, generator: torch.Generator) -> Batch:
    match name:
        case ModelName.transformer:
            assert isinstance(shape, TransformerShape)
            return _text_batch(shape, generator)
        case ModelName.resnet:
            assert isinstance(shape, ResNetShape)
            return _digits_batch(shape, generator)
        case ModelName.unet:
            assert isinstance(shape, UNetShape)
            return _denoising_batch(shape, generator)
        case _:
            assert_never(name)


@cache
def topics_text() -> bytes:
    """Return CPython's language reference as one text, its topics in alphabetical order."""
    from pydoc_data.topics import topics  # noqa: PLC0415  half a megabyte of source, for the text recipe only

    return "\n\n".join(topics[title] for title in sorted(topics)).encode()


def _text_batch(shape: TransformerShape, generator: torch.Generator) -> Batch:
    """Cut windows at random places of the text; the model itself shifts the labels."""
    text = torch.frombuffer(bytearray(topics_text()), dtype=torch.uint8)
    if shape.vocab_size <= int(text.max()):
        raise ConfigError(f"`vocab_size={shape.vocab_size}` is too small for bytes: set `shape.vocab_size` to 256.")
    if shape.num_tokens >= len(text):
        raise ConfigError(f"`num_tokens={shape.num_tokens}` exceeds the text of {len(text)} bytes: lower it.")
    starts = torch.randint(len(text) - shape.num_tokens, (shape.batch_size, 1), generator=generator)
    token_ids = text[starts + torch.arange(shape.num_tokens)].long()
    return Batch({"input_ids": token_ids, "labels": token_ids})


@cache
def digit_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as `(1797, 1, 8, 8)` floats of mean 0 and deviation 1, and their labels."""
    digits: Mapping[str, NDArray[np.float64]] = _sklearn_datasets().load_digits()
    pixels = torch.from_numpy(digits["images"]).float().unsqueeze(1)
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(digits["target"]).long()


def _digits_batch(shape: ResNetShape, generator: torch.Generator) -> Batch:
    """Draw random digits, enlarge them to the configured size, and repeat them over three channels."""
    pixels, labels = digit_images()
    rows = torch.randint(len(pixels), (shape.batch_size,), generator=generator)
    extent = (shape.image_size, shape.image_size)
    enlarged = torch.nn.functional.interpolate(pixels[rows], size=extent, mode="bilinear", align_corners=False)
    images = enlarged.expand(-1, 3, -1, -1).contiguous(memory_format=_memory_format(shape.channels_last))
    return Batch({"pixel_values": images, "labels": labels[rows]})


def _sklearn_datasets() -> Any:
    """Import late, as the text recipe does without; untyped, as scikit-learn has no stubs."""
    return importlib.import_module("sklearn.datasets")


@cache
def photographs() -> tuple[Tensor, ...]:
    """Return scikit-learn's two photographs, each `(3, 427, 640)`, in [-1, 1]."""
    images: list[NDArray[np.uint8]] = _sklearn_datasets().load_sample_images()["images"]
    return tuple(torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1.0 for image in images)


def _denoising_batch(shape: UNetShape, generator: torch.Generator) -> Batch:
    """Noise patches of the photographs, each at a random level; the target is the noise (Ho et al. 2020, eq. 14)."""
    patches = torch.stack([_patch(shape.image_size, generator) for _ in range(shape.batch_size)])
    noise = torch.randn(patches.shape, generator=generator)
    levels = torch.randint(NUM_NOISE_LEVELS, (shape.batch_size,), generator=generator)
    kept = torch.cumprod(1.0 - torch.linspace(FIRST_VARIANCE, LAST_VARIANCE, NUM_NOISE_LEVELS), dim=0)
    share = kept[levels].view(-1, 1, 1, 1)
    noisy = share.sqrt() * patches + (1.0 - share).sqrt() * noise
    memory_format = _memory_format(shape.channels_last)
    return Batch({"sample": noisy.contiguous(memory_format=memory_format), "timestep": levels}, noise)


def _patch(extent: int, generator: torch.Generator) -> Tensor:
    sources = photographs()
    source = sources[int(torch.randint(len(sources), (), generator=generator))]
    _, height, width = source.shape
    if extent > min(height, width):
        raise ConfigError(f"`image_size={extent}` exceeds the photographs ({height} x {width}): lower it.")
    top = int(torch.randint(height - extent + 1, (), generator=generator))
    left = int(torch.randint(width - extent + 1, (), generator=generator))
    return source[:, top : top + extent, left : left + extent]


def _memory_format(is_channels_last: bool) -> torch.memory_format:
    return torch.channels_last if is_channels_last else torch.contiguous_format


def batches_sha256(batches: tuple[Batch, ...]) -> str:
    """Return a digest of every tensor in `batches`, in order, so that two runs can show that they saw the same data."""
    digest = hashlib.sha256()
    for batch in batches:
        tensors = [*batch.inputs.items(), *([] if batch.target is None else [("target", batch.target)])]
        for name, tensor in tensors:
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
