"""Make one step of the calls that come before one backward: one plan, one budget, one measurement.

A loop may call a model several times before it calls backward (two views of a batch, real and made-up images, chunks of
a sequence). All of these calls hold something at once, so each alone must not take the whole budget. Their chains are
joined, and each call runs its part of the joint plan.

Note [Which calls follow]
    When a call begins we do not know whether others follow. We expect the longest of the last steps that began with the
    same calls; so a step is never planned for fewer calls than it may have, and one that ends earlier has used less.
    A call that was not expected finds a plan for the step as it now is, and what the calls before it have run stays.
    Such a step is not measured.
"""

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.join import join_chains, spans
from tinybp_lightning.runtime.profile import StepProfile
from tinybp_lightning.runtime.torch.control_loop import ControlLoop, TargetContext
from tinybp_lightning.runtime.torch.controller import OptionsMeasured, small_schedule, unmeasured_options
from tinybp_lightning.runtime.torch.executors.options import measured_part
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMonitor
from tinybp_lightning.runtime.torch.replay.engine import RunStats
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, part_of_program, replay_program_of

__all__ = ["CallKey", "CallPart", "OpenGraphs", "StepCalls"]

CallKey = tuple[object, Hashable]
"""Which graph a call runs, by an object that stands for it, and in which situation."""

_MAX_REMEMBERED = 16
"""So many steps are looked back on, and so many joint plans are kept."""
_MAX_PLANNED = 4
"""A step that grows is planned anew with each call up to this many; then each call runs the smallest plan it has.

So does a call in a step with a graph that is gone (`drop`).
"""


class _Mark:
    """Lives as long as the graph node that holds it."""


class OpenGraphs:
    """The graphs of the calls of one step: which of them autograd still holds, because no backward has used them up."""

    def __init__(self) -> None:
        self._marks: list[weakref.ref[_Mark]] = []

    def add(self, outputs: Sequence[Any]) -> None:
        """Follow the graph that made `outputs`."""
        mark = _Mark()
        self._marks.append(weakref.ref(mark))
        for t in outputs:
            if isinstance(t, torch.Tensor) and t.grad_fn is not None:
                metadata: dict[Any, Any] = cast("Any", t.grad_fn).metadata
                metadata[_Mark] = mark

    def alive(self) -> list[bool]:
        """Return for each call whether its graph is there."""
        return [mark() is not None for mark in self._marks]


@dataclass(slots=True)
class CallPart:
    """What one call runs: the blocks `span` of the step that `control` plans, or, by `fixed`, something by itself."""

    control: ControlLoop
    span: range
    fixed: ReplayProgram | None = None
    _known: tuple[ReplayProgram, ReplayProgram] | None = None  # the step's program, and this call's part of it

    @property
    def program(self) -> ReplayProgram:
        """What the call replays by the plan in force; the same object as long as that plan is."""
        if self.fixed is not None:
            return self.fixed
        whole = self.control.program
        if self._known is None or self._known[0] is not whole:
            is_all = len(self.span) == len(whole.kept)
            self._known = (whole, whole if is_all else part_of_program(whole, self.span))
        return self._known[1]

    def unmeasured(self) -> frozenset[tuple[int, int]]:
        """Return the options of the call's own blocks that must be measured before the plan runs."""
        if self.fixed is not None:
            return frozenset()
        wanted = unmeasured_options(self.control.state)
        return frozenset((b - self.span.start, option) for b, option in wanted if b in self.span)


@dataclass(slots=True)
class _Known:
    """One call: what it runs in a step of its own, its chain as it was measured, and the weights that it reads.

    `gradient_bytes`: of the weights that each block reads.
    """

    alone: CallPart
    chain: Chain
    gradient_bytes: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of several calls, as it is planned."""

    control: ControlLoop
    parts: tuple[CallPart, ...]


@dataclass(slots=True)
class _Running:
    """The step that runs now: what its calls were, and which program it began with."""

    control: ControlLoop
    program: ReplayProgram
    monitor: StepMonitor
    keys: list[CallKey] = field(default_factory=list[CallKey])
    graphs: OpenGraphs = field(default_factory=OpenGraphs)
    stats: list[RunStats] = field(default_factory=list[RunStats])

    def open_keys(self) -> tuple[CallKey, ...]:
        """Return the calls that wait for their backward."""
        if self.monitor.has_ended:
            return ()
        return tuple(key for key, is_alive in zip(self.keys, self.graphs.alive(), strict=True) if is_alive)


class StepCalls:
    """The calls of one target: which belong to the step that runs now, and what each of them is to run.

    A call's key says which graph runs in which situation.
    """

    def __init__(self, context: TargetContext) -> None:
        self._context = context
        self._known: dict[CallKey, _Known] = {}
        self._steps: OrderedDict[tuple[CallKey, ...], _Step] = OrderedDict()
        self._seen: deque[tuple[CallKey, ...]] = deque(maxlen=_MAX_REMEMBERED)
        self._running: _Running | None = None

    @property
    def headroom(self) -> Headroom | None:
        """What the step that runs now has, if this call is not its first."""
        running = self._running
        return running.control.headroom if running is not None and running.open_keys() else None

    def part(self, key: CallKey, alone: ControlLoop, gradient_bytes: Sequence[int]) -> CallPart:
        """Return what a call that begins now is to run, if `alone` plans steps of this call only.

        **Arguments:** `gradient_bytes`: of the weights that each block reads.

        **Raises:** `BudgetTooSmallError` where no plan fits the step as it now is.
        """
        self._remember(key, alone, gradient_bytes)
        before = () if self._running is None else self._running.open_keys()
        keys = self._expected((*before, key))
        if len(keys) == 1:
            return self._known[key].alone
        is_new = keys not in self._steps and keys not in self._seen
        if (is_new and len(keys) > _MAX_PLANNED) or any(one not in self._known for one in keys):
            return self._smallest(key)
        return self._planned(keys).parts[len(before)]

    def begin(self, part: CallPart, parameters: Sequence[torch.Tensor]) -> None:
        """Start to follow a call, or the whole step with its first one. See Note [Which calls follow]."""
        running, control = self._running, part.control
        is_open = running is not None and bool(running.open_keys())
        if running is not None and is_open and self._goes_on(running, part):
            running.monitor.goes_on()
            return
        if running is not None:
            running.monitor.abandon()  # if the last forward had no backward, it can no longer be measured
        monitor = control.begin_step(parameters)
        if running is not None and is_open:
            monitor.give_up()
            running.control, running.program, running.monitor = control, control.program, monitor
        else:
            self._running = _Running(control, control.program, monitor)

    @staticmethod
    def _goes_on(running: _Running, part: CallPart) -> bool:
        """Return whether the step runs as it was planned when it began, this call included."""
        is_same = part.control is running.control and part.control.program is running.program
        return is_same and part.fixed is None and all(running.graphs.alive())

    def forward_ended(
        self, key: CallKey, outputs: Sequence[Any], stats: RunStats, tell: Callable[[StepProfile], None]
    ) -> None:
        """Note that a call has ended that `begin` has begun; `tell` hears of the step's end."""
        running = self._running
        assert running is not None, "`begin` comes first"
        running.keys.append(key)
        running.stats.append(stats)
        running.graphs.add(outputs)
        mine = weakref.ref(self)  # Dynamo keeps what calls us for longer than the target lives

        def ended(monitor: StepMonitor) -> None:
            if (me := mine()) is not None:
                tell(me._ended(running, monitor))

        running.monitor.forward_ended(outputs, ended)

    def forget(self) -> None:
        """Give up the step that runs now: it will be repeated."""
        running, self._running = self._running, None
        if running is not None:
            running.monitor.abandon()

    def drop(self, graph: object) -> None:
        """Forget everything about a graph: it is gone, or will be planned anew."""
        for key in [key for key in self._known if key[0] is graph]:
            del self._known[key]
        for keys in [keys for keys in self._steps if any(key[0] is graph for key in keys)]:
            del self._steps[keys]
        seen = [keys for keys in self._seen if all(key[0] is not graph for key in keys)]
        self._seen = deque(seen, maxlen=_MAX_REMEMBERED)

    def options_measured(self, key: CallKey, part: CallPart, chain: Chain) -> None:
        """Hear the chain of `key` with more of its options measured, and plan by it."""
        self._known[key].chain = chain
        keys = next((keys for keys, step in self._steps.items() if step.control is part.control), (key,))
        part.control.observe(OptionsMeasured(self._joined(keys)))

    def _ended(self, running: _Running, monitor: StepMonitor) -> StepProfile:
        keys = tuple(running.keys)
        if all(key in self._known for key in keys):
            self._seen.append(keys)
        step, first = self._steps.get(keys), self._known.get(keys[0])
        if step is not None:
            is_whole = running.control is step.control
        else:
            is_whole = first is not None and running.control is first.alone.control
        if running.control.program is not running.program:
            monitor.give_up()
        return running.control.end_step(monitor, RunStats.sum_of(running.stats), is_whole=is_whole)

    def _expected(self, begun: tuple[CallKey, ...]) -> tuple[CallKey, ...]:
        return max((keys for keys in self._seen if keys[: len(begun)] == begun), key=len, default=begun)

    def _remember(self, key: CallKey, alone: ControlLoop, gradient_bytes: Sequence[int]) -> None:
        if key not in self._known or self._known[key].alone.control is not alone:
            chain = alone.state.chain
            part = CallPart(alone, range(len(chain.blocks)))
            # What was learned of its steps is about code that may not follow it in this one.
            unmodelled_bytes = alone.state.base_bytes
            chain = replace(chain, tail_peak_bytes=0, tail_live_bytes=0, unmodelled_bytes=unmodelled_bytes)
            self._known[key] = _Known(part, chain, gradient_bytes)

    def _planned(self, keys: tuple[CallKey, ...]) -> _Step:
        if (known := self._steps.get(keys)) is not None:
            self._steps.move_to_end(keys)
            return known
        first = self._known[keys[0]].alone.control
        control = ControlLoop(
            self._context,
            self._joined(keys),
            headroom=self.headroom or first.headroom,
            device=first.device,
            costs=first.state.task.costs,
        )
        parts = tuple(CallPart(control, span) for span in spans([self._known[key].chain for key in keys]))
        self._steps[keys] = step = _Step(control, parts)
        if len(self._steps) > _MAX_REMEMBERED:
            self._steps.popitem(last=False)
        return step

    def _joined(self, keys: Sequence[CallKey]) -> Chain:
        calls = [self._known[key] for key in keys]
        return join_chains([call.chain for call in calls], calls[-1].gradient_bytes)

    def _smallest(self, key: CallKey) -> CallPart:
        assert self._running is not None, "a step has grown beyond what is planned, so it has begun"
        part = measured_part(self._known[key].chain)
        schedule, _ = small_schedule(part.chain, budget_bytes=0)
        program = replay_program_of(part.renumbered(schedule))
        return CallPart(self._running.control, range(len(program.kept)), fixed=program)
