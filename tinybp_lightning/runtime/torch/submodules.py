"""Train a module whose forward is not one graph: the calls of its submodules become the blocks.

The module runs as it is, under plain autograd. We intercept only the calls of its repeated parts (or FSDP units),
outside all hooks, through the attribute that `Module.compile` uses. Each call keeps its arguments and is replayed on
its own; the plan decides which calls keep their saved tensors.

Note [Held]
    A unit is Python code, which may do anything. So each call holds what it saved until it has ended, and lets go only
    if it changed nothing that its replay would miss. The first call of each unit is also replayed at once, and compared
    with what is held. That costs one more forward in the first step, and no more memory than a replay in backward.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_flatten

from tinybp_lightning.capture.torch.ambient import generators_in
from tinybp_lightning.capture.torch.private import compiled_call_impl, set_call_impl
from tinybp_lightning.config import Costs
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.runtime.profile import StepProfile
from tinybp_lightning.runtime.torch.arguments import CallArguments
from tinybp_lightning.runtime.torch.calls import CallCost, DroppedStep, LargestStep
from tinybp_lightning.runtime.torch.control_loop import ControlLoop, TargetContext
from tinybp_lightning.runtime.torch.kept_modules import is_kept, synchronises_ranks
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMonitor, stop_tracing
from tinybp_lightning.runtime.torch.module_block import ModuleBlock, Unit, outputs_of
from tinybp_lightning.runtime.torch.module_state import ModuleState
from tinybp_lightning.runtime.torch.replay.bits import same_bits
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run, RunStats
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, ReplayStep
from tinybp_lightning.runtime.torch.side_effects import PythonState, changed_state, python_state, referred_by
from tinybp_lightning.runtime.torch.step_calls import OpenGraphs
from tinybp_lightning.schedule.actions import ForwardSave

__all__ = ["ModuleSteps", "is_sharded", "step_modules"]

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (*_NEVER_CALLED, nn.Sequential)
_REPLAYED = ReplayProgram(
    (False,), (OptionId(0),), frozenset(), ((ReplayStep(ForwardSave(BlockId(0)), stops_early=True),),)
)


def is_sharded(module: nn.Module) -> bool:
    """Return whether `module` is an FSDP unit: those break the graph, and always are boundaries."""
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__)


def step_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules whose calls are blocks, by name: FSDP units, or else the innermost repeated parts.

    A part is repeated if a container holds two or more of its class and it has parts itself (an attention block is, a
    layer of an `nn.Sequential` is not). Next to the repeated parts, every module that contains none of them is one
    block. A module that is marked as kept is neither a block nor part of one.
    """
    units: dict[str, nn.Module] = {}
    sharded = any(is_sharded(m) for m in root.modules() if m is not root)
    seen: set[int] = set()

    def is_split(module: nn.Module) -> bool:
        inside = [c for c in module.modules() if c is not module]
        if sharded:
            return not is_sharded(module) and any(is_sharded(c) for c in inside)
        is_repeated = isinstance(module, _NEVER_CALLED) or any(_is_repeated(c) for c in [module, *inside])
        return is_repeated or any(is_kept(c) for c in inside)

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen or is_kept(module) or next(module.parameters(), None) is None:
            return
        seen.add(id(module))  # a module in two places has one call to intercept
        if is_split(module):
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}", child)
        elif not sharded or (is_sharded(module) and not any(is_kept(m) for m in module.modules())):
            units[name] = module

    for child_name, child in root.named_children():
        visit(child_name, child)
    return units


def _is_repeated(container: nn.Module) -> bool:
    """Return whether `container` holds several parts of one class that have parts themselves."""
    if not isinstance(container, _CONTAINERS):
        return False
    kinds = [type(part) for part in container.children() if next(part.children(), None) is not None]
    return len(kinds) > len(set(kinds))


@dataclass(slots=True)
class _OpenStep:
    """What the units have done so far in the step that runs now, which may call the whole module several times."""

    monitor: StepMonitor
    graphs: OpenGraphs = field(default_factory=OpenGraphs)
    calls: list[CallCost] = field(default_factory=list[CallCost])
    num_calls: Counter[str] = field(default_factory=Counter[str])
    stats: list[RunStats] = field(default_factory=list[RunStats])
    is_in_forward: bool = False
    is_in_unit: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether its earlier calls still wait for their backward."""
        return not self.monitor.has_ended and any(self.graphs.alive())


class ModuleSteps:
    """Trains one module by intercepting the calls of its units."""

    def __init__(self, module: nn.Module, plain: Callable[..., Any], context: TargetContext) -> None:
        self._module = module
        self._plain = plain
        self._context = context
        self._units = tuple(Unit.of(name, unit) for name, unit in step_modules(module).items())
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._volatile: dict[str, frozenset[str]] = {}  # the buffers that each unit's calls were seen to change
        self._kept: set[str] = set()  # units whose replay would do something else than their first run
        self._has_blocks = True  # until a step is seen to have none
        self._largest = LargestStep()
        self._dropped = DroppedStep()
        self._open: _OpenStep | None = None
        self._refused: BudgetTooSmallError | None = None
        self.control: ControlLoop | None = None
        self.profile: StepProfile | None = None
        for unit in self._units:
            set_call_impl(unit.module, torch._dynamo.disable(self._interceptor(unit)))

    def remove(self) -> None:
        """Take the interceptors out; what the user compiled stays compiled."""
        for unit in self._units:
            set_call_impl(unit.module, unit.compiled)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one training forward of the whole module.

        **Raises:** `BudgetTooSmallError` if the last step has shown that no plan fits.
        """
        if (refused := self._refused) is not None:
            self._refused = None
            raise refused
        step = self._begun()
        step.is_in_forward = True
        try:
            result = self._plain(*args, **kwargs)
        except BaseException:
            self.forget()
            raise
        finally:
            step.is_in_forward = False
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        step.graphs.add(outputs)
        step.monitor.forward_ended(outputs, lambda _: self._ended(step))
        return result

    def forget(self) -> None:
        """Give up the step that runs now."""
        step, self._open = self._open, None
        if step is not None:
            step.monitor.abandon()

    def _begun(self) -> _OpenStep:
        """Return the step that a call belongs to: the one that runs, if that waits for its backward, or a new one."""
        if self._open is not None and self._open.goes_on:
            self._open.monitor.goes_on()
            return self._open
        self.forget()
        if self.control is not None:
            monitor = self.control.begin_step(self._parameters)
        else:
            stop_tracing()  # what this step needs must be measured, or there is nothing to plan with
            budget = self._context.config.budget
            monitor = StepMonitor(self._device, self._parameters, budget, wants_trace=self._has_blocks)
        self._open = step = _OpenStep(monitor)
        return step

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device

    def _ended(self, step: _OpenStep) -> None:
        monitor, calls = step.monitor, step.calls
        largest = self._largest.with_calls(calls).without(self._kept)
        if self.control is None and not calls:
            self._has_blocks = False
            self._context.warn(
                "nothing to replay",
                f"Nothing of `{self._context.name}` can be replayed, because every part of it is kept: it is trained "
                "plainly, and the budget is not enforced. Keep fewer parts, or leave `hcb` out.",
            )
        elif self.control is None:
            self._dropped = DroppedStep(monitor.measured, tuple(calls))
            if Costs(self._context.config.costs) is Costs.OPERATIONS:
                self._context.warn(
                    "no operations",
                    f"`{self._context.name}` is trained by module steps, whose operations are not known: it is planned "
                    "by measured seconds, whatever `costs='operations'` says.",
                )
            self._plan_for(largest)
        elif largest is not self._largest:
            if monitor.measured is not None and all(call.is_dropped for call in calls):
                self._dropped = DroppedStep(monitor.measured, tuple(calls))
            self._plan_for(largest)
        else:
            stats = RunStats.sum_of(step.stats)
            self.profile = self.control.end_step(monitor, stats, is_whole=largest.is_whole(calls))

    def _plan_for(self, largest: LargestStep) -> None:
        """Plan for the largest step that has been seen; if no plan fits, the last one stays in force."""
        context, tensors = self._context, [*self._parameters, *self._module.buffers()]
        headroom = Headroom(context.config, self._device, tensors, context.memory)
        try:
            self.control = ControlLoop(context, largest.chain(self._dropped), headroom=headroom, device=self._device)
        except BudgetTooSmallError as error:
            self._refused = error  # we may be inside `optimizer.step()`: the next forward is the place to refuse
            return
        self._largest = largest

    def _interceptor(self, unit: Unit) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._intercept(unit, args, kwargs)

    def _intercept(self, unit: Unit, args: Any, kwargs: Any) -> Any:
        """Run one call of a unit, dropping what it saves unless the plan keeps it."""
        step = self._open
        if (
            step is None
            or not step.is_in_forward
            or step.is_in_unit
            or not torch.is_grad_enabled()
            or unit.name in self._kept
        ):
            return unit.impl(*args, **kwargs)
        arguments = CallArguments.of(args, kwargs)
        started = time.perf_counter()
        input_bytes = sum(t.numel() * t.element_size() for t in arguments.leaves)  # a sparse tensor counts as dense
        cost = CallCost(unit.name, step.num_calls[unit.name], input_bytes)
        step.num_calls[unit.name] += 1
        step.calls.append(cost)
        place = self._largest.place(cost)
        is_kept_by_plan = self.control is not None and place is not None and self.control.program.kept[place]
        step.is_in_unit = True
        try:
            if is_kept_by_plan or not self._is_replayable(unit, arguments):
                result = unit.impl(*args, **kwargs)
            elif unit.name in self._volatile:
                result = self._drop(unit, arguments, (args, kwargs), cost, step)
            else:
                with step.monitor.apart():
                    result = self._drop(unit, arguments, (args, kwargs), cost, step)
        finally:
            step.is_in_unit = False
        cost.forward_s = time.perf_counter() - started
        return result

    def _drop(self, unit: Unit, arguments: CallArguments, given: Any, cost: CallCost, step: _OpenStep) -> Any:
        """Run one call of a unit, and let go of what it saved if a replay of it will be right. See Note [Held]."""
        module, volatile = unit.module, self._volatile.get(unit.name)
        devices = sorted({p.device for p in [*self._parameters[:1], *arguments.leaves]}, key=str)
        # A sharded unit gathers into its parameters and lets go of them again: they have no version to rely on.
        sharded = is_sharded(module)
        externals = NonBoundaryInputs.of([] if sharded else list(module.parameters()))
        state = None if sharded else ModuleState.of(module)
        block = ModuleBlock(unit.name, unit, arguments, given, externals, state, volatile)
        del given
        run = Run(
            _REPLAYED,
            externals,
            devices=devices,
            generators=generators_in([*(v for part in module.modules() for v in vars(part).values()), *arguments.odd]),
            holds=True,
            checks=self._context.config.check,
            on_replay=partial(step.monitor.replay_begins, len(step.calls) - 1),
        )
        step.stats.append(run.stats)
        before: PythonState = python_state(module) if volatile is None else {}
        run.begin(arguments.leaves)
        run.sweep(block, list(arguments.leaves))
        result, block.result = block.result, None
        cost.is_dropped = True
        cost.saved_bytes = run.held_bytes(0, outputs_of(result))
        self._volatile[unit.name], has_copies = block.settle()
        argument = block.changed_argument()
        cost.guard_bytes = block.guard_bytes + run.random_bytes(0)
        if volatile is None:
            looked_at = referred_by(() if state is None else state.looking_hooks)
            changed = [name for name in changed_state(before, python_state(module)) if name not in looked_at]
        else:
            changed = [] if state is None else state.changed()
        if changed:
            why = f"its forward changes `{changed[0]}`, and a replay would change it again"
        elif argument is not None:
            shape = tuple(argument.shape)
            why = f"its forward changes an argument in place, of shape {shape}: use the out-of-place form of the op"
        elif not has_copies:
            why = None  # from the next step on there is a copy
        elif volatile is None and (difference := _first_difference(run, block, outputs_of(result))) is not None:
            why = f"its replay does not do what its forward did ({difference})"
        else:
            run.let_go()
            return result
        step.calls.pop()  # this call still holds what it saved: it is not a block of the plan
        if why is not None:
            self._kept.add(unit.name)
            self._context.warn(
                ("kept", type(module)),  # once for all layers of a kind
                f"`{self._context.name}.{unit.name}` (`{type(module).__name__}`) is kept, as if marked by `tbp.keep`: "
                f"{why}.",
            )
        return result

    def _is_replayable(self, unit: Unit, arguments: CallArguments) -> bool:
        if not arguments.odd and not synchronises_ranks(unit.module):
            return True
        odd = arguments.odd
        why = f"gets a `{type(odd[0]).__name__}`, which a replay might change again" if odd else "synchronises ranks"
        self._context.warn(
            ("not replayed", unit.name), f"`{self._context.name}.{unit.name}` is not replayed: it {why}."
        )
        return False


def _first_difference(run: Run, block: ModuleBlock, outputs: Sequence[torch.Tensor]) -> str | None:
    """Replay a call at once, and return what differs from its first run, whose `outputs` these are."""
    parts = block.unit.module.modules()
    is_compiled = block.unit.compiled is not None or any(
        isinstance(part, OptimizedModule) or compiled_call_impl(part) is not None
        for part in parts
        if part is not block.unit.module
    )
    block.outputs = []
    found = run.first_difference(0, block.buffer_storages, compares_values=not is_compiled)
    again, block.outputs = block.outputs, None
    if found is None and not all(map(same_bits, outputs, again)):
        return "it returned other values"
    return found
