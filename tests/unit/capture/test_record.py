"""A forward is recorded as autograd sees it (storages, writes, randomness, saved tensors), without running it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

import tinybp_lightning as tbp
from tests.unit.capture.graphs import trace_graph
from tests.unit.runtime.training import residual_net
from tinybp_lightning.capture.torch.record import flops_of
from tinybp_lightning.errors import CaptureError
from tinybp_lightning.graph.ir import Graph, Node, StorageKind
from tinybp_lightning.schedule import keep_all, simulate

ROWS, WIDTH = 3, 8
X = torch.randn(ROWS, WIDTH)


def node(graph: Graph, op: str) -> Node:
    (found,) = (n for n in graph.nodes if n.op == op)
    return found


def kinds(graph: Graph, storages: tuple[int, ...]) -> list[StorageKind]:
    return [graph.storages[s].kind for s in storages]


def test_a_linear_layer_saves_its_input_and_nothing_new() -> None:
    graph = trace_graph(nn.Linear(WIDTH, WIDTH), X.clone().requires_grad_()).graph
    linear = node(graph, "linear")
    assert sorted(kinds(graph, linear.saved), key=lambda k: k.value) == [StorageKind.INPUT, StorageKind.PARAMETER]
    assert linear.flops == 2 * ROWS * WIDTH * WIDTH
    assert not linear.is_random
    (value,) = linear.makes
    assert graph.values[value].shape == (ROWS, WIDTH)
    assert graph.values[value].dtype == "float32"
    assert graph.values[value].requires_grad


def test_under_autocast_a_linear_layer_saves_copies_of_what_it_reads() -> None:
    """A weight is cast once and the copy kept, for whoever reads it next."""
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = trace_graph(lambda x: layer(layer(x).float()), X.clone().requires_grad_()).graph
    first, second = (n for n in graph.nodes if n.op == "linear")
    for linear in (first, second):
        assert {copy for copy, _ in linear.copies} == set(linear.saved)
        read = {graph.values[v].storage for v in linear.reads}
        assert {source for _, source in linear.copies} <= read
        assert {graph.storages[s].size_bytes for s in linear.saved} == {2 * ROWS * WIDTH, 2 * WIDTH * WIDTH}
    assert len(set(first.saved) & set(second.saved)) == 1


def test_a_linear_layer_of_a_transposed_input_saves_a_copy_of_it() -> None:
    layer = nn.Linear(ROWS, WIDTH)
    graph = trace_graph(lambda x: layer(x.repeat(2, 1, 1).transpose(1, 2)), X).graph
    linear = node(graph, "linear")
    ((copy, source),) = linear.copies
    assert copy in linear.saved
    assert source == graph.values[node(graph, "repeat").makes[0]].storage


def test_an_op_that_copies_is_not_said_to_save_a_copy() -> None:
    graph = trace_graph(lambda x: x.exp().clone().exp(), X.clone().requires_grad_()).graph
    assert not any(n.copies for n in graph.nodes)


def test_inputs_are_of_the_right_kind() -> None:
    graph = trace_graph(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)), X).graph
    found = {graph.storages[s].kind for v in graph.inputs if (s := graph.values[v].storage) is not None}
    assert found == {StorageKind.PARAMETER, StorageKind.BUFFER, StorageKind.INPUT}


def test_views_share_a_storage() -> None:
    graph = trace_graph(lambda x: (x.exp().view(-1)[2:].view(2, 11), x.t()), X).graph
    exp, *views = [v for n in graph.nodes for v in n.makes if n.op != "t"]
    storages = {graph.values[v].storage for v in (exp, *views)}
    assert len(storages) == 1
    (t,) = node(graph, "t").makes
    assert graph.storages[graph.values[t].storage or 0].kind is StorageKind.INPUT


def test_a_write_is_a_write_through_any_view() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        y[1:].mul_(2.0)
        return y

    graph = trace_graph(forward, X).graph
    (storage,) = node(graph, "mul_").writes
    (made,) = node(graph, "exp").makes
    assert graph.values[made].storage == storage


@pytest.mark.parametrize(
    ("forward", "op"),
    [
        (lambda x: F.dropout(x, 0.1), "dropout"),
        (lambda x: x + torch.rand(WIDTH), "rand"),
        (lambda x: F.rrelu(x, training=True), "rrelu"),
        (lambda x: x.bernoulli(0.5), "bernoulli"),
        (F.gumbel_softmax, "gumbel_softmax"),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1), None),
    ],
)
def test_random_ops_are_marked(forward: Callable[..., torch.Tensor], op: str | None) -> None:
    graph = trace_graph(forward, X).graph
    random = [n for n in graph.nodes if n.is_random]
    assert len(random) == 1
    assert op is None or random[0].op == op


@pytest.mark.parametrize("forward", [lambda x: F.dropout(x, 0.1, training=False), lambda x: x.exp()])
def test_others_are_not(forward: Callable[..., torch.Tensor]) -> None:
    assert not any(n.is_random for n in trace_graph(forward, X).graph.nodes)


def test_running_statistics_are_written_in_training_only() -> None:
    norm = nn.BatchNorm1d(WIDTH)
    written = node(trace_graph(norm, X).graph, "batch_norm").writes
    assert len(written) == 2
    assert node(trace_graph(norm.eval(), X).graph, "batch_norm").writes == ()


def test_private_saved_tensors_are_counted() -> None:
    """Dropout keeps a mask that no value of the graph shows."""
    graph = trace_graph(lambda x: F.dropout(x, 0.5), X.clone().requires_grad_()).graph
    dropout = node(graph, "dropout")
    shown = {v.storage for v in graph.values}
    assert any(s not in shown for s in dropout.saved)


def test_modules_are_named() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    graph = trace_graph(model, X).graph
    assert [n.module for n in graph.nodes] == ["0", "1.0", "1.1"]


def test_a_no_grad_region_is_tied_together() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        with torch.no_grad():
            z = y.tanh()
        return y * z

    graph = trace_graph(forward, X).graph
    off, on = [n for n in graph.nodes if n.op == "_set_grad_enabled"]
    assert off.makes[0] in on.reads
    (value,) = node(graph, "tanh").makes
    assert not graph.values[value].requires_grad


def test_the_generators_and_grad_mode_are_left_alone() -> None:
    found = trace_graph(lambda x: F.dropout(x, 0.5), X)
    state = torch.get_rng_state()
    with torch.no_grad():
        _ = found.graph
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_are_left_alone() -> None:
    norm = nn.BatchNorm1d(WIDTH)
    found = trace_graph(norm, X)
    mean = norm.running_mean.clone()  # type: ignore[union-attr]
    _ = found.graph
    assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]


def test_a_call_that_fails_on_fake_tensors_is_an_error() -> None:
    found = trace_graph(lambda x: x.exp().view(-1), X)
    (view,) = (n for n in found.module.graph.nodes if n.target == "view")
    view.args = (view.args[0], 7)
    with pytest.raises(CaptureError, match="`test` cannot be captured"):
        _ = found.graph


CHANNELS = 64


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
    ("make", "shape"), [(lambda: residual_net(6, width=CHANNELS), (32, CHANNELS)), (conv_net, (4, 8, 32, 32))]
)
def test_it_is_the_graph_that_is_trained_and_its_estimate_is_near(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = make(), torch.randn(shape)
    estimated = tbp.pareto(tbp.capture_graph(model, x), num_points=2)
    tbp.hcb(model, activation_budget="90%")
    model(x).square().mean().backward()
    (plan,) = tbp.explain(model).plans
    measured_bytes = simulate(plan.chain, keep_all(plan.chain)).peak_bytes - plan.chain.unmodelled_bytes
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


ATEN = torch.ops.aten
BATCH, HEADS, LENGTH, HEAD_WIDTH = 2, 8, 16, 32


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("num_key_heads", [HEADS, 2])
def test_attention_with_fewer_heads_of_keys_takes_as_many_operations(kernel: str, num_key_heads: int) -> None:
    query = torch.empty(BATCH, HEADS, LENGTH, HEAD_WIDTH, device="meta")
    key = torch.empty(BATCH, num_key_heads, 2 * LENGTH, HEAD_WIDTH, device="meta")
    value = torch.empty(BATCH, num_key_heads, 2 * LENGTH, 2 * HEAD_WIDTH, device="meta")
    packet = getattr(ATEN, f"_scaled_dot_product_{kernel}_attention")
    found = flops_of(packet, (query, key, value), {"is_causal": True}, (None,))
    scores, weighted = 2 * LENGTH * (2 * LENGTH) * HEAD_WIDTH, 2 * LENGTH * (2 * LENGTH) * (2 * HEAD_WIDTH)
    assert found == BATCH * HEADS * (scores + weighted)


def test_other_kernels_are_counted_by_torch() -> None:
    x, w = torch.empty(4, 8), torch.empty(8, 16)
    with FlopCounterMode(display=False) as counter:
        out = x @ w
    assert flops_of(ATEN.mm, (x, w), {}, out) == counter.get_total_flops() == 2 * 4 * 8 * 16
    assert flops_of(ATEN.relu, (x,), {}, x) == 0
