"""A forward cut into pieces is the forward: the same results, the same lives of its tensors, the same statistics."""

import copy
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import tinybp_lightning as tbp
from tests.unit.capture.graphs import Traced, trace_graph
from tests.unit.runtime.training import assert_all_same, residual_net, train
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Program, cut_program, fill_template
from tinybp_lightning.graph.cuts.narrow import Granularity

WIDTH = 16
X = torch.randn(4, WIDTH)


def run(program: Program, inputs: tuple[Any, ...]) -> Any:
    state: list[Any] = []
    for piece in program.pieces:
        arguments = [inputs[s.index] if s.origin == EXTERNAL else state[s.index] for s in piece.reads]
        carried = {s.index: state[s.index] for s in piece.state if s.origin == STATE}
        state.clear()
        made = piece.calls[0](arguments)
        assert arguments == [], "a piece empties its list of arguments"
        state = [made[s.index] if s.origin == MADE else carried[s.index] for s in piece.state]
    values = [inputs[s.index] if s.origin == EXTERNAL else state[s.index] for s in program.outputs]
    return fill_template(program.template, values)


class Skips(nn.Module):
    """Values that cross several pieces, a tensor returned from the middle, an input returned, a constant returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        seen = [x]
        for layer in self.layers:
            seen.append(torch.tanh(layer(seen[-1])))
        return seen[-1] + seen[1], {"middle": seen[3]}["middle"], x, 7, None


def program_of(found: Traced, granularity: Granularity = Granularity.FINE) -> Program:
    return cut_program(found.module, found.graph, granularity=granularity)


def _dropout_net(x: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        x = F.dropout(torch.tanh(x) @ torch.ones(WIDTH, WIDTH), 0.3)
    return x


@pytest.mark.parametrize("forward", [residual_net(5), Skips(), _dropout_net], ids=["residual", "skips", "random"])
@pytest.mark.parametrize("granularity", Granularity)
def test_the_pieces_are_the_whole(forward: Callable[..., Any], granularity: Granularity) -> None:
    found = trace_graph(forward, X)
    program = program_of(found, granularity)
    torch.manual_seed(0)
    want = found.module(*found.inputs)
    torch.manual_seed(0)
    got = run(program, found.inputs)
    assert isinstance(got, tuple)
    for one, other in zip(got, want, strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
            assert (one is X) == (other is X)
        else:
            assert one == other


def test_every_op_is_in_one_piece() -> None:
    found = trace_graph(residual_net(5), X)
    program = program_of(found)
    assert len(program.pieces) >= 5
    spans = [(piece.span.start, piece.span.stop) for piece in program.pieces]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(program.graph.nodes)
    assert all(before[1] == after[0] for before, after in pairwise(spans))


def test_equal_pieces_have_equal_signatures() -> None:
    program = program_of(trace_graph(residual_net(6), X))
    signatures = [piece.span.signature for piece in program.pieces]
    assert len(set(signatures)) < len(signatures)


def test_what_a_forward_changes_is_volatile() -> None:
    norms = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(3)))
    program = program_of(trace_graph(norms, X))
    names = [program.graph.values[v].name for v in program.graph.inputs]
    volatile = {names[i] for piece in program.pieces for i in piece.volatile}
    assert len(volatile) == 9  # mean, variance and count of each
    assert all("running" in name or "num_batches" in name for name in volatile)


def test_only_random_pieces_are_marked() -> None:
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
    program = program_of(trace_graph(net, X))
    marked = [piece.is_random for piece in program.pieces]
    assert sum(marked) == 1


def test_an_input_nobody_holds_is_freed_at_its_last_use() -> None:
    found = trace_graph(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))), X)
    piece = program_of(found).pieces[-1]
    state = torch.randn(4, WIDTH)
    held = weakref.ref(state)
    arguments = [found.inputs[s.index] if s.origin == EXTERNAL else state for s in piece.reads]
    del state
    assert held() is not None
    with torch.no_grad():
        piece.calls[0](arguments)
    assert held() is None


class WithLoss(nn.Module):
    """Returns its scores beside their loss, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.layers(x)
        return scores.logsumexp(-1).mean(), scores


@pytest.mark.parametrize(("forward", "expected"), [(WithLoss(), [0]), (Skips(), [0, 1])], ids=["loss", "no loss"])
def test_backward_is_presumed_to_start_at_the_loss_if_there_is_one(forward: nn.Module, expected: list[int]) -> None:
    found = trace_graph(forward, X)
    program = program_of(found)
    assert program.differentiated == {found.graph.outputs[k] for k in expected}


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


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
    program = program_of(trace_graph(Watching(why), ROWS))
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
        return model(ROWS.repeat(64, 1)).square().mean()

    assert_all_same(train(plain, loss, steps=4), train(ours, loss, steps=4))
    assert tbp.explain(ours).plans[-1].predicted_recompute_s > 0
