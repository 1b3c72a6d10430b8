"""What a memory budget leaves for activations: optimizer state before it exists, and once it is seen."""

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, residual_net
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.runtime.torch.measure import memory_limit
from tinybp_lightning.runtime.torch.measure.memory_limit import (
    Headroom,
    OptimizerState,
    TargetMemory,
    fragmented_bytes,
    limit_bytes,
)
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WIDTH = 16
X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


def held_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


# ---- what is seen of an optimizer ------------------------------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.mark.parametrize(("make", "copies", "counter_bytes"), [(sgd, 0, 0), (momentum, 1, 0), (adamw, 2, 4)])
def test_the_first_step_shows_what_the_optimizer_keeps(make: Any, copies: int, counter_bytes: int) -> None:
    model = residual_net(2)
    held = held_bytes(model)
    num_parameters = len(list(model.parameters()))
    state = OptimizerState(model.parameters())
    assert (state.has_seen, state.unknown_bytes, state.made_bytes) == (False, held, 0)
    step(model, make(model.parameters()))
    assert (state.has_seen, state.unknown_bytes, state.existed_bytes) == (True, 0, 0)
    assert state.made_bytes == copies * held + counter_bytes * num_parameters


def test_loaded_state_was_there_before_the_first_step() -> None:
    model = residual_net(2)
    optimizer = momentum(model.parameters())
    step(model, optimizer)
    state = OptimizerState(model.parameters())
    step(model, optimizer)
    assert (state.existed_bytes, state.made_bytes, state.unknown_bytes) == (held_bytes(model), 0, 0)


def test_state_on_another_device_takes_nothing_here() -> None:
    """A step counter may be on the CPU while the parameters are on the device."""
    (p,) = parameters = [nn.Parameter(torch.zeros(4))]
    state, optimizer = OptimizerState(parameters), sgd(parameters)
    optimizer.state[p] = {"here": torch.zeros(4), "elsewhere": torch.zeros(4, device="meta")}
    p.grad = torch.zeros(4)
    optimizer.step()
    assert (state.existed_bytes, state.made_bytes) == (16, 0)


class Sharded(torch.Tensor):
    """Eight floats, two of which are in this process."""

    def to_local(self) -> torch.Tensor:
        return torch.zeros(2)


def test_of_a_sharded_parameter_its_own_part_counts() -> None:
    p = torch.zeros(8).as_subclass(Sharded).requires_grad_()
    assert OptimizerState([p]).unknown_bytes == 8


def test_two_optimizers_share_a_model() -> None:
    model = residual_net(2)
    first, second = (held_bytes(part) for part in model)
    state = OptimizerState(model.parameters())
    one, other = momentum(model[0].parameters()), sgd(model[1].parameters())
    step(model, one)
    assert (state.made_bytes, state.unknown_bytes) == (first, second)
    step(model, other)
    assert (state.made_bytes, state.unknown_bytes) == (first, 0)


def test_an_optimizer_of_other_parameters_is_not_ours() -> None:
    model, other = residual_net(2), residual_net(1)
    state = OptimizerState(model.parameters())
    step(other, momentum(other.parameters()))
    assert not state.has_seen


def test_the_hooks_go_with_the_model() -> None:
    def num_hooks() -> int:
        gc.collect()
        hooks: Any = torch_optimizer
        return len(hooks._global_optimizer_pre_hooks) + len(hooks._global_optimizer_post_hooks)

    settle_pending()  # of the test before
    before = num_hooks()
    model = tbp.hcb(residual_net(2), memory_budget="1GiB")
    optimizer = momentum(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    assert num_hooks() > before
    tbp.restore(model)
    assert num_hooks() == before


# ---- the headroom that is left ---------------------------------------------------------------------------------------


def test_headroom_before_and_after_the_state_is_seen() -> None:
    model = residual_net(2)
    held = held_bytes(model)
    shared = TargetMemory(OptimizerState(model.parameters()))
    headroom = Headroom(HCBConfig(memory_budget=100 * held), CPU, list(model.parameters()), shared)
    assert headroom(0) == 100 * held - held - 2 * held
    step(model, momentum(model.parameters()))
    assert headroom(0) == 100 * held - held - held


def test_headroom_with_state_said_by_the_user() -> None:
    model = residual_net(2)
    held = held_bytes(model)
    shared = TargetMemory(OptimizerState(model.parameters()))
    config = HCBConfig(memory_budget=100 * held, optimizer_state_bytes=5 * held)
    headroom = Headroom(config, CPU, list(model.parameters()), shared)
    assert headroom.optimizer_bytes == 5 * held
    step(model, momentum(model.parameters()))
    assert headroom.optimizer_bytes == held  # what was seen is better known


def test_the_cuda_allocators_count_holds_the_state_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is made later must not set the state aside a second time."""
    allocated = 0
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    monkeypatch.setattr(memory_limit, "fragmented_bytes", lambda _: 0)
    model = residual_net(2)
    held = held_bytes(model)
    shared = TargetMemory(OptimizerState(model.parameters()))
    config = HCBConfig(memory_budget=100 * held)
    allocated = held
    early = Headroom(config, CUDA, list(model.parameters()), shared)
    assert early(0) == 97 * held
    step(model, momentum(model.parameters()))
    allocated = 2 * held
    late = Headroom(config, CUDA, list(model.parameters()), shared)
    assert early(0) == late(0) == 98 * held


def test_auto_fills_the_device_less_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caching allocator holds is this process's own; what others hold is not to be had."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10_000)
    assert limit_bytes(HCBConfig(memory_budget="auto").budget, CUDA) == int(70_000 * 0.95)
    assert limit_bytes(HCBConfig(memory_budget="50%").budget, CUDA) == 40_000


def test_pieces_that_the_allocator_cannot_give_back_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"inactive_split_bytes.all.current": 300})
    assert fragmented_bytes(CPU) == 0
    headroom = Headroom(HCBConfig(memory_budget=10_000, optimizer_state_bytes=0), CUDA, [], TargetMemory(None))
    assert headroom(0) == 10_000 - 1000 - 300


def test_on_a_cpu_each_storage_counts_once_and_gradients_count() -> None:
    whole, learned = torch.zeros(10), nn.Parameter(torch.zeros(4))
    learned.grad = torch.zeros(4)
    made = learned * 2  # its gradient may not be asked for
    room = Headroom(HCBConfig(memory_budget=1000), CPU, [whole, whole[2:5], learned, made], TargetMemory(None))
    assert room(0) == 1000 - (40 + 16 + 16 + 16)


def test_on_a_cpu_state_that_was_loaded_is_set_aside_too() -> None:
    model = residual_net(2)
    optimizer = momentum(model.parameters())
    step(model, optimizer)
    shared = TargetMemory(OptimizerState(model.parameters()))
    room = Headroom(HCBConfig(memory_budget="1GiB"), CPU, list(model.parameters()), shared)
    step(model, optimizer)
    assert room.optimizer_bytes == held_bytes(model)


def test_no_state_is_expected_of_what_is_frozen() -> None:
    model = residual_net(2)
    model[0].requires_grad_(False)
    assert OptimizerState(model.parameters()).unknown_bytes == held_bytes(model[1])


def test_a_cap_holds_for_all_plans_of_a_target() -> None:
    shared, config = TargetMemory(None), HCBConfig(activation_budget=100)
    one, other = (Headroom(config, CPU, [], shared) for _ in range(2))
    assert other.cap_bytes is None
    shared.cap_bytes = 70
    assert (one.cap_bytes, other.cap_bytes) == (70, 70)


def test_a_share_is_of_the_largest_plain_peak_of_the_target() -> None:
    """A small last batch is not held to a share of its own small peak."""
    shared, config = TargetMemory(None), HCBConfig(activation_budget="50%")
    large, small = (Headroom(config, CPU, [], shared) for _ in range(2))

    def planned(headroom: Headroom, plain_bytes: int) -> int:
        granted_bytes = headroom(plain_bytes)
        headroom.share(replace(headroom.read(), largest_plain_bytes=plain_bytes))
        return granted_bytes

    assert (planned(large, 100), planned(small, 40), planned(large, 100)) == (50, 50, 50)
    assert (planned(small, 200), planned(large, 100)) == (100, 100)


# ---- the plan follows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "copies"), [(sgd, 0), (momentum, 1)])
def test_the_plan_is_made_again_once_when_the_state_is_seen(make: Any, copies: int) -> None:
    """Two copies were assumed."""
    model, recorder = residual_net(6), Recorder()
    held = held_bytes(model)
    tbp.hcb(model, config=HCBConfig(memory_budget="1GiB"), observers=[recorder])
    optimizer = make(model.parameters())
    for _ in range(6):
        step(model, optimizer)
    reasons = [p.reason for p in recorder.plans]
    assert reasons.count("optimizer state") == 1
    first, seen = recorder.plans[0], recorder.plans[reasons.index("optimizer state")]
    assert first.budget_bytes == 2**30 - X.nbytes - 3 * held
    assert seen.budget_bytes == first.budget_bytes + (2 - copies) * held


@pytest.mark.parametrize(("make", "copies"), [(sgd, 0), (momentum, 1)])
def test_within_a_closure_the_state_is_seen_before_the_plan_for_the_budget(make: Any, copies: int) -> None:
    """A Trainer runs forward and backward inside `optimizer.step(closure)`: its end is the step's."""
    model, recorder = residual_net(6), Recorder()
    held = held_bytes(model)
    tbp.hcb(model, config=HCBConfig(memory_budget="1GiB"), observers=[recorder])
    optimizer = make(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert {p.budget_bytes for p in recorder.plans} == {2**30 - X.nbytes - held - copies * held}


def test_more_headroom_makes_a_faster_plan() -> None:
    """A budget under which two copies of the parameters leave too little to keep every block, and none does."""
    model = residual_net(6)
    held = held_bytes(model)
    probe = Recorder()
    tbp.hcb(copy.deepcopy(model), memory_budget="1GiB", observers=[probe])
    reference = tbp.hcb(copy.deepcopy(model), memory_budget="1GiB", observers=[probe])
    for _ in range(3):
        step(reference, sgd(reference.parameters()))
    plain_bytes = probe.plans[-1].predicted_peak_bytes
    recorder = Recorder()
    tbp.hcb(model, memory_budget=held + X.nbytes + plain_bytes + held, observers=[recorder])
    optimizer = sgd(model.parameters())
    for _ in range(6):
        step(model, optimizer)
    by_reason = {p.reason: p for p in recorder.plans}
    assert by_reason["budget"].num_kept < len(by_reason["budget"].chain.blocks)
    assert by_reason["optimizer state"].num_kept > by_reason["budget"].num_kept
    assert by_reason["optimizer state"].predicted_step_s < by_reason["budget"].predicted_step_s
