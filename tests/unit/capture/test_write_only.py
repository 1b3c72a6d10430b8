"""Buffers that a block changes while nothing it makes depends on them: the statistics of batch norms in training."""

import copy

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.capture.test_pieces import program_of, trace_graph
from tests.unit.runtime.training import assert_all_same, train

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Watching(nn.Module):
    """A batch norm whose statistics are read, or are not its own to be passed over, for some reason."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8, momentum=0.5)
        self.norm.train(why != "eval")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.why == "eval":
            self.norm.running_mean.mul_(0.5)
        x = self.norm(self.linear(x))
        match self.why:
            case "mean":
                return x * self.norm.running_mean
            case "count":
                return x * self.norm.num_batches_tracked
            case "view":
                return x * self.norm.running_var[:4].repeat(2)
            case "counted":
                return x * self.norm.num_batches_tracked.add_(1)
            case _:
                return x


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("", set(BUFFERS)),
        ("mean", {"running_var", "num_batches_tracked"}),
        ("count", {"running_mean", "running_var"}),
        ("view", {"running_mean", "num_batches_tracked"}),
        ("counted", {"running_mean", "running_var"}),
        ("eval", set()),
    ],
)
def test_which_buffers_of_a_batch_norm_are_only_written(why: str, expected: set[str]) -> None:
    program = program_of(trace_graph(Watching(why), X))
    names = [program.graph.values[v].name for v in program.graph.inputs]
    guarded = {i for piece in program.pieces for i in piece.guarded}
    only_written = {i for piece in program.pieces for i in piece.write_only} - guarded
    assert {name for name in BUFFERS if any(name in names[i] for i in only_written)} == expected
    assert len(only_written) == len(expected)
    changed = {i for piece in program.pieces for i in piece.volatile}
    assert {name for name in BUFFERS if any(name in names[i] for i in changed - only_written)} == {
        "": set(),
        "eval": {"running_mean"},
    }.get(why, set(BUFFERS) - expected)


@pytest.mark.parametrize("why", ["", "mean", "count", "view", "counted", "eval"])
def test_replays_change_no_bit_and_no_statistic(why: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Sequential(Watching(why), nn.Tanh()) for _ in range(5)))
    for module in plain.modules():
        if isinstance(module, Watching):
            module.norm.train(why != "eval")
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget="45%", check=True)

    def loss(model: nn.Module) -> torch.Tensor:
        return model(X.repeat(64, 1)).square().mean()

    assert_all_same(train(plain, loss, steps=4), train(ours, loss, steps=4))
    assert tbp.explain(ours).plans[-1].predicted_recompute_s > 0
