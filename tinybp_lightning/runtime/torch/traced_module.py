"""How is one traced forward trained? A `TracedModule` is what Dynamo calls in place of the graph it captured.

On its first call it records the graph, cuts it, measures the blocks and asks a `Controller` for a plan; every call
runs the pieces through the engine. Plans are kept per situation (autocast, gradients already there or not); shapes,
dtypes and `requires_grad` are Dynamo's guards, which make a new program when they change.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from tinybp_lightning.capture.torch.modes import modes_back
from tinybp_lightning.capture.torch.pieces import EXTERNAL, Program, cut_program, fill_template, reorder
from tinybp_lightning.capture.torch.private import has_gradient_hooks
from tinybp_lightning.capture.torch.record import record_graph
from tinybp_lightning.config import BudgetKind, Costs, Executor, HCBConfig
from tinybp_lightning.errors import BudgetTooSmallError, HCBWarning
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.cuts.narrow import Granularity
from tinybp_lightning.graph.cuts.products import has_room_for_products, saved_bytes
from tinybp_lightning.graph.cuts.reorder import delay_ops
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.profile import Observer, StepProfile
from tinybp_lightning.runtime.torch.cache.key import ProgramKey, plan_key, program_key
from tinybp_lightning.runtime.torch.cache.memory import CacheEntry, Origin, PlanCache
from tinybp_lightning.runtime.torch.controller import Controller
from tinybp_lightning.runtime.torch.executors.inductor import compile_options, compile_program, options_to_compile
from tinybp_lightning.runtime.torch.measure.allocator import can_trace, tracing_lock
from tinybp_lightning.runtime.torch.measure.costs import Measurements, measure_chain, measuring_values
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom, TargetMemory
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMonitor, stop_tracing
from tinybp_lightning.runtime.torch.pinned import blocks_of_modules, pin_chain, pin_program
from tinybp_lightning.runtime.torch.progress import PlanningProgress, planning_progress
from tinybp_lightning.runtime.torch.replay.ambient import Autocast, autocast_now, device_type_of
from tinybp_lightning.runtime.torch.replay.blocks import GraphBlock, NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram
from tinybp_lightning.schedule.measured import plain_peak_bytes

__all__ = ["TracedModule"]


@dataclass(frozen=True, slots=True)
class _Situation:
    """What a plan depends on beside the graph."""

    autocast: tuple[Autocast, ...]
    has_gradients: bool


class TracedModule:
    """One captured graph, planned on its first call."""

    def __init__(
        self,
        module: fx.GraphModule,
        target: str,
        config: HCBConfig,
        observers: Sequence[Observer],
        memory: TargetMemory,
        book: PlanCache,
        kept: Sequence[str] = (),
    ) -> None:
        self._module = module
        self._kept = tuple(kept)
        self._target = target
        self._memory = memory
        self._book = book
        self._config = config
        self._observers = observers
        self._program: Program | None = None
        self._pinned: frozenset[int] = frozenset()
        self._executor = Executor(config.executor)
        self._compiled: dict[tuple[Autocast, ...], Program] = {}  # gradients that are there change no kernel
        self._measured: dict[_Situation, Measurements] = {}
        self._controllers: dict[_Situation, Controller] = {}
        self._prepared: dict[
            _Situation, ReplayProgram
        ] = {}  # whose options were seen to be there: not asked in every step
        self._keys: dict[_Situation, ProgramKey] = {}
        self._watch: StepMonitor | None = None
        self._constants = _constants(module)
        self._unmoved: Graph | None = None  # the order to go back to, where a hook would see another one
        self._warned = False
        self.profile: StepProfile | None = None
        self.controller: Controller | None = None

    @property
    def graph(self) -> Graph | None:
        """The graph, once the first call has recorded it."""
        return None if self._program is None else self._program.graph

    def tighten(self, share: float) -> bool:
        """Tighten the plan of the last call, as `Controller.tighten` does; return whether it changed."""
        return self.controller is not None and self.controller.tighten(share)

    def __call__(self, *args: Any) -> Any:
        """Run one forward. Takes Dynamo's inputs, returns what the graph returns."""
        values = self._values(args)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        devices = sorted({t.device for t in tensors}, key=str)
        device = _main_device(devices)
        autocast = autocast_now(device_type_of(devices))
        parameters = [t for t in tensors if t.requires_grad and t.is_leaf]
        if self._unmoved is not None and _are_watched(parameters):
            self._start_over(self._unmoved)
        situation = _Situation(autocast, any(p.grad is not None for p in parameters))
        controller = self._controllers.get(situation)
        if controller is None:
            stop_tracing()
            with tracing_lock() as is_mine:
                controller = self._new_controller(values, device, devices, situation, may_trace=is_mine)
        if controller is not None:
            self.controller = self._controllers[situation] = controller
        is_ready = controller is not None and self._prepare_options(controller, values, device, devices, situation)
        with modes_back():
            if controller is None or not is_ready:
                return self._run_unplanned(values)
            return self._run(controller, self._pieces(situation), values, parameters, devices, autocast)

    def _run_unplanned(self, values: Sequence[Any]) -> Any:
        """Run plainly: a profiler of the user's runs, and blocks can only be measured by one of our own."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"`{self._target}` is not planned in this step, which keeps everything: a profiler is running, or "
                "another thread measures, and measuring needs one of its own. Let the first steps run unprofiled.",
                HCBWarning,
                stacklevel=2,
            )
        return fx.Interpreter(self._module).run(
            *(v for v, c in zip(values, self._constants, strict=True) if c is _ARGUMENT)
        )

    def _run(
        self,
        controller: Controller,
        program: Program,
        values: list[Any],
        parameters: Sequence[torch.Tensor],
        devices: Sequence[torch.device],
        autocast: Sequence[Autocast],
    ) -> Any:
        if self._watch is not None:
            self._watch.abandon()  # if the last forward had no backward (yet), it can no longer be measured
        self._watch = watch = controller.begin_step(parameters)
        externals = NonBoundaryInputs.of(values)
        script = pin_program(controller.script, self._pinned)
        run = Run(script, externals, devices=devices, autocast=autocast, checks=self._config.check)
        try:
            run.begin([])
            state: list[Any] = []
            for piece, option in zip(program.pieces, run.program.options, strict=True):
                state = run.sweep(GraphBlock(piece, externals, option), state)
        except BaseException:
            watch.abandon()
            raise
        outputs = [values[s.index] if s.origin == EXTERNAL else state[s.index] for s in program.outputs]
        del state
        stats = run.stats
        mine = weakref.ref(self)

        def ended(watch: StepMonitor) -> None:
            me = mine()
            if me is not None:
                me.profile = controller.end_step(watch, stats)

        watch.forward_ended(outputs, ended)
        return fill_template(program.template, outputs)

    def _cut(self, values: Sequence[Any], room: Headroom) -> Program:
        graph = record_graph(self._module, values, name=self._target)
        # A compiled block wants to be large, so that there is something to fuse; an eager one small.
        if self._executor is Executor.INDUCTOR:
            return cut_program(self._module, graph, granularity=Granularity.COARSE)
        if not has_room_for_products(self._share(room, saved_bytes(graph))):
            return cut_program(self._module, graph, granularity=Granularity.FINE)
        moved = delay_ops(graph, may_move_parameters=False)
        if not _are_watched([v for v in values if isinstance(v, torch.Tensor)]):
            further = delay_ops(graph, may_move_parameters=True)
            if further != moved:
                self._unmoved, moved = graph, further
        return cut_program(self._module, reorder(self._module, moved), granularity=Granularity.PRODUCTS)

    def _start_over(self, graph: Graph) -> None:
        """Bring the calls into the order of `graph`, and forget what was planned for another."""
        reorder(self._module, graph)
        self._unmoved = self._program = self.controller = None
        for known in (self._compiled, self._measured, self._controllers, self._prepared, self._keys):
            known.clear()

    def _share(self, room: Headroom, plain_bytes: int) -> float:
        """Return about which share of plain training's activations the budget is."""
        budget = self._config.budget
        if budget.kind is BudgetKind.ACTIVATION and budget.fraction is not None:
            return budget.fraction
        return room(plain_bytes) / max(1, plain_bytes)

    def _pieces(self, situation: _Situation) -> Program:
        assert self._program is not None, "a situation is met only once the program is cut"
        return self._compiled.get(situation.autocast, self._program)

    def _values(self, args: Sequence[Any]) -> list[Any]:
        """Dynamo's arguments and the graph's constants, in the order of `Graph.inputs`."""
        arguments = iter(args)
        return [next(arguments) if constant is _ARGUMENT else constant for constant in self._constants]

    def _new_controller(
        self,
        values: Sequence[Any],
        device: torch.device,
        devices: Sequence[torch.device],
        situation: _Situation,
        *,
        may_trace: bool,
    ) -> Controller | None:
        """Return who decides what is flown; `None` where nothing is known and nothing can be measured now.

        **Arguments:** `may_trace`: whether this thread has the turn. Another that has it may give it back, and take it
        again while this one measures.
        """
        budget = self._config.budget
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        room = Headroom(self._config, device, tensors, self._memory)
        with planning_progress(self._target) as progress:
            if self._program is None:
                progress.stage("tracing")
                self._program = self._cut(values, room)
                spans = [(piece.span.start, piece.span.stop) for piece in self._program.pieces]
                self._pinned = blocks_of_modules(self._program.graph, spans, self._kept)
            if self._executor is Executor.INDUCTOR and situation.autocast not in self._compiled:
                progress.stage("compiling", total=len(self._program.pieces))
                externals = measuring_values(self._program, values)
                compiled = compile_program(self._program, externals, devices, progress.advance)
                self._compiled[situation.autocast] = compiled
                self._book.num_compiled += 1
            pieces = self._pieces(situation)
            page = None if self._pinned else self._page(pieces, device, situation)
            make = partial(
                Controller,
                self._target,
                budget=budget,
                room=room,
                device=device,
                observers=self._observers,
                costs=Costs(self._config.costs),
            )
            progress.stage("planning")
            known = None if page is None else self._cached_controller(make, page, room)
            if known is not None:
                return known
            if not (may_trace and can_trace(device)):
                return None
            chain = self._measure(values, device, devices, situation, progress)
            progress.stage("planning")
            self._book.count(Origin.MEASURED)
            if page is None:
                return make(chain)
            mine = replace(page, origin=Origin.MEASURED, known=None, is_on_disk=False)
            return make(chain, on_learned=partial(self._book.record, mine))

    def _measure(
        self,
        values: Sequence[Any],
        device: torch.device,
        devices: Sequence[torch.device],
        situation: _Situation,
        progress: PlanningProgress,
    ) -> Chain:
        """Return the chain as its planner sees it: what is compiled is measured, once, and the rest estimated."""
        pieces = self._pieces(situation)
        progress.stage("measuring", total=len(pieces.pieces))
        chain = measure_chain(
            pieces,
            values,
            device=device,
            devices=devices,
            autocast=situation.autocast,
            counts_gradients=self._config.budget.kind is BudgetKind.MEMORY and not situation.has_gradients,
            on_block=progress.advance,
            known=self._measured.setdefault(situation, {}),
            kind=Costs(self._config.costs),
        )
        return pin_chain(chain, self._pinned)

    def _prepare_options(
        self,
        controller: Controller,
        values: Sequence[Any],
        device: torch.device,
        devices: Sequence[torch.device],
        situation: _Situation,
    ) -> bool:
        """Compile the options that the next step goes by, and measure those that were estimated; see `controller`.

        **Returns:** whether the step can be flown: not where something must be measured, and cannot be now.
        """
        program = self._pieces(situation)
        controller.refresh()
        while controller.wants_all_options or controller.script is not self._prepared.get(situation):
            unmeasured = controller.unmeasured
            wanted = unmeasured or options_to_compile(program, list(enumerate(controller.script.options)))
            if not wanted:
                self._prepared[situation] = controller.script
                break
            stop_tracing()
            with tracing_lock() as is_mine, planning_progress(self._target) as progress:
                if unmeasured and not (is_mine and can_trace(device)):
                    return False
                progress.stage("compiling", total=len(program.pieces))
                compile_options(program, measuring_values(program, values), devices, wanted, progress.advance)
                if unmeasured:
                    controller.learn_options(self._measure(values, device, devices, situation, progress))
        return True

    def _page(self, pieces: Program, device: torch.device, situation: _Situation) -> CacheEntry:
        """What is known of the program. Not to be asked with pinned blocks: such a chain is not the program's own."""
        # A step that cannot be planned yet comes here again.
        if situation not in self._keys:
            self._keys[situation] = program_key(pieces)
        mine = self._keys[situation]
        key = plan_key(
            mine,
            self._config,
            device=device,
            autocast=situation.autocast,
            has_gradients=situation.has_gradients,
        )
        return self._book.look_up(pieces, mine.layout, key)

    def _cached_controller(
        self, make: Callable[..., Controller], page: CacheEntry, room: Headroom
    ) -> Controller | None:
        """Return a controller that starts from the cached plan; `None` where none is known or none fits here."""
        if page.known is None:
            return None
        is_other = page.origin is Origin.LARGER
        if is_other and (room.cap_bytes is not None or not page.known.suits(room(plain_peak_bytes(page.known.chain)))):
            return None  # to plan again, the costs of this shape are needed
        try:
            controller = make(
                page.known.chain,
                known=page.known,
                known_from=page.origin.value,
                on_learned=partial(self._book.record, page),
            )
        except BudgetTooSmallError:
            return None  # by costs that were learned elsewhere: what is measured here decides, and names what is needed
        self._book.count(page.origin)
        return controller

    def release(self) -> None:
        """Stop to follow a step that has not ended: nobody will ask for its profile."""
        if self._watch is not None:
            self._watch.abandon()


def _are_watched(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether somebody may see in which order gradients come: a hook, or those who reduce them over ranks."""
    distributed = torch.distributed
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return is_distributed or any(has_gradient_hooks(t) for t in tensors)


_ARGUMENT = object()


def _constants(module: fx.GraphModule) -> list[Any]:
    constants: list[Any] = []
    for n in module.graph.nodes:
        if n.op == "placeholder":
            constants.append(_ARGUMENT)
        elif n.op == "get_attr":
            value: Any = module
            for name in str(n.target).split("."):
                value = getattr(value, name)
            constants.append(value)
    return constants


def _main_device(devices: Sequence[torch.device]) -> torch.device:
    """The device whose memory is planned: the first accelerator, else the CPU."""
    return next((d for d in devices if d.type not in ("cpu", "meta")), torch.device("cpu"))
