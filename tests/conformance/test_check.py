"""Does the conformance check notice? Trainings that are wrong in one way each, and one that does nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import conformance_check
from benchmarks.conformance_check import Executor, check
from benchmarks.conformance_training import differences
from benchmarks.zoo import ZOO, Architecture, Batch, Phase, Workload, architecture_named
from recipes.measure import tensors_sha256


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    return module(batch["x"]).square().mean()


def _build(seed: int) -> Workload:
    torch.manual_seed(seed)
    return Workload(_Net().train(), {"x": torch.randn(256, 32)}, (Phase(_loss),))


_NET = Architecture("net", _build)


def _draw(*_: object) -> None:
    torch.rand(1)


def _move_buffer(module: nn.Module, *_: object) -> None:
    module.get_buffer("layers.0.1.num_batches_tracked").add_(1)


def _change_gradient(module: nn.Module, *_: object) -> None:
    module.get_parameter("layers.3.0.weight").register_hook(lambda gradient: gradient * 1.5)


def _change_output(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output * 1.5


def _after_each_forward(sabotage: Callable[..., object]) -> Callable[..., None]:
    return lambda executor, module, allowed_bytes, listener: module.register_forward_hook(sabotage)


def test_an_untouched_training_is_the_same_but_over_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance_check, "_apply", lambda *_: None)
    result = check(_NET, Executor.EAGER, "60%")
    assert result.sameness.all_equal
    assert not result.is_within_budget
    assert result.measured_peak_bytes == result.plain_peak_bytes
    assert result.blocks is None
    assert result.replayed_blocks == 0


@pytest.mark.parametrize(
    ("sabotage", "is_same"),
    [
        pytest.param(_draw, (False, False, False, False, False), id="draws a random number more"),
        pytest.param(_move_buffer, (True, True, False, True, True), id="moves a buffer twice"),
        pytest.param(_change_output, (False, False, False, False, True), id="computes something else"),
    ],
)
def test_a_wrong_training_is_noticed(
    monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., object], is_same: tuple[bool, ...]
) -> None:
    monkeypatch.setattr(conformance_check, "_apply", _after_each_forward(sabotage))
    found = check(_NET, Executor.EAGER, "60%").sameness
    assert not found.all_equal
    assert (found.losses, found.gradients, found.buffers, found.parameters, found.random_state) == is_same


def test_a_wrong_gradient_is_noticed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance_check, "_apply", lambda executor, module, *_: _change_gradient(module))
    found = check(_NET, Executor.EAGER, "60%").sameness
    assert (found.gradients, found.parameters, found.random_state) == (False, False, True)
    assert found.first_difference.startswith("step 1: gradients: `layers.3.0.weight in phase 0` differs")


def test_a_budget_that_cannot_be_met_is_raised_to_the_smallest() -> None:
    result = check(_NET, Executor.EAGER, "1%")
    assert result.is_smallest
    assert result.budget_bytes < result.plain_peak_bytes
    assert result.is_within_budget
    assert result.sameness.all_equal


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"a": torch.zeros(2)}, ["`b` is missing"]),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, ["`c` is extra"]),
        ({"a": torch.tensor([0.0, 0.5]), "b": torch.zeros(1)}, ["`a` differs 0.5"]),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, ["`a` differs"]),
        ({"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1)}, ["`a` differs 0.0"]),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, []),
    ],
)
def test_differences_are_told_by_name(found: dict[str, Tensor], told: list[str]) -> None:
    assert differences({"a": torch.zeros(2), "b": torch.zeros(1)}, found) == told


@pytest.mark.parametrize("architecture", [pytest.param(a, id=a.name) for a in ZOO if a.is_fast and a.deterministic])
def test_equal_seeds_make_equal_weights_and_batches(architecture: Architecture) -> None:
    first, second = architecture.build(3), architecture.build(3)
    assert tensors_sha256(first.module.state_dict().items()) == tensors_sha256(second.module.state_dict().items())
    assert tensors_sha256(first.batch.items()) == tensors_sha256(second.batch.items())


def test_an_unknown_architecture_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"`resnext` is not in the zoo: expected one of llama, .*gan"):
        architecture_named("resnext")
