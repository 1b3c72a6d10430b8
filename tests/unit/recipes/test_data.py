from collections.abc import Callable
from pydoc_data.topics import topics

import pytest
import torch

from recipes.config import ModelName, ResNetShape, Shape, TransformerShape, UNetShape
from recipes.data import Batch, batches_sha256, digit_images, make_batches, photographs, topics_text
from tinybp_lightning.errors import ConfigError


def transformer(**changes: int) -> TransformerShape:
    extents = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1} | {"num_tokens": 16}
    return TransformerShape(**({"batch_size": 3} | extents | changes))


def resnet(**changes: int) -> ResNetShape:
    return ResNetShape(**({"batch_size": 3, "image_size": 20} | changes), depths=[1, 1, 1, 1])


def unet(**changes: int) -> UNetShape:
    return UNetShape(**({"batch_size": 3, "image_size": 24} | changes), channels=[8])


SHAPES: dict[ModelName, Callable[..., Shape]] = {
    ModelName.transformer: transformer,
    ModelName.resnet: resnet,
    ModelName.unet: unet,
}
each_model = pytest.mark.parametrize("name", list(ModelName), ids=lambda name: name.value)


def batches(name: ModelName, *, num_batches: int = 3, seed: int = 0) -> tuple[Batch, ...]:
    return make_batches(name, SHAPES[name](), num_batches=num_batches, seed=seed)


@each_model
def test_batches_depend_on_the_seed_alone(name: ModelName) -> None:
    first = batches_sha256(batches(name))
    torch.manual_seed(1234)
    assert batches_sha256(batches(name)) == first
    assert batches_sha256(batches(name, seed=1)) != first


@each_model
def test_a_longer_run_begins_like_a_shorter_one(name: ModelName) -> None:
    assert batches_sha256(batches(name, num_batches=5)[:2]) == batches_sha256(batches(name, num_batches=2))


@each_model
def test_batches_differ_from_one_another(name: ModelName) -> None:
    digests = [batches_sha256((batch,)) for batch in batches(name)]
    assert len(set(digests)) == 3


@each_model
def test_the_models_random_numbers_are_left_alone(name: ModelName) -> None:
    state = torch.get_rng_state()
    batches(name)
    assert torch.equal(torch.get_rng_state(), state)


def test_text_holds_every_topic_and_batches_are_windows_of_it() -> None:
    text = topics_text()
    assert all(topic.encode() in text for topic in topics.values())
    (batch,) = batches(ModelName.transformer, num_batches=1)
    windows = [bytes(row.tolist()) for row in batch.inputs["input_ids"]]
    assert [len(window) for window in windows] == [16] * 3
    assert all(window in text for window in windows)
    assert torch.equal(batch.inputs["input_ids"], batch.inputs["labels"])


def test_digits_are_enlarged_over_three_equal_channels() -> None:
    pixels, labels = digit_images()
    assert pixels.shape == (1797, 1, 8, 8)
    (batch,) = batches(ModelName.resnet, num_batches=1)
    images = batch.inputs["pixel_values"]
    assert images.shape == (3, 3, 20, 20)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert set(batch.inputs["labels"].tolist()) <= set(labels.tolist()) == set(range(10))


def test_denoising_can_be_undone_with_the_target() -> None:
    """The input is `sqrt(a) patch + sqrt(1 - a) noise`: take the target off again and a patch in [-1, 1] is left."""
    assert [tuple(photograph.shape) for photograph in photographs()] == [(3, 427, 640)] * 2
    for_check = make_batches(ModelName.unet, unet(batch_size=64), num_batches=1, seed=3)[0]
    assert for_check.target is not None
    kept = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000), dim=0)[for_check.inputs["timestep"]].view(-1, 1, 1, 1)
    is_clear = kept.flatten() > 0.05
    assert is_clear.sum() >= 10
    patches = (for_check.inputs["sample"] - (1.0 - kept).sqrt() * for_check.target) / kept.sqrt()
    assert patches[is_clear].abs().max() <= 1.0 + 1e-4


@pytest.mark.parametrize(
    ("name", "shape", "fix"),
    [
        (ModelName.transformer, transformer(num_tokens=10**7), "num_tokens=10000000"),
        (ModelName.transformer, transformer(vocab_size=100), "vocab_size=100"),
        (ModelName.unet, unet(image_size=500), "image_size=500"),
    ],
)
def test_what_the_data_does_not_hold_is_an_error(name: ModelName, shape: Shape, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        make_batches(name, shape, num_batches=1, seed=0)


def test_channels_last_changes_the_layout_alone() -> None:
    plain = make_batches(ModelName.resnet, resnet(), num_batches=1, seed=0)
    last = make_batches(ModelName.resnet, resnet(channels_last=True), num_batches=1, seed=0)
    assert last[0].inputs["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batches_sha256(last) == batches_sha256(plain)
