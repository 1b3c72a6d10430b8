import sys

import pytest
import torch

from recipes.config import Architecture, ModelName, Precision, compose_config
from recipes.data import make_batches
from recipes.measure import tensors_sha256
from recipes.models import Workload, build_workload
from tinybp_lightning.errors import ConfigError

CPU = torch.device("cpu")
CASES = {
    "llama": ["model=transformer"],
    "gpt2": ["model=transformer", "model.architecture=gpt2", "model.dropout=0.1"],
    "resnet": ["model=resnet"],
    "bottleneck": ["model=resnet", "shape.bottleneck=true", "shape.channels_last=true"],
    "unet": ["model=unet"],
}
NUM_BLOCKS = {"llama": 3, "gpt2": 3, "resnet": 4, "bottleneck": 4, "unet": 2 * 1 + 2 + 2 * 2}
each_case = pytest.mark.parametrize("case", list(CASES))


def tiny(case: str, *overrides: str, seed: int = 0) -> Workload:
    config = compose_config([*CASES[case], "size=tiny", *overrides])
    return build_workload(config.model, config.shape, seed=seed, device=CPU)


@each_case
def test_weights_depend_on_the_seed_alone(case: str) -> None:
    first = tensors_sha256(tiny(case).model.named_parameters())
    torch.rand(7)
    assert tensors_sha256(tiny(case).model.named_parameters()) == first
    assert tensors_sha256(tiny(case, seed=1).model.named_parameters()) != first


@each_case
def test_loss_has_a_gradient_everywhere_and_blocks_are_where_it_passes(case: str) -> None:
    config = compose_config([*CASES[case], "size=tiny"])
    workload = tiny(case)
    (batch,) = make_batches(config.model.name, config.shape, num_batches=1, seed=0)
    calls: list[int] = []
    for index, block in enumerate(workload.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    loss = workload.loss(batch)
    loss.backward()
    assert loss.ndim == 0
    assert workload.model.training
    assert all(parameter.grad is not None for parameter in workload.model.parameters())
    assert sorted(calls) == list(range(NUM_BLOCKS[case]))


@pytest.mark.parametrize(
    ("precision", "parameters", "block_output"),
    [
        (Precision.fp32, torch.float32, torch.float32),
        (Precision.bf16, torch.bfloat16, torch.bfloat16),
        (Precision.bf16_autocast, torch.float32, torch.bfloat16),
    ],
)
def test_precision(precision: Precision, parameters: torch.dtype, block_output: torch.dtype) -> None:
    workload = tiny("llama", f"shape.precision={precision.value}")
    config = compose_config(["size=tiny"])
    (batch,) = make_batches(ModelName.transformer, config.shape, num_batches=1, seed=0)
    seen: list[torch.dtype] = []
    workload.blocks[0].mlp.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    workload.loss(batch).backward()
    assert {parameter.dtype for parameter in workload.model.parameters()} == {parameters}
    assert seen == [block_output]


def test_dropout_of_gpt2_draws_random_numbers() -> None:
    config = compose_config([*CASES["gpt2"], "size=tiny"])
    (batch,) = make_batches(config.model.name, config.shape, num_batches=1, seed=0)
    workload = tiny("gpt2")
    assert workload.loss(batch).item() != workload.loss(batch).item()


def test_a_transformers_resnet_replaces_a_torchvision_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", None)
    assert tiny("resnet").source == "transformers.ResNetForImageClassification"


def test_channels_last_reaches_the_weights() -> None:
    kernels = [p for p in tiny("bottleneck").model.parameters() if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize(
    ("model", "architecture"),
    [("transformer", Architecture.unet), ("resnet", Architecture.llama), ("unet", Architecture.gpt2)],
)
def test_an_architecture_of_another_family_is_an_error(model: str, architecture: Architecture) -> None:
    config = compose_config([f"model={model}", "size=tiny", f"model.architecture={architecture.value}"])
    with pytest.raises(ConfigError, match=f"model.architecture={architecture.value}"):
        build_workload(config.model, config.shape, seed=0, device=CPU)
