"""Is a module's graph captured without running it, and are the costs estimated from it those that are measured?"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import residual_net
from tinybp_lightning.errors import CaptureError
from tinybp_lightning.schedule import keep_all, simulate

WIDTH = 64


def conv_net() -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
    return nn.Sequential(*layers)


def test_nothing_runs_and_nothing_changes() -> None:
    model, x = conv_net(), torch.randn(2, 8, 16, 16)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    graph = tbp.capture_graph(model, x)
    assert graph.name == "Sequential"
    assert len(graph.nodes) == 4 * 6  # batch norm counts its batches too
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: residual_net(6, width=WIDTH), (32, WIDTH)), (conv_net, (4, 8, 32, 32))]
)
def test_it_is_the_graph_that_is_trained_and_its_estimate_is_near(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = make(), torch.randn(shape)
    estimated = tbp.pareto(tbp.capture_graph(model, x), num_points=2)
    tbp.hcb(model, activation_budget="90%")
    model(x).square().mean().backward()
    (plan,) = tbp.explain(model).plans
    measured_bytes = simulate(plan.chain, keep_all(plan.chain)).peak_bytes - plan.chain.workspace_bytes
    assert estimated.plain_peak_bytes == pytest.approx(measured_bytes, rel=0.1)


def test_on_the_meta_device_the_graph_is_the_same() -> None:
    def captured(device: str) -> object:
        with torch.device(device):
            return tbp.capture_graph(conv_net(), torch.empty(2, 8, 16, 16))

    assert captured("meta") == captured("cpu")


def test_a_forward_that_is_no_graph_says_what_to_do() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x.sin()

    with pytest.raises(CaptureError, match=r"`Breaks` cannot be captured as one graph .*`tbp.explain\(module\)`"):
        tbp.capture_graph(Breaks(), torch.ones(2))
    with pytest.raises(CaptureError, match=r"under `tbp.hcb`, call `tbp.restore` first"):
        tbp.capture_graph(tbp.hcb(conv_net(), activation_budget="1MiB"), torch.ones(1, 8, 4, 4))
