import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.config import (
    Architecture,
    CompareConfig,
    ModelConfig,
    ModelName,
    ResNetShape,
    Shape,
    SizeConfig,
    TransformerShape,
    UNetShape,
    compose_config,
    conf_dir,
    load_config,
    save_config,
)

MODELS = ("transformer", "resnet", "unet")
SIZES = ("tiny", "small", "medium", "large")
SCHEMAS: dict[str, type[Any]] = {
    "compare_schema": CompareConfig,
    "model_schema": ModelConfig,
    "size_schema": SizeConfig,
    "transformer_schema": TransformerShape,
    "resnet_schema": ResNetShape,
    "unet_schema": UNetShape,
}
FILES = sorted(conf_dir().rglob("*.yaml"))


def test_every_model_has_every_size() -> None:
    shapes = {path.stem for path in (conf_dir() / "shape").glob("*.yaml")}
    assert shapes == {f"{model}_{size}" for model in MODELS for size in SIZES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_are_fields_of_the_schema_that_the_file_names(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    schema = SCHEMAS[next(default for default in content["defaults"] if isinstance(default, str))]
    fields = {field.name for field in dataclasses.fields(schema)}
    groups = {key for default in content["defaults"] if isinstance(default, dict) for key in default}
    assert set(content) - {"defaults", "hydra"} | groups <= fields
    assert set(content) - {"defaults", "hydra"} | groups == fields, "a field that no file sets has no documentation"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_composes_the_shape_of_model_and_size(model: str, size: str) -> None:
    shapes = {"transformer": TransformerShape, "resnet": ResNetShape, "unet": UNetShape}
    config = compose_config([f"model={model}", f"size={size}"])
    assert config.model.name is ModelName[model]
    assert config.size.name == size
    assert type(config.shape) is shapes[model]
    assert config.size.warmup_steps < config.size.steps


def test_overrides_reach_the_dataclasses() -> None:
    config = compose_config(["model.architecture=gpt2", "shape.num_layers=7", "budget=2GiB", "mode=[naive,compile]"])
    assert config.model.architecture is Architecture.gpt2
    assert isinstance(config.shape, TransformerShape)
    assert (config.shape.num_layers, config.budget, config.mode) == (7, "2GiB", ["naive", "compile"])


@pytest.mark.parametrize("override", ["shape.num_layer=3", "modes=all", "model=vgg", "size.steps=few"])
def test_unknown_keys_and_wrong_values_are_errors(override: str) -> None:
    with pytest.raises(Exception, match=r"num_layer|modes|vgg|steps"):
        compose_config([override])


@pytest.mark.parametrize("model", MODELS)
def test_saved_configuration_loads_equal(model: str, tmp_path: Path) -> None:
    config = compose_config([f"model={model}", "size=tiny", "budget=12MiB"])
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == config
    assert isinstance(loaded.shape, Shape)
