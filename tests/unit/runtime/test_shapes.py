"""Inputs of many shapes: each under the budget and bit for bit, a bounded number held, and few of them measured."""

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, assert_all_same, peak_bytes, residual_net, train
from tinybp_lightning.config import MAX_LIVE_GRAPHS
from tinybp_lightning.runtime.profile import PlanCounts
from tinybp_lightning.runtime.torch import dispatcher, targets

LENGTHS = (64, 60, 52, 50, 33, 47, 30, 26, 62, 49, 25, 57)
BUDGET_BYTES = 150_000
BATCH = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))


def loss_at(length: int) -> Callable[[nn.Module], torch.Tensor]:
    batch = BATCH[:, :length].clone()
    return lambda model: model(batch).square().mean()


def under_budget(**options: Any) -> tuple[nn.Module, Recorder]:
    recorder = Recorder()
    config = tbp.HCBConfig(activation_budget=BUDGET_BYTES, **options)
    return tbp.hcb(residual_net(), config=config, observers=[recorder]), recorder


def counts_of(model: nn.Module) -> PlanCounts:
    (target,) = targets(model)
    return target.counts


def test_twelve_lengths_keep_the_budget_and_the_bits() -> None:
    plain, (model, recorder) = residual_net(), under_budget()
    for length in (*LENGTHS, *LENGTHS):
        want = train(plain, loss_at(length), steps=2)
        assert_all_same(train(model, loss_at(length), steps=2), want)
    measured = [p.measured_peak_bytes for p in recorder.profiles if p.measured_peak_bytes is not None]
    assert len(measured) >= len(LENGTHS)
    assert max(measured) <= BUDGET_BYTES
    for length in LENGTHS:
        assert peak_bytes(model, loss_at(length)) <= BUDGET_BYTES
    counts = counts_of(model)
    assert (counts.num_graphs, counts.num_live, counts.num_evicted) == (12, 12, 0)
    # Measured: 64; 33 and 47, which are less than three quarters of it. The others are near to one of these.
    assert (counts.num_measured, counts.num_larger, counts.num_cached) == (3, 9, 0)


def test_a_smaller_shape_flies_the_plan_of_a_larger_one_that_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = under_budget()
    train(model, loss_at(64))
    (report,) = targets(model)[0].reports

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured, with the plan of a larger shape at hand")

    monkeypatch.setattr("tinybp_lightning.runtime.torch.traced_module.measure_chain", refuse)
    monkeypatch.setattr("tinybp_lightning.runtime.torch.control_loop.Planner", refuse)
    recorder.profiles.clear()
    train(model, loss_at(60))
    smaller = targets(model)[0].reports[-1]
    assert smaller.schedule == report.schedule
    assert smaller.reason == "larger shape"
    assert recorder.profiles[0].measured_peak_bytes == smaller.predicted_peak_bytes
    assert smaller.predicted_peak_bytes < report.predicted_peak_bytes


@pytest.mark.parametrize("length", [40, 65])
def test_a_far_or_a_larger_shape_is_measured(length: int) -> None:
    model, _ = under_budget()
    train(model, lambda m: m(torch.ones(2, 64, 16)).square().mean(), steps=2)
    train(model, lambda m: m(torch.ones(2, length, 16)).square().mean(), steps=2)
    assert (counts_of(model).num_measured, counts_of(model).num_larger) == (2, 0)


def test_only_plans_of_a_program_s_own_are_on_disk() -> None:
    for length in (64, 60):
        train(under_budget()[0], loss_at(length))
    model, _ = under_budget()
    train(model, loss_at(64))
    train(model, loss_at(60))
    train(model, loss_at(57))
    assert (counts_of(model).num_cached, counts_of(model).num_larger) == (2, 1)
    model, _ = under_budget()
    train(model, loss_at(57))
    assert counts_of(model).num_measured == 1


@pytest.mark.parametrize("plan_cache", [True, False])
def test_live_graphs_are_bounded_and_come_back_without_measuring(
    plan_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "MAX_LIVE_GRAPHS", 2)
    plain, (model, recorder) = residual_net(), under_budget(plan_cache=plan_cache)
    lengths = (64, 40, 24)
    for length in lengths:
        assert_all_same(train(model, loss_at(length)), train(plain, loss_at(length)))
    counts = counts_of(model)
    assert (counts.num_graphs, counts.num_live, counts.num_evicted, counts.num_measured) == (3, 2, 1, 3)
    recorder.profiles.clear()
    for length in lengths:
        assert_all_same(train(model, loss_at(length)), train(plain, loss_at(length)))
    counts = counts_of(model)
    # No trace and no measurement more: the plans were known, and are traced once again.
    assert (counts.num_graphs, counts.num_live, counts.num_evicted) == (3, 2, 4)
    assert (counts.num_measured, counts.num_cached) == (3, 3)
    measured = [p.measured_peak_bytes for p in recorder.profiles if p.measured_peak_bytes is not None]
    assert len(measured) == 3
    assert max(measured) <= BUDGET_BYTES


def test_the_graph_used_longest_ago_goes_and_what_it_held_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "MAX_LIVE_GRAPHS", 2)
    model, _ = under_budget()
    train(model, loss_at(64))
    train(model, loss_at(40))
    (target,) = targets(model)
    first, second = (weakref.ref(program) for program in target.traced_modules)
    controllers = [weakref.ref(program.control) for program in target.traced_modules if program.control is not None]
    train(model, loss_at(64))
    train(model, loss_at(24))
    gc.collect()
    assert first() in target.traced_modules
    assert second() is None
    assert [controller() is None for controller in controllers] == [False, True]


def test_a_graph_that_goes_between_its_forward_and_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is under way keeps what it needs."""
    monkeypatch.setattr(dispatcher, "MAX_LIVE_GRAPHS", 1)

    def both_lengths(model: nn.Module) -> torch.Tensor:
        return loss_at(64)(model) + loss_at(40)(model)

    model, _ = under_budget()
    assert_all_same(train(model, both_lengths), train(residual_net(), both_lengths))
    assert counts_of(model).num_evicted == 5


def test_shapes_seen_before_cost_nothing() -> None:
    """Last partial batches and evaluation in between: one trace and one plan for each shape."""
    model, recorder = under_budget()
    plain = residual_net()
    for _ in range(3):
        for length in (64, 64, 17):
            assert_all_same(train(model, loss_at(length)), train(plain, loss_at(length)))
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(BATCH), plain.eval()(BATCH))
        model.train()
        plain.train()
    counts = counts_of(model)
    assert (counts.num_graphs, counts.num_measured, counts.num_cached, counts.num_larger) == (2, 2, 0, 0)
    assert all(p.measured_peak_bytes is None for p in recorder.profiles[-9:])


def test_explain_says_where_plans_came_from() -> None:
    model, _ = under_budget()
    train(model, loss_at(64))
    train(model, loss_at(60))
    explanation = tbp.explain(model)
    shown = "Sequential: 2 graphs (2 live, 0 evicted), plans 1 measured, 0 cached, 1 from a larger shape, 0 compiled"
    assert f"shapes of {shown}" in str(explanation)
    assert f"- shapes of {shown}" in explanation.to_markdown()
    assert json.loads(explanation.to_json())["counts"] == [
        {
            "target": "Sequential",
            "num_graphs": 2,
            "num_live": 2,
            "num_evicted": 0,
            "num_measured": 1,
            "num_cached": 0,
            "num_larger": 1,
            "num_compiled": 0,
        }
    ]


def test_a_session_counts_each_target() -> None:
    model = nn.ModuleDict({"one": residual_net(2), "two": residual_net(2)})
    session = tbp.attach(model, config=tbp.HCBConfig(activation_budget="1MiB"), discover=True)
    assert session.counts == ()
    train(model, lambda m: m["one"](BATCH).square().mean() + m["two"](BATCH).square().mean())
    assert [counts.num_graphs for counts in session.counts] == [1, 1]


def test_the_bound_is_the_documented_one() -> None:
    assert dispatcher.MAX_LIVE_GRAPHS == MAX_LIVE_GRAPHS == 16
