"""What one feature leaves behind another one finds: kept parts, tightened plans, known plans, steps that fail."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, residual_net
from tinybp_lightning.capture.torch import Program
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.torch import targets, traced_module
from tinybp_lightning.runtime.torch.api import Target
from tinybp_lightning.runtime.torch.cache.key import ProgramKey, program_key
from tinybp_lightning.runtime.torch.cache.memory import CacheEntry, Origin, PlanCache
from tinybp_lightning.schedule.measured import MeasuredPlan

WIDTH = 16
X = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(1))


def _step(model: nn.Module) -> None:
    model(X).square().mean().backward()
    model.zero_grad()


def _planned(steps: int = 5, **options: Any) -> tuple[nn.Module, Target]:
    model = tbp.hcb(residual_net(6, dropout=0.0), **options)
    for _ in range(steps):
        _step(model)
    (target,) = targets(model)
    return model, target


class Counting(nn.Module):
    """Changes Python state in every run; a replay would compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.num_runs = 0
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_runs += 1
        hidden = torch.sin(x * float(self.num_runs))
        if self.fails:
            self.fails = False
            raise torch.OutOfMemoryError("injected")
        return self.inner(hidden)


class Branching(nn.Module):
    """Trained by module steps; its last part is first reached when `uses_last` is set."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.uses_last = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts[:-1]:
            x = part(x)
        if x.sum().item() < 1e9 and self.uses_last:
            x = self.parts[-1](x)
        return x


def _gradients(make_step: Callable[[Branching], Callable[[], object]], *, fails: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Branching(*residual_net(3, dropout=0.0), last := Counting())
    model.uses_last = False
    step = make_step(model)
    step()
    step()
    model.uses_last, last.fails = True, fails
    step()
    last.num_runs = 10
    step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore::tinybp_lightning.errors.HCBWarning")
def test_a_part_whose_first_run_fails_is_still_found_to_change_state() -> None:
    def plain(model: Branching) -> Callable[[], object]:
        return lambda: (model.zero_grad(), model(X).square().mean().backward())

    def rescued(model: Branching) -> Callable[[], object]:
        tbp.hcb(model, activation_budget="1GiB")
        return lambda: (model.zero_grad(), tbp.run_step(model, lambda: model(X).square().mean()))

    expected = _gradients(plain, fails=False)
    found = _gradients(rescued, fails=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_where_every_part_is_kept_the_user_is_told_once_and_trains_on() -> None:
    model = tbp.hcb(Branching(Counting(), Counting(), Counting()), activation_budget="60%")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HCBWarning)
        for _ in range(4):
            _step(model)
    told = [str(w.message) for w in caught if issubclass(w.category, HCBWarning)]
    assert sum("the budget is not enforced" in message for message in told) == 1
    assert [part.num_runs for part in model.parts] == [4, 4, 4]


def test_a_tightened_plan_stays_when_its_graph_is_made_anew() -> None:
    model, target = _planned(activation_budget="60%")
    assert target.tighten(0.1)
    assert target.active_plan is not None
    tight_bytes = target.active_plan.predicted_peak_bytes
    target._live.clear()  # as when many other shapes came between
    for _ in range(3):
        _step(model)
        assert target.active_plan.predicted_peak_bytes <= tight_bytes


def test_a_known_plan_is_flown_where_nothing_can_be_measured() -> None:
    _planned(activation_budget="60%")
    model = tbp.hcb(residual_net(6, dropout=0.0), activation_budget="60%", observers=[recorder := Recorder()])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        _step(model)
    (target,) = targets(model)
    assert target.counts.num_cached == 1
    _step(model)
    assert recorder.profiles[-1].replayed_blocks > 0


@pytest.mark.filterwarnings("ignore:`Sequential` is not planned in this step")
def test_steps_that_cannot_be_planned_yet_hash_their_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[ProgramKey] = []

    def counted(pieces: Program) -> ProgramKey:
        hashed.append(program_key(pieces))
        return hashed[-1]

    monkeypatch.setattr(traced_module, "program_key", counted)
    model = tbp.hcb(residual_net(6, dropout=0.0), activation_budget="60%")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        for _ in range(3):
            _step(model)
    _step(model)
    assert targets(model)[0].counts.num_measured == 1
    assert len(hashed) == 1


def test_the_disk_ends_with_the_plan_that_was_learned_last() -> None:
    """From disk comes B; the first room does not suit it, so A is learned, and B again once the optimizer is seen."""
    written: list[Any] = []

    class Disk:
        def put(self, _: object, known: Any) -> None:
            written.append(known)

    book = PlanCache(HCBConfig(plan_cache=False))
    book._disk = cast(Any, Disk())
    first, second = cast(MeasuredPlan, "A"), cast(MeasuredPlan, "B")
    page = CacheEntry({}, "", (), 0, Origin.CACHED, second, is_on_disk=True)
    for known in (second, first, first, second):
        book.record(page, known, True)
    assert written == [first, second]
