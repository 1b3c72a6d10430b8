import pytest
import torch
import torch._functorch.config as functorch_config
from torch import nn

from recipes.budget import budget_bytes, budget_share
from recipes.config import CompareConfig, Precision, compose_config
from recipes.data import Batch, make_batches
from recipes.measure import measure
from recipes.measurement import Measurement
from recipes.models import Workload, build_workload, make_optimizer
from recipes.modes import Mode, parse_modes
from recipes.peers import KEPT_OPS, apply_mode
from tinybp_lightning.errors import BudgetError, ConfigError

CPU = torch.device("cpu")
MODELS = {
    "llama": ["model=transformer"],
    "gpt2": ["model=transformer", "model.architecture=gpt2", "model.dropout=0.1"],
    "resnet": ["model=resnet"],
    "unet": ["model=unet"],
}


def config_of(model: str) -> CompareConfig:
    return compose_config([*MODELS[model], "size=tiny"])


def train(model: str, mode: Mode, *, budget: str = "60%") -> Measurement:
    config = config_of(model)
    batches = make_batches(config.model.name, config.shape, num_batches=4, seed=0)
    workload = build_workload(config.model, config.shape, seed=0, device=CPU)
    apply_mode(mode, workload, budget=budget, naive_peak_bytes=0)
    return measure(workload, make_optimizer(config.model, workload.model), batches, warmup_steps=1, seed=0)


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("mode", [Mode.checkpoint, Mode.selective])
def test_checkpointing_trains_like_naive_in_less_memory(model: str, mode: Mode) -> None:
    naive, found = train(model, Mode.naive), train(model, mode)
    assert found.losses == naive.losses
    assert found.gradients_sha256 == naive.gradients_sha256
    assert found.parameters_sha256 == naive.parameters_sha256
    assert found.activation_peak_bytes < naive.activation_peak_bytes


def test_the_referee_sees_that_checkpointing_moves_batch_statistics_twice() -> None:
    """pytorch#96136: a property of the peer, and the reason why buffers are compared at all."""
    assert train("resnet", Mode.checkpoint).buffers_sha256 != train("resnet", Mode.naive).buffers_sha256


def test_selective_keeps_more_than_full_checkpointing() -> None:
    assert train("llama", Mode.selective).activation_peak_bytes > train("llama", Mode.checkpoint).activation_peak_bytes


@pytest.mark.parametrize("op", sorted(map(str, KEPT_OPS)))
def test_kept_ops_are_overloads(op: str) -> None:
    assert op.startswith("aten.")
    assert op.endswith(".default")


class Shift(nn.Module):
    """Small enough to compile in a test."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def workload_of(model: Shift) -> Workload:
    return Workload(
        model, tuple(model.blocks), lambda network, batch: network(batch.inputs["x"]), Precision.fp32, "by hand"
    )


@pytest.mark.parametrize(
    ("mode", "num_compiled"),
    [
        (Mode.naive, 0),
        (Mode.checkpoint, 0),
        (Mode.compile, 1),
        (Mode.compile_layers, 1),
        (Mode.compile_layers_checkpoint, 1),
    ],
)
def test_equal_blocks_share_one_compilation(mode: Mode, num_compiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: compile_with(function, backend=count, **kwargs))
    torch._dynamo.reset()
    model = Shift()
    workload = workload_of(model)
    apply_mode(mode, workload, budget="50%", naive_peak_bytes=0)
    workload.loss(Batch({"x": torch.ones(2, 4, requires_grad=True)})).backward()
    assert len(graphs) == num_compiled


@pytest.mark.parametrize("mode", [Mode.activation_memory_budget, Mode.compile_layers_memory_budget])
@pytest.mark.parametrize(("budget", "share"), [("30%", 0.3), ("1000B", 0.25), ("1GiB", 1.0)])
def test_torchs_own_budget_is_a_share(mode: Mode, budget: str, share: float) -> None:
    model = Shift()
    workload = workload_of(model)
    with functorch_config.patch(activation_memory_budget=1.0):
        apply_mode(mode, workload, budget=budget, naive_peak_bytes=4000)
        assert functorch_config.activation_memory_budget == share


@pytest.mark.parametrize(
    ("given", "modes"),
    [
        ("all", tuple(Mode)),
        ("naive", (Mode.naive,)),
        (["compile", "naive", "compile"], (Mode.compile, Mode.naive)),
    ],
)
def test_modes_are_parsed(given: object, modes: tuple[Mode, ...]) -> None:
    assert parse_modes(given) == modes


@pytest.mark.parametrize("given", ["fast", ["naive", "fast"]])
def test_an_unknown_mode_is_an_error(given: object) -> None:
    with pytest.raises(ConfigError, match="`mode=fast` is not a mode"):
        parse_modes(given)


@pytest.mark.parametrize(("budget", "size_bytes"), [("30%", 300), ("2KiB", 2048), ("100%", 1000)])
def test_budget_in_bytes(budget: str, size_bytes: int) -> None:
    assert budget_bytes(budget, naive_peak_bytes=1000) == size_bytes


def test_bytes_without_a_plain_peak_are_no_share() -> None:
    with pytest.raises(BudgetError, match="2KiB"):
        budget_share("2KiB", naive_peak_bytes=0)
