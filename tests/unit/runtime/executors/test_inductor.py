"""Options of a compiled block: each saves less than the one before, and all compute the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.compile_fx import compile_fx_inner as inner_compile

import tinybp_lightning as tbp
from tests.unit.capture.graphs import Traced, trace_graph
from tests.unit.runtime.training import Recorder, peak_bytes, residual_net, train
from tinybp_lightning.capture.torch.pieces import Program, cut_program
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.graph.cuts.narrow import Granularity
from tinybp_lightning.runtime.torch.executors import inductor as compiled_blocks
from tinybp_lightning.runtime.torch.executors.executor import Preparation
from tinybp_lightning.runtime.torch.executors.inductor import InductorExecutor
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.schedule.actions import Backward

WIDTH, ROWS = 32, 256
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def _counted(monkeypatch: pytest.MonkeyPatch, compile_graph: Callable[..., Any] = compile_fx) -> list[fx.GraphModule]:
    """Have blocks compiled by `compile_graph`, and return a list of them that grows."""
    compiles: list[fx.GraphModule] = []

    def counted(module: fx.GraphModule, arguments: list[torch.Tensor], **settings: Any) -> Callable[..., Any]:
        if "inner_compile" in settings:  # a forecast, for which nothing is compiled
            return compile_fx(module, arguments, **settings)
        compiles.append(module)
        return compile_graph(module, arguments, **settings)

    monkeypatch.setattr(compiled_blocks, "compile_fx", counted)
    return compiles


def asked(program: Program, found: Traced) -> Preparation:
    externals = partial(NonBoundaryInputs.of, found.inputs)
    return Preparation(program, externals, [torch.device("cpu")], lambda done, total: None)


def _net() -> nn.Sequential:
    return residual_net(4, width=WIDTH, dropout=0.0)


@pytest.mark.timeout(900)
def test_each_option_saves_less_and_computes_the_same() -> None:
    found = trace_graph(_net(), X)
    program = cut_program(found.module, found.graph, granularity=Granularity.COARSE)
    executor = InductorExecutor()
    compiled = executor.prepare(asked(program, found))
    index, piece = next((i, p) for i, p in enumerate(compiled.pieces) if len(p.calls) > 1)
    assert [executor.is_ready(call) for call in piece.calls] == [True, False, False, False]
    further = [(index, o) for o in (1, 2, 3)]
    assert executor.unprepared(compiled, [(index, 0), *further]) == set(further)
    executor.prepare_options(asked(compiled, found), further)
    assert all(executor.is_ready(call) for call in piece.calls)
    arguments = [found.inputs[s.index] for s in piece.reads if s.origin == "external"]
    assert len(arguments) == len(piece.reads) - 1, "one leaf of the boundary, all else are parameters"
    saved: list[int] = []
    results: list[list[torch.Tensor]] = []
    for call in piece.calls:
        hidden = X.clone().requires_grad_()
        held: dict[int, int] = {}

        def pack(t: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[storage_key(t)] = t.untyped_storage().nbytes()
            return t

        values = [found.inputs[s.index] if s.origin == "external" else hidden for s in piece.reads]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            (out,) = call(list(values))
        gradients = torch.autograd.grad(out.square().sum(), [hidden, *arguments])
        results.append([out.detach(), *gradients])
        own = {storage_key(t) for t in values}
        saved.append(sum(size_bytes for key, size_bytes in held.items() if key not in own))
    assert saved[0] > saved[1] >= saved[2] >= saved[3]
    assert saved[3] < saved[0] / 4
    forecasts = [executor.forecast(call) for call in piece.calls[1:]]
    assert [f.saved_bytes for f in forecasts if f is not None] == saved[1:], "known to the byte before compiling"
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other)


def test_equal_blocks_are_compiled_once_whatever_the_tracer_called_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiles = _counted(monkeypatch, lambda module, _, **__: module.forward)
    num_compiles: list[int] = []
    for depth in (4, 8):
        found = trace_graph(residual_net(depth, width=WIDTH, dropout=0.0), X)
        program = cut_program(found.module, found.graph, granularity=Granularity.COARSE)
        unequal = {p.span.signature for p in program.pieces}
        assert len(program.pieces) >= len(unequal) + depth // 2
        compiles.clear()
        InductorExecutor().prepare(asked(program, found))
        num_compiles.append(len(compiles))
    assert num_compiles[0] == num_compiles[1]


@pytest.mark.timeout(900)
def test_a_plan_uses_options_where_they_are_cheaper_than_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a budget that keeps a part of every block, some block's backward goes by a further option."""
    plain, model, recorder = _net(), _net(), Recorder()

    def loss_of(net: nn.Module) -> torch.Tensor:
        return net(X).square().mean()

    compiles = _counted(monkeypatch)
    expected = train(plain, loss_of, steps=4)
    budget_bytes = int(0.6 * peak_bytes(plain, loss_of))
    tbp.hcb(model, activation_budget=budget_bytes, executor="inductor", observers=[recorder])
    found = train(model, loss_of, steps=4)
    plan, *_ = reversed(recorder.plans)
    assert any(isinstance(a, Backward) and a.option for a in plan.schedule.actions)
    further = {
        (block.signature, option)
        for block in plan.chain.blocks
        for option, costs in enumerate(block.options)
        if option and not costs.is_estimated
    }
    assert len(compiles) == len({block.signature for block in plan.chain.blocks}) + len(further)
    assert peak_bytes(model, loss_of) <= budget_bytes
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.loss, other.loss)
        assert all(torch.allclose(g, other.gradients[n], atol=1e-6) for n, g in one.gradients.items())


@pytest.mark.timeout(900)
def test_where_everything_is_kept_only_option_0_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiles = _counted(monkeypatch)
    model, recorder = _net(), Recorder()
    tbp.hcb(model, activation_budget="100%", executor="inductor", observers=[recorder])

    def loss_of(net: nn.Module) -> torch.Tensor:
        return net(X).square().mean()

    train(model, loss_of, steps=3)
    kinds = {block.signature for block in recorder.plans[-1].chain.blocks}
    assert any(len(block.options) > 1 for block in recorder.plans[-1].chain.blocks)
    assert len(compiles) == len(kinds)


@pytest.mark.timeout(900)
def test_a_plan_from_disk_has_its_options_compiled_and_nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_of(net: nn.Module) -> torch.Tensor:
        return net(X).square().mean()

    budget_bytes = int(0.6 * peak_bytes(_net(), loss_of))
    model, first, again = _net(), Recorder(), Recorder()
    tbp.hcb(model, activation_budget=budget_bytes, executor="inductor", observers=[first])
    expected = train(model, loss_of, steps=4)
    plan = first.plans[-1]
    taken = {
        (plan.chain.blocks[a.block].signature, a.option)
        for a in plan.schedule.actions
        if isinstance(a, Backward) and a.option
    }
    assert taken

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a known plan needs no measuring")

    monkeypatch.setattr("tinybp_lightning.runtime.torch.traced_module.measure_chain", refuse)
    compiles = _counted(monkeypatch)
    model = _net()
    tbp.hcb(model, activation_budget=budget_bytes, executor="inductor", observers=[again])
    found = train(model, loss_of, steps=4)
    assert again.plans[0].reason == "cached"
    assert len(compiles) == len({block.signature for block in plan.chain.blocks}) + len(taken)
    for one, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.timeout(900)
def test_a_micro_batch_with_gradients_from_before_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compiles = _counted(monkeypatch)
    model, recorder = _net(), Recorder()
    tbp.hcb(model, activation_budget="100%", executor="inductor", observers=[recorder])
    num_compiles: list[int] = []
    for _ in range(4):
        model(X).square().mean().backward()
        num_compiles.append(len(compiles))
    assert all(p.grad is not None for p in model.parameters())
    assert num_compiles[1:] == [num_compiles[0]] * 3


@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_deterministic_algorithms_leave_no_kernel_to_be_timed(
    monkeypatch: pytest.MonkeyPatch, is_deterministic: bool
) -> None:
    timed: list[bool] = []

    def noting(*arguments: Any, **settings: Any) -> Callable[..., Any]:
        if "inner_compile" in settings:  # a forecast, for which nothing is compiled
            return compile_fx(*arguments, **settings)

        def note(module: fx.GraphModule, inputs: Any, **others: Any) -> Callable[..., Any]:
            timed.append(inductor_config.triton.autotune_pointwise)
            return inner_compile(module, inputs, **others)

        return compile_fx(*arguments, inner_compile=note, **settings)

    monkeypatch.setattr(compiled_blocks, "compile_fx", noting)
    model = _net()
    tbp.hcb(model, activation_budget="50%", executor="inductor")
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        train(model, lambda net: net(X).square().mean(), steps=1)
    finally:
        torch.use_deterministic_algorithms(False)
    # Forward and backward of each kind of block.
    assert len(timed) >= 4
    assert set(timed) == {not is_deterministic}
