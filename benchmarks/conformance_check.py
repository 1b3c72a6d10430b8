"""Check that an executor computes what plain training computes, within its budget.

Two copies of one network train in lockstep, plainly and with the executor, each with generators of its own. (Compiled
kernels have bits of their own, so a compiling executor is compared with the same compiled blocks without replay.) After
every optimizer step losses, gradients, buffers, parameters and the generators' states are compared. Then
`recipes.measure`, which shares no code with the package, measures one more step from allocator events.
"""

import contextlib
import functools
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, assert_never
from unittest.mock import patch

import torch
from torch import nn

import tinybp_lightning as tbp
from benchmarks.conformance_training import NUM_STEPS, Snapshot, Training, differences
from benchmarks.listener import Listener
from benchmarks.zoo import Architecture, Blocks
from recipes.budget import budget_bytes
from tinybp_lightning.graph.ids import OptionId
from tinybp_lightning.runtime.profile import PlanReport, StepProfile
from tinybp_lightning.runtime.torch import submodules, traced_module
from tinybp_lightning.runtime.torch.api import targets
from tinybp_lightning.runtime.torch.control_loop import ControlLoop
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram
from tinybp_lightning.schedule.actions import Backward

__all__ = ["BUDGETS", "Conformity", "Executor", "Sameness", "check"]

BUDGETS = ("60%", "30%")
"""Shares of plain training's measured activation peak. The smallest possible budget replaces one that is too small."""

_CPU = torch.device("cpu")
# A plan is corrected after traced steps; this is the largest number of steps until one is not traced.
_MAX_STEPS = 10
_MAX_RAISES = 6
_TIMED_STEPS = 3


class Executor(Enum):
    """An executor that has to pass the check. A new one is added here and to `_reference`."""

    EAGER = "eager"
    INDUCTOR = "inductor"


@dataclass(frozen=True, slots=True)
class Sameness:
    """What was equal to plain training, bit for bit, after every step; `first_difference` is empty if all was."""

    losses: bool
    gradients: bool
    buffers: bool
    parameters: bool
    random_state: bool
    first_difference: str

    @property
    def all_equal(self) -> bool:
        """Whether everything was equal."""
        return not self.first_difference


@dataclass(frozen=True, slots=True)
class Conformity:
    """One architecture, trained by one executor under one budget.

    `budget` was asked for; `is_smallest` says that it cannot be met and that `budget_bytes` is the smallest that can.
    Peaks are bytes of activations in the largest phase of a step, without parameters' gradients. `blocks` is `None` if
    nothing is replayed. `num_partial` blocks use an option that saves a part and recomputes the rest in the backward.
    `recompute_share` and `step_s` are of the last step, which was not traced. `named_bytes`: the smallest budget that
    each refusal on the way named; every one but the last was refused in its turn. `first_step_cpu_s` is of the whole
    process. `time_ratio`: a settled step's seconds over plain training's, both as the least of some steps in turns.
    """

    architecture: str
    executor: str
    budget: str
    budget_bytes: int
    is_smallest: bool
    plain_peak_bytes: int
    measured_peak_bytes: int
    predicted_peak_bytes: int
    sameness: Sameness
    num_steps: int
    blocks: Blocks | None
    num_blocks: int
    num_kept: int
    num_partial: int
    replayed_blocks: int
    advanced_blocks: int
    out_of_order_blocks: int
    recompute_share: float
    plain_step_s: float
    step_s: float
    planning_s: float
    warnings: tuple[str, ...]
    named_bytes: tuple[int, ...]
    first_step_cpu_s: float
    time_ratio: float

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak is at or under the budget."""
        return self.measured_peak_bytes <= self.budget_bytes


def check(
    architecture: Architecture,
    executor: Executor,
    budget: str,
    device: torch.device = _CPU,
    *,
    autocast: bool = False,
) -> Conformity:
    """Train `architecture` plainly and by `executor` under `budget`, and return how they compare.

    **Arguments:** `budget`: a share of plain training's measured activation peak, such as `"30%"`. `autocast`: whether
    both train under bfloat16 autocast.

    **Raises:** `BudgetTooSmallError` if the smallest budget that it reports cannot be met; errors of building and of
    training.
    """
    begin = functools.partial(Training, architecture, device, autocast=autocast)
    reference = _reference(begin, executor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tbp.HCBWarning)  # a compiled reference warns as the checked copy does
        plain_peak_bytes = reference.peak_bytes()
    asked_bytes = allowed_bytes = budget_bytes(budget, naive_peak_bytes=plain_peak_bytes)
    named_bytes: list[int] = []
    while True:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", tbp.HCBWarning)
                compared = _compare(reference, begin, executor, allowed_bytes)
        except tbp.BudgetTooSmallError as error:
            named_bytes.append(error.smallest_bytes)
            # What the first steps show about the step's end may raise the smallest budget once more.
            if len(named_bytes) == _MAX_RAISES:
                raise
            allowed_bytes = max(error.smallest_bytes, allowed_bytes + 1)
            continue
        break
    return _conformity(
        architecture,
        executor,
        budget,
        compared,
        budget_bytes=allowed_bytes,
        is_smallest=allowed_bytes != asked_bytes,
        plain_peak_bytes=plain_peak_bytes,
        said=tuple(str(w.message) for w in caught if issubclass(w.category, tbp.HCBWarning)),
        named_bytes=tuple(named_bytes),
    )


def _apply(executor: Executor, module: nn.Module, allowed_bytes: int, listener: Listener) -> None:
    tbp.hcb(module, activation_budget=allowed_bytes, executor=executor.value, observers=[listener])


def _reference(begin: Callable[..., Training], executor: Executor) -> Training:
    """Return the training that `executor` has to equal: plain, or the same compiled blocks without replays."""
    match executor:
        case Executor.EAGER:
            return begin()
        case Executor.INDUCTOR:
            training = begin(around=_keeping)
            tbp.hcb(training.module, activation_budget="1TiB", executor=executor.value)
            return training
        case _:
            assert_never(executor)


# The options that the runs of the checked copy's last step used, for the reference's next step.
_NOTED_OPTIONS: deque[tuple[OptionId, ...]] = deque()


class _NotingRun(Run):
    """An engine run that notes the options of its blocks."""

    def __init__(self, program: ReplayProgram, *args: Any, **kwargs: Any) -> None:
        _NOTED_OPTIONS.append(program.options)
        super().__init__(program, *args, **kwargs)


class _KeepingRun(Run):
    """An engine run that keeps what every block saves, against the plan."""

    def __init__(self, program: ReplayProgram, *args: Any, **kwargs: Any) -> None:
        super().__init__(_keeping_program(program.options), *args, **kwargs)
        if _NOTED_OPTIONS:
            _NOTED_OPTIONS.popleft()


@functools.cache
def _keeping_program(options: tuple[OptionId, ...]) -> ReplayProgram:
    num_blocks = len(options)
    return ReplayProgram((True,) * num_blocks, options, frozenset(), ((),) * num_blocks)


class _KeepingLoop(ControlLoop):
    """A control loop whose next step uses the noted options; they are compiled before it, as a plan's are."""

    @property
    def program(self) -> ReplayProgram:
        return _keeping_program(_NOTED_OPTIONS[0] if _NOTED_OPTIONS else super().program.options)


@contextlib.contextmanager
def _keeping() -> Generator[None]:
    with _running(_KeepingRun), patch.object(traced_module, "ControlLoop", _KeepingLoop):
        yield


@contextlib.contextmanager
def _running(run: type[Run]) -> Generator[None]:
    with patch.object(traced_module, "Run", run), patch.object(submodules, "Run", run):
        yield


@dataclass(frozen=True, slots=True)
class _Compared:
    sameness: Sameness
    num_steps: int
    plans: tuple[PlanReport, ...]
    last_step: tuple[StepProfile, ...]
    blocks: Blocks | None
    measured_peak_bytes: int
    plain_step_s: float
    planning_s: float
    first_step_cpu_s: float
    time_ratio: float


def _compare(plain: Training, begin: Callable[..., Training], executor: Executor, allowed_bytes: int) -> _Compared:
    plain.restart()
    _NOTED_OPTIONS.clear()
    noting = executor is Executor.INDUCTOR
    around = (lambda: _running(_NotingRun)) if noting else contextlib.nullcontext
    ours, listener = begin(around=around), Listener()
    _apply(executor, ours.module, allowed_bytes, listener)
    told: list[str] = []
    fields: set[str] = set()
    plain_steps_s: list[float] = []
    planning_s = first_step_cpu_s = 0.0
    last_step: tuple[StepProfile, ...] = ()
    num_steps = 0
    while num_steps < _MAX_STEPS:
        num_steps += 1
        listener.profiles.clear()
        begin_cpu_s = time.process_time()
        wall_s, found = _timed(ours.step)
        first_step_cpu_s = first_step_cpu_s or time.process_time() - begin_cpu_s
        planning_s = planning_s or wall_s
        last_step = tuple(listener.profiles)
        wall_s, expected = _timed(plain.step)
        plain_steps_s.append(wall_s)
        for name in Snapshot.__slots__:
            different = differences(getattr(expected, name), getattr(found, name))
            told += [f"step {num_steps}: {name}: {d}" for d in different]
            fields |= {name} if different else set()
        is_settled = all(profile.measured_peak_bytes is None for profile in last_step)
        if num_steps >= NUM_STEPS and is_settled:
            break
    held = targets(ours.module)
    blocks = None if not held else Blocks.MODULE if any(t.module_steps for t in held) else Blocks.GRAPH
    plans = tuple(report for target in held for report in target.reports)
    return _Compared(
        sameness=Sameness(
            *(name not in fields for name in Snapshot.__slots__),
            first_difference=told[0] if told else "",
        ),
        num_steps=num_steps,
        plans=plans,
        last_step=last_step,
        blocks=blocks,
        measured_peak_bytes=ours.measured_peak_bytes(),
        plain_step_s=min(plain_steps_s),
        planning_s=planning_s,
        first_step_cpu_s=first_step_cpu_s,
        time_ratio=_time_ratio(ours, plain),
    )


def _time_ratio(ours: Training, plain: Training) -> float:
    """Return the seconds of a forward and backward of `ours` over those of `plain`, each the least of some in turns."""
    seconds = [(ours.timed_s(), plain.timed_s()) for _ in range(_TIMED_STEPS)]
    return min(ours_s for ours_s, _ in seconds) / min(plain_s for _, plain_s in seconds)


def _timed(step: Callable[[], Snapshot]) -> tuple[float, Snapshot]:
    begin_s = time.perf_counter()
    snapshot = step()
    return time.perf_counter() - begin_s, snapshot


def _conformity(
    architecture: Architecture,
    executor: Executor,
    budget: str,
    compared: _Compared,
    *,
    budget_bytes: int,
    is_smallest: bool,
    plain_peak_bytes: int,
    said: tuple[str, ...],
    named_bytes: tuple[int, ...],
) -> Conformity:
    steps = compared.last_step
    step_s = sum(profile.step_s for profile in steps)
    return Conformity(
        architecture=architecture.name,
        executor=executor.value,
        budget=budget,
        budget_bytes=budget_bytes,
        is_smallest=is_smallest,
        plain_peak_bytes=plain_peak_bytes,
        measured_peak_bytes=compared.measured_peak_bytes,
        predicted_peak_bytes=max((plan.predicted_peak_bytes for plan in compared.plans), default=0),
        sameness=compared.sameness,
        num_steps=compared.num_steps,
        blocks=compared.blocks,
        num_blocks=sum(len(plan.chain.blocks) for plan in compared.plans),
        num_kept=sum(plan.num_kept for plan in compared.plans),
        num_partial=sum(
            isinstance(a, Backward) and a.option > 0 for plan in compared.plans for a in plan.schedule.actions
        ),
        replayed_blocks=_total(profile.replayed_blocks for profile in steps),
        advanced_blocks=_total(profile.advanced_blocks for profile in steps),
        out_of_order_blocks=_total(profile.out_of_order_blocks for profile in steps),
        recompute_share=sum(profile.replay_s for profile in steps) / step_s if step_s else 0.0,
        plain_step_s=compared.plain_step_s,
        step_s=step_s,
        planning_s=compared.planning_s,
        warnings=said,
        named_bytes=named_bytes,
        first_step_cpu_s=compared.first_step_cpu_s,
        time_ratio=compared.time_ratio,
    )


def _total(counts: Iterable[int]) -> int:
    return sum(counts)
