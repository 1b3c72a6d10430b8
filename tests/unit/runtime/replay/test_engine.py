"""The engine plays a schedule: the right blocks, in the right order, as often as the literature counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.runtime.replay.chains import Layer, Log, layers, plain, replayed
from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import replay_program_of
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.baselines import every_k, keep_all, per_block, revolve, revolve_cost
from tinybp_lightning.schedule.notation import from_text
from tinybp_lightning.schedule.verify import verify_schedule

PLANS: dict[str, Callable[[Chain], Schedule]] = {
    "keep-all": keep_all,
    "per-block": per_block,
    "every-3": lambda chain: every_k(chain, k=3),
    "revolve-1": lambda chain: revolve(chain, num_slots=1),
    "revolve-3": lambda chain: revolve(chain, num_slots=3),
    "revolve-3-spine": lambda chain: revolve(chain, num_slots=3, keep_spine=True),
}


def gradients(modules: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(modules.parameters())))


def log_of(schedule: Schedule) -> tuple[str, Run]:
    modules, log = layers(schedule.num_blocks), Log()
    out, run = replayed(modules, torch.ones(2, 4), schedule, log)
    log.words.append("|")
    gradients(modules, out.sum())
    return str(log), run


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 12])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_plain_autograd(plan: str, num_blocks: int, dropout: float) -> None:
    modules = layers(num_blocks, dropout=dropout)
    x = torch.randn(3, 4)
    torch.manual_seed(5)
    want = gradients(modules, plain(modules, x).sum())
    state = torch.get_rng_state()
    torch.manual_seed(5)
    out, run = replayed(modules, x, PLANS[plan](uniform_chain(num_blocks)), Log(), is_random=dropout > 0)
    got = gradients(modules, out.sum())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert run.stats.out_of_order_blocks == 0


@pytest.mark.parametrize(("num_blocks", "num_slots"), [(16, 2), (32, 3), (64, 6)])
def test_runs_are_those_that_revolve_counts(num_blocks: int, num_slots: int) -> None:
    modules, log = layers(num_blocks), Log()
    schedule = revolve(uniform_chain(num_blocks), num_slots=num_slots)
    out, run = replayed(modules, torch.ones(1, 4), schedule, log)
    gradients(modules, out.sum())
    assert log.count("fa") == 2 * num_blocks + revolve_cost(num_blocks, num_slots)
    assert run.stats.replayed_blocks == num_blocks
    assert run.stats.advanced_blocks == revolve_cost(num_blocks, num_slots)


def test_four_hundred_blocks_do_not_recurse() -> None:
    modules, log = layers(400), Log()
    x = torch.ones(1, 4)
    want = gradients(modules, plain(modules, x).sum())
    out, _ = replayed(modules, x, revolve(uniform_chain(400), num_slots=5), log)
    got = gradients(modules, out.sum())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert log.count("fa") == 800 + revolve_cost(400, 5)


@pytest.mark.parametrize(
    ("schedule", "order"),
    [
        ("K0 K1 K2 B2 B1 B0", "f0 f1 f2 | b2 b1 b0"),
        ("F0 S1 F1 S2 F2 K2 D2 B2 K1 D1 B1 K0 B0", "f0 f1 f2 | b2 a2 b1 a1 b0 a0"),
        # Keep the last, drop the others: the second comes from the start, the first again.
        ("F0 F1 K2 B2 F0 K1 B1 K0 B0", "f0 f1 f2 | b2 b1 a0 a1 b0 a0"),
        # One advance leaves a boundary on its way.
        ("F0 F1 F2 F0 S1 F1 K2 B2 K1 D1 B1 K0 B0", "f0 f1 f2 | b2 a0 a1 a2 b1 a1 b0 a0"),
        # Two blocks replayed at once: both saved sets are there when the later backward begins.
        ("F0 F1 K2 B2 K0 K1 B1 B0", "f0 f1 f2 | b2 b1 a0 a1 b0"),
        # A kept block is run through again where the advance has to pass it.
        ("F0 K1 F2 F0 F1 K2 B2 B1 K0 B0", "f0 f1 f2 | b2 a0 a1 a2 b1 b0 a0"),
        # A kept block in the middle whose boundary was stored for the one after it.
        ("F0 K1 S2 F2 K2 D2 B2 B1 K0 B0", "f0 f1 f2 | b2 a2 b1 b0 a0"),
    ],
)
def test_order_of_replay(schedule: str, order: str) -> None:
    chain = uniform_chain(3)
    actions = from_text(schedule)
    verify_schedule(chain, actions)
    # A block's backward begins at its last op, which saved something: the replay follows right after.
    assert log_of(actions)[0] == order


def test_a_block_that_saves_nothing_of_its_own_is_not_run_again() -> None:
    """`x * w` saves an alias of the boundary, and a parameter that is held anyway."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    modules = nn.ModuleList(Scale() for _ in range(3))
    x = torch.randn(2, 4)
    want = gradients(modules, plain(modules, x).sum())
    log = Log()
    out, run = replayed(modules, x, from_text("F0 S1 F1 S2 F2 K2 D2 B2 K1 D1 B1 K0 B0"), log)
    got = gradients(modules, out.sum())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert str(log) == "f0 f1 f2 b2 b1 b0"
    assert run.stats.replayed_blocks == 0


def test_replay_stops_at_the_last_saved_tensor() -> None:
    seen: list[str] = []

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).tanh()
            seen.append("after the last saved tensor")
            return y + 1.0

    modules = nn.ModuleList([Tail()])
    out, _ = replayed(modules, torch.ones(2, 4), from_text("F0 K0 B0"), Log())
    gradients(modules, out.sum())
    assert len(seen) == 1


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_a_second_backward_is_recomputed_out_of_order(plan: str, passes: int) -> None:
    modules = layers(6)
    x = torch.randn(3, 4)
    want = gradients(modules, plain(modules, x).sum())
    out, run = replayed(modules, x, PLANS[plan](uniform_chain(6)), Log())
    for _ in range(passes):
        got = torch.autograd.grad(out.sum(), list(modules.parameters()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    num_dropped = sum(not kept for kept in replay_program_of(PLANS[plan](uniform_chain(6))).kept)
    assert run.stats.out_of_order_blocks == num_dropped * (passes - 1)


def test_an_out_of_order_recompute_leaves_boundaries_on_its_way() -> None:
    """Without them, a second backward of n dropped blocks would run n^2 / 2 advances."""
    modules, log = layers(64), Log()
    out, run = replayed(modules, torch.ones(1, 4), revolve(uniform_chain(64), num_slots=1), log)
    torch.autograd.grad(out.sum(), list(modules.parameters()), retain_graph=True)
    before = run.stats.advanced_blocks
    torch.autograd.grad(out.sum(), list(modules.parameters()), retain_graph=True)
    assert run.stats.advanced_blocks - before < 64 * 8


def test_backward_into_the_middle_only() -> None:
    modules = layers(5)
    x = torch.randn(3, 4)
    want = torch.autograd.grad(plain(modules, x).sum(), list(modules[3].parameters()))
    out, run = replayed(modules, x, per_block(uniform_chain(5)), Log())
    got = torch.autograd.grad(out.sum(), list(modules[3].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert run.stats.replayed_blocks == 2


def changes_its_weight(modules: nn.ModuleList, x: torch.Tensor) -> None:
    with torch.no_grad():
        modules[1][0].weight.add_(1.0)


def changes_its_input(modules: nn.ModuleList, x: torch.Tensor) -> None:
    x.add_(1.0)


@pytest.mark.parametrize("change", [changes_its_weight, changes_its_input])
def test_a_value_changed_in_place_before_backward_is_an_error(change: Callable[..., None]) -> None:
    modules, x = layers(3), torch.randn(2, 4)
    out, _ = replayed(modules, x, from_text("F0 F1 F2 F0 F1 K2 B2 F0 K1 B1 K0 B0"), Log())
    change(modules, x)
    with pytest.raises(ReplayError, match=r"changed in\s+place"):
        gradients(modules, out.sum())


def test_a_boundary_changed_in_place_is_an_error() -> None:
    modules = layers(2)
    externals = NonBoundaryInputs.of(list(modules.parameters()))
    run = Run(replay_program_of(from_text("F0 S1 F1 K1 D1 B1 K0 B0")), externals, devices=())
    x = torch.randn(2, 4)
    run.begin([x])
    middle = run.sweep(Layer(0, modules[0], Log()), [x])
    kept = middle[0].detach()
    (out,) = run.sweep(Layer(1, modules[1], Log()), middle)
    kept.zero_()
    with pytest.raises(ReplayError, match=r"was\s+changed in place after it was stored"):
        gradients(modules, out.sum())


class Fickle:
    """A block that does something else when it runs again."""

    name, is_random, is_out_of_place, has_regions = "fickle", False, False, False

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], again: Callable[[torch.Tensor], Any]) -> None:
        self._run, self._again = run, again

    def first(self, state: list[Any]) -> list[Any]:
        return [self._run(state.pop())]

    def again(self, state: list[Any]) -> list[Any]:
        return [self._again(state.pop())]


STOPS_EARLY, WHOLE = "F0 F1 F0 K1 B1 K0 B0", "F0 F1 K0 K1 B1 B0"


@pytest.mark.parametrize(
    ("again", "message", "schedule"),
    [
        (lambda x: x[:1].exp(), "saved \\(1, 4\\)", STOPS_EARLY),
        (lambda x: x[:1].exp(), "saved \\(1, 4\\)", WHOLE),
        (lambda x: x.double().exp(), "float64", STOPS_EARLY),
        (lambda x: x + 1, "does not do the same thing twice", STOPS_EARLY),
        (lambda x: x + 1, "does not do the same thing twice", WHOLE),
        (lambda x: x.exp().exp().exp(), "saved more", WHOLE),
    ],
)
def test_a_block_that_does_something_else_is_an_error(again: Any, message: str, schedule: str) -> None:
    run = Run(replay_program_of(from_text(schedule)), NonBoundaryInputs.of([]), devices=())
    x = torch.randn(2, 4, requires_grad=True)
    run.begin([x])
    state = run.sweep(Fickle(lambda x: x.exp().exp(), again), [x])
    (out,) = run.sweep(Fickle(torch.tanh, torch.tanh), state)
    with pytest.raises(ReplayError, match=message):
        out.sum().backward()
