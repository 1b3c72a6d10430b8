"""Train one traced forward. A `TracedModule` is what Dynamo calls in place of the graph that it captured.

Its first call records the graph, cuts it, measures the blocks and starts a control loop; every call runs the pieces
through the engine. There is one plan for each situation. Shapes, dtypes and `requires_grad` are guarded by Dynamo,
which makes a new graph when they change.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from tinybp_lightning.capture.torch.ambient import Settings, closing_regions, keeping_casts, settings_now
from tinybp_lightning.capture.torch.pieces import EXTERNAL, Program, fill_template, reorder
from tinybp_lightning.capture.torch.private import has_gradient_hooks, modes_back
from tinybp_lightning.capture.torch.record import record_graph
from tinybp_lightning.capture.torch.regions import RegionInterpreter
from tinybp_lightning.config import BudgetKind, Costs
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.profile import StepProfile
from tinybp_lightning.runtime.torch.cache.key import ProgramKey, plan_key, program_key
from tinybp_lightning.runtime.torch.cache.memory import CacheEntry, Origin
from tinybp_lightning.runtime.torch.control_loop import ControlLoop, TargetContext
from tinybp_lightning.runtime.torch.executors import EXECUTORS
from tinybp_lightning.runtime.torch.executors.executor import Capture, Cut, Preparation
from tinybp_lightning.runtime.torch.kept_modules import blocks_of_modules, pin_chain
from tinybp_lightning.runtime.torch.measure.allocator import can_trace, tracing_lock
from tinybp_lightning.runtime.torch.measure.chain_builder import parameter_gradient_bytes
from tinybp_lightning.runtime.torch.measure.costs import Measurements, measure_chain, measuring_values
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom
from tinybp_lightning.runtime.torch.measure.step_monitor import stop_tracing
from tinybp_lightning.runtime.torch.messages import PlanningProgress, planning_progress
from tinybp_lightning.runtime.torch.replay.blocks import GraphBlock, NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, pin_program
from tinybp_lightning.runtime.torch.step_calls import CallKey, CallPart, StepCalls
from tinybp_lightning.schedule.measured import plain_peak_bytes

__all__ = ["TracedModule"]

_ARGUMENT = object()


@dataclass(frozen=True, slots=True)
class _Situation:
    """What a plan depends on beside the graph."""

    settings: Settings
    has_gradients: bool


@dataclass(frozen=True, slots=True)
class _Forward:
    """One call of the graph. `values`: one per graph input; `device`: the one whose memory is planned."""

    values: list[Any]
    tensors: list[torch.Tensor]
    parameters: list[torch.Tensor]
    device: torch.device
    devices: tuple[torch.device, ...]
    situation: _Situation


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The graph's pieces, prepared under the settings of one forward.

    `pinned`: blocks that run once; `gradient_bytes`: of the weights that each piece reads.
    """

    program: Program
    pinned: frozenset[int]
    gradient_bytes: tuple[int, ...]
    key: ProgramKey | None  # `None` with pinned blocks: the planner then sees another chain than the program's own


@dataclass(frozen=True, slots=True)
class _Planned:
    """What is known in one situation. `ready`: the replay program whose options were seen to be prepared."""

    pieces: _Pieces
    measurements: Measurements = field(default_factory=dict[Any, Any])
    control: ControlLoop | None = None
    ready: ReplayProgram | None = None


class TracedModule:
    """One captured graph, planned on its first call. `pinned_paths`: of the modules that run once.

    **Arguments:** `calls`: of the target, which may call this graph several times in a step, and others.
    """

    def __init__(
        self, module: fx.GraphModule, context: TargetContext, calls: StepCalls, pinned_paths: Sequence[str] = ()
    ) -> None:
        self._module = module
        self._context = context
        self._calls = calls
        self._pinned_paths = pinned_paths
        self._executor = EXECUTORS[context.config.executor]
        # The graph's inputs in order: constants, and `_ARGUMENT` where Dynamo passes one.
        inputs = (n for n in module.graph.nodes if n.op in ("placeholder", "get_attr"))
        self._constants = [_ARGUMENT if n.op == "placeholder" else attrgetter(str(n.target))(module) for n in inputs]
        self._cut: Cut | None = None
        self._pieces: dict[Settings, _Pieces] = {}
        self._planned: dict[_Situation, _Planned] = {}
        self._graph_key = object()  # stands for the graph among the target's
        self.profile: StepProfile | None = None
        self.control: ControlLoop | None = None

    @property
    def graph(self) -> Graph | None:
        """The graph, once the first call has recorded it."""
        return None if self._cut is None else self._cut.program.graph

    def release(self) -> None:
        """Have the target forget what it knows about steps with this graph."""
        self._calls.drop(self._graph_key)

    def __call__(self, *args: Any) -> Any:
        """Run one forward. Takes Dynamo's inputs, returns what the graph returns."""
        forward = self._forward(args)
        if self._cut is not None and self._cut.original is not None and _are_watched(forward.parameters):
            reorder(self._module, self._cut.original)  # and forget what was planned for another order
            self._cut = self.control = None
            self.release()
            self._pieces.clear()
            self._planned.clear()
        planned = self._planned.get(forward.situation)
        if planned is None or planned.control is None:
            stop_tracing()
            with tracing_lock() as is_mine:
                planned = self._plan(forward, may_trace=is_mine)
        part = None
        if planned is not None and planned.control is not None:
            part = self._calls.part(self._key(forward), planned.control, planned.pieces.gradient_bytes)
            self.control = part.control
            planned = self._with_options(planned, part, forward)
        with modes_back():
            if planned is None or part is None:
                return self._run_unplanned(forward.values)
            return self._run(planned.pieces, part, forward)

    def _key(self, forward: _Forward) -> CallKey:
        return self._graph_key, forward.situation

    def _forward(self, args: Sequence[Any]) -> _Forward:
        arguments = iter(args)
        values = [next(arguments) if constant is _ARGUMENT else constant for constant in self._constants]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        devices = tuple(sorted({t.device for t in tensors}, key=str))
        device = next((d for d in devices if d.type not in ("cpu", "meta")), torch.device("cpu"))
        parameters = [t for t in tensors if t.requires_grad and t.is_leaf]
        has_gradients = any(p.grad is not None for p in parameters)
        situation = _Situation(settings_now(), has_gradients)
        return _Forward(values, tensors, parameters, device, devices, situation)

    def _run_unplanned(self, values: Sequence[Any]) -> Any:
        """Run plainly: blocks can only be measured by a profiler of our own, and the user's is running."""
        self._context.warn(
            "unplanned",
            f"`{self._context.name}` is not planned in this step, which keeps everything: a profiler is running, or "
            "another thread measures, and measuring needs a profiler of its own. Let the first steps run unprofiled.",
        )
        arguments = (v for v, c in zip(values, self._constants, strict=True) if c is _ARGUMENT)
        return RegionInterpreter(self._module).run(*arguments)

    def _run(self, pieces: _Pieces, part: CallPart, forward: _Forward) -> Any:
        values, program, key = forward.values, pieces.program, self._key(forward)
        self._calls.begin(part, forward.parameters)
        externals = NonBoundaryInputs.of(values, program.unsaved)
        replayed = pin_program(part.program, pieces.pinned)
        settings, checks = forward.situation.settings, self._context.config.check
        run = Run(replayed, externals, devices=forward.devices, settings=settings, checks=checks)
        try:
            run.begin([])
            state: list[Any] = []
            with closing_regions(), keeping_casts():
                for piece, option in zip(program.pieces, replayed.options, strict=True):
                    state = run.sweep(GraphBlock(piece, externals, option), state)
        except BaseException:
            self._calls.forget()
            raise
        outputs = [values[s.index] if s.origin == EXTERNAL else state[s.index] for s in program.outputs]
        del state
        mine = weakref.ref(self)

        def tell(profile: StepProfile) -> None:
            if (me := mine()) is not None:
                me.profile = profile

        self._calls.forward_ended(key, outputs, run.stats, tell)
        return fill_template(program.template, outputs)

    def _plan(self, forward: _Forward, *, may_trace: bool) -> _Planned | None:
        """Start the control loop of a situation; return `None` if nothing is known and nothing can be measured now.

        Without `may_trace`, another thread holds the lock, and may take it again while this one measures.
        """
        context = self._context
        # A step begins with its first call: what that one holds is not taken from the others.
        headroom = self._calls.headroom or Headroom(context.config, forward.device, forward.tensors, context.memory)
        with planning_progress(context.name) as progress:
            pieces = self._prepared(forward, headroom, progress)
            planned = self._planned.setdefault(forward.situation, _Planned(pieces))
            entry = None
            if pieces.key is not None:
                key = plan_key(
                    pieces.key,
                    context.config,
                    device=forward.device,
                    settings=forward.situation.settings,
                    has_gradients=forward.situation.has_gradients,
                )
                entry = context.plans.look_up(pieces.program, pieces.key.layout, key)
            costs = Costs(context.config.costs)
            loop = partial(ControlLoop, context, headroom=headroom, device=forward.device, costs=costs)
            progress.stage("planning")
            control = None if entry is None else self._from_cache(loop, entry, headroom)
            if control is None:
                if not (may_trace and can_trace(forward.device)):
                    return None
                chain = self._measure(planned, forward, progress)
                progress.stage("planning")
                context.plans.num_plans[Origin.MEASURED] += 1
                note_plan = None
                if entry is not None:
                    mine = replace(entry, origin=Origin.MEASURED, known=None, is_on_disk=False)
                    note_plan = partial(context.plans.record, mine)
                control = loop(chain, note_plan=note_plan)
        self._planned[forward.situation] = planned = replace(planned, control=control)
        return planned

    def _prepared(self, forward: _Forward, headroom: Headroom, progress: PlanningProgress) -> _Pieces:
        """Return the pieces for the settings of `forward`: cut on the first call, prepared once for each."""
        if (known := self._pieces.get(forward.situation.settings)) is not None:
            return known
        if self._cut is None:
            progress.stage("tracing")
            graph = record_graph(self._module, forward.values, name=self._context.name)
            share, may_move = partial(self._budget_share, headroom), not _are_watched(forward.tensors)
            self._cut = self._executor.cut(Capture(self._module, graph, share, may_move))
        program = self._cut.program
        progress.stage("compiling", total=len(program.pieces))
        prepared = self._executor.prepare(self._preparation(program, forward, progress))
        if prepared is not program:
            self._context.plans.num_compiled += 1
        spans = [(p.span.start, p.span.stop) for p in program.pieces]
        pinned = blocks_of_modules(program.graph, spans, self._pinned_paths)
        gradient_bytes, _ = parameter_gradient_bytes(program)
        pieces = _Pieces(prepared, pinned, tuple(gradient_bytes), None if pinned else program_key(prepared))
        self._pieces[forward.situation.settings] = pieces
        return pieces

    def _preparation(self, program: Program, forward: _Forward, progress: PlanningProgress) -> Preparation:
        return Preparation(
            program, partial(measuring_values, program, forward.values), forward.devices, progress.advance
        )

    def _budget_share(self, headroom: Headroom, plain_bytes: int) -> float:
        """Return about which share of plain training's activations the budget is."""
        budget = self._context.config.budget
        if budget.kind is BudgetKind.ACTIVATION and budget.fraction is not None:
            return budget.fraction
        return headroom(plain_bytes) / max(1, plain_bytes)

    def _measure(self, planned: _Planned, forward: _Forward, progress: PlanningProgress) -> Chain:
        """Return the chain as its planner sees it: what is compiled is measured, once, and the rest is estimated."""
        config, program = self._context.config, planned.pieces.program
        progress.stage("measuring", total=len(program.pieces))
        chain = measure_chain(
            program,
            forward.values,
            executor=self._executor,
            device=forward.device,
            devices=forward.devices,
            settings=forward.situation.settings,
            counts_gradients=config.budget.kind is BudgetKind.MEMORY and not forward.situation.has_gradients,
            on_block=progress.advance,
            known=planned.measurements,
            kind=Costs(config.costs),
        )
        return pin_chain(chain, planned.pieces.pinned)

    def _with_options(self, planned: _Planned, part: CallPart, forward: _Forward) -> _Planned | None:
        """Compile the options that the next step uses, and measure those that were estimated (Note [Calibration]).

        **Returns:** `planned`, ready to run; `None` where something must be measured and cannot be measured now.
        """
        program = planned.pieces.program
        part.control.refresh()
        while part.program is not planned.ready:
            unmeasured = part.unmeasured()
            wanted = unmeasured or self._executor.unprepared(program, list(enumerate(part.program.options)))
            if not wanted:
                self._planned[forward.situation] = planned = replace(planned, ready=part.program)
                break
            stop_tracing()
            with tracing_lock() as is_mine, planning_progress(self._context.name) as progress:
                if unmeasured and not (is_mine and can_trace(forward.device)):
                    return None
                progress.stage("compiling", total=len(program.pieces))
                self._executor.prepare_options(self._preparation(program, forward, progress), wanted)
                if unmeasured:
                    self._calls.options_measured(self._key(forward), part, self._measure(planned, forward, progress))
        return planned

    def _from_cache(
        self, loop: Callable[..., ControlLoop], entry: CacheEntry, headroom: Headroom
    ) -> ControlLoop | None:
        """Return a control loop that starts from the cached plan; `None` if there is none or none fits here."""
        known, plans = entry.known, self._context.plans
        if known is None:
            return None
        is_larger = entry.origin is Origin.LARGER
        if is_larger and (headroom.cap_bytes is not None or not known.suits(headroom(plain_peak_bytes(known.chain)))):
            return None  # to plan again, the costs of this shape are needed
        try:
            control = loop(known, cached_from=entry.origin.value, note_plan=partial(plans.record, entry))
        except BudgetTooSmallError:
            return None  # by costs from elsewhere: what is measured here decides, and says how much is needed
        plans.num_plans[entry.origin] += 1
        return control


def _are_watched(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether somebody may see in which order gradients come: a hook, or a reduction over ranks."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_distributed or any(has_gradient_hooks(t) for t in tensors)
