"""Unmodified models at every budget: plain training bit for bit, under the budget, and as predicted."""

from dataclasses import dataclass
from functools import cache

import pytest
from torch import nn

import tinybp_lightning as tbp
from tests.integration.runtime.models import WORKLOADS, checkpointed, made
from tests.unit.runtime.training import Outcome, Recorder, assert_all_same, peak_bytes, train
from tinybp_lightning.errors import BudgetTooSmallError

STEPS = 4
LR = 0.01


@dataclass(frozen=True, slots=True)
class Plain:
    """Plain training, measured once for all budgets."""

    outcomes: list[Outcome]
    peak_bytes: int
    checkpointed_bytes: int


@cache
def plain(name: str) -> Plain:
    workload = WORKLOADS[name]
    outcomes = train(made(workload), workload.loss_of, steps=STEPS, lr=LR)
    peaks = [peak_bytes(model, workload.loss_of) for model in (made(workload), checkpointed(workload))]
    return Plain(outcomes, *peaks)


@cache
def smallest_bytes(name: str) -> int:
    """What the error for an impossible budget says, once a step has been measured."""
    workload = WORKLOADS[name]
    model = tbp.hcb(made(workload), activation_budget=1)
    with pytest.raises(BudgetTooSmallError) as caught:
        workload.loss_of(model)
    return caught.value.smallest_bytes


def check(name: str, budget_bytes: int) -> tuple[Recorder, nn.Module]:
    workload, recorder = WORKLOADS[name], Recorder()
    model = tbp.hcb(made(workload), activation_budget=budget_bytes, observers=[recorder])
    assert_all_same(train(model, workload.loss_of, steps=STEPS, lr=LR), plain(name).outcomes)
    assert recorder.profiles[0].replayed_blocks > 0
    assert all(profile.out_of_order_blocks == 0 for profile in recorder.profiles)
    measured_bytes = peak_bytes(model, workload.loss_of)
    assert measured_bytes <= budget_bytes
    predicted_bytes = recorder.profiles[-1].predicted_peak_bytes
    assert abs(predicted_bytes - measured_bytes) <= 0.05 * measured_bytes
    return recorder, model


@pytest.mark.parametrize("percent", [100, 50, 30])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_share_of_plain_training(name: str, percent: int) -> None:
    check(name, plain(name).peak_bytes * percent // 100)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_smallest_feasible_budget(name: str) -> None:
    budget_bytes = smallest_bytes(name)
    assert budget_bytes < plain(name).checkpointed_bytes
    check(name, budget_bytes)
