"""Train a module whose forward is not one graph: the calls of its submodules become the blocks.

The module runs as it is, under plain autograd. We intercept only the calls of its repeated parts (or FSDP units),
outside all hooks, through the attribute that `Module.compile` uses. Each call keeps its arguments and is replayed on
its own; the plan decides which calls keep their saved tensors.
"""

import enum
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tinybp_lightning.capture.torch.private import call_impl, compiled_call_impl, set_call_impl, swap_buffer
from tinybp_lightning.config import Costs
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.runtime.profile import StepProfile
from tinybp_lightning.runtime.torch.calls import CallCost, DroppedStep, LargestStep
from tinybp_lightning.runtime.torch.control_loop import ControlLoop, TargetContext
from tinybp_lightning.runtime.torch.kept_modules import is_kept, synchronises_ranks
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMonitor, stop_tracing
from tinybp_lightning.runtime.torch.replay.ambient import autocast_now, device_type_of, random_state_now
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run, RunStats
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, ReplayStep
from tinybp_lightning.runtime.torch.side_effects import PythonState, changed_state, python_state
from tinybp_lightning.schedule.actions import ForwardSave

__all__ = ["ModuleSteps", "is_sharded", "step_modules"]

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (*_NEVER_CALLED, nn.Sequential)
_REPLAYED = ReplayProgram(
    (False,), (OptionId(0),), frozenset(), ((ReplayStep(ForwardSave(BlockId(0)), stops_early=True),),)
)
# A norm that is in evaluation mode now may learn later, and does so without raising the version counter.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PLAIN_DATA = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)


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


@dataclass(frozen=True, slots=True)
class _Unit:
    """A submodule whose calls are blocks. `impl` is its call; `compiled` what the user's compile call put in place."""

    name: str
    module: nn.Module
    impl: Callable[..., Any]
    compiled: Callable[..., Any] | None


@dataclass(eq=False)
class _ModuleBlock:
    """One call of a unit, runnable again. `volatile`: the buffers that a run may change."""

    name: str
    unit: _Unit
    spec: TreeSpec
    externals: NonBoundaryInputs
    devices: Sequence[torch.device]
    volatile: set[str]
    is_random: bool = True  # until the first run has shown that it draws nothing
    is_out_of_place: bool = False  # nobody has looked
    snapshots: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    result: Any = None

    def first(self, state: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(state, self.spec)
        state.clear()
        self.snapshots = {n: b.detach().clone() for n, b in self.unit.module.named_buffers() if n in self.volatile}
        random = random_state_now(self.devices)
        self.result = self.unit.impl(*args, **kwargs)
        self.is_random = not random_state_now(self.devices).same_as(random)
        return []

    def again(self, state: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(state, self.spec)
        state.clear()
        for i in range(len(self.externals.values)):
            self.externals.check(i, self.name)
        # See Note [Buffers] in engine.py: the replay works on copies, the module keeps its own.
        module = self.unit.module
        owners = [(module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], n) for n in self.snapshots]
        own = [swap_buffer(owner, key, self.snapshots[name].clone()) for owner, key, name in owners]
        try:
            self.unit.impl(*args, **kwargs)
        finally:
            for (owner, key, _), buffer in zip(owners, own, strict=True):
                swap_buffer(owner, key, buffer)
        return []

    def settle_buffers(self) -> set[str]:
        """Drop the snapshots that no replay needs; return the buffers that a run changes, or may change later."""
        now = dict(self.unit.module.named_buffers())
        changed = {n for n, old in self.snapshots.items() if n.endswith(_STATISTICS) or not torch.equal(old, now[n])}
        self.snapshots = {n: t for n, t in self.snapshots.items() if n in changed}
        return changed

    @property
    def guard_bytes(self) -> int:
        """What is kept so that a replay starts as the first run did: buffers, and a generator's state."""
        random = torch.get_rng_state().nbytes if self.is_random else 0
        return random + sum(t.nbytes for t in self.snapshots.values())


@dataclass(slots=True)
class _OpenForward:
    """What the units have done so far in the forward that runs now."""

    calls: list[CallCost] = field(default_factory=list[CallCost])
    num_calls: Counter[str] = field(default_factory=Counter[str])
    runs: list[Run] = field(default_factory=list[Run])


class ModuleSteps:
    """Trains one module by intercepting the calls of its units."""

    def __init__(self, module: nn.Module, plain: Callable[..., Any], context: TargetContext) -> None:
        self._module = module
        self._plain = plain
        self._context = context
        self._units = tuple(
            _Unit(name, unit, call_impl(unit), compiled_call_impl(unit)) for name, unit in step_modules(module).items()
        )
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._volatile: dict[str, set[str]] = {}  # the buffers that each unit's first run was seen to change
        self._kept: set[str] = set()  # units that were seen to change Python state
        self._has_blocks = True  # until a step is seen to have none
        self._largest = LargestStep()
        self._dropped = DroppedStep()
        self._open: _OpenForward | None = None
        self._monitor: StepMonitor | None = None
        self.control: ControlLoop | None = None
        self.profile: StepProfile | None = None
        for unit in self._units:
            set_call_impl(unit.module, torch._dynamo.disable(self._interceptor(unit)))

    def remove(self) -> None:
        """Take the interceptors out; what the user compiled stays compiled."""
        for unit in self._units:
            set_call_impl(unit.module, unit.compiled)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one training forward of the whole module."""
        if self._monitor is not None:
            self._monitor.abandon()
        device = self._parameters[0].device
        self._open = forward = _OpenForward()
        if self.control is not None:
            monitor = self.control.begin_step(self._parameters)
        else:
            stop_tracing()  # what this step needs must be measured, or there is nothing to plan with
            budget = self._context.config.budget
            monitor = StepMonitor(device, self._parameters, budget, wants_trace=self._has_blocks)
        self._monitor = monitor
        try:
            result = self._plain(*args, **kwargs)
        except BaseException:
            monitor.abandon()
            raise
        finally:
            self._open = None
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        calls, stats = forward.calls, [run.stats for run in forward.runs]
        monitor.forward_ended(outputs, lambda monitor: self._ended(monitor, calls, stats, device))
        return result

    def _ended(self, monitor: StepMonitor, calls: list[CallCost], stats: list[RunStats], device: torch.device) -> None:
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
            self._plan_for(largest, device)
        elif largest is not self._largest:
            if monitor.measured is not None and all(call.is_dropped for call in calls):
                self._dropped = DroppedStep(monitor.measured, tuple(calls))
            self._plan_for(largest, device)
        else:
            self.profile = self.control.end_step(monitor, _sum(stats), is_whole=largest.is_whole(calls))

    def _plan_for(self, largest: LargestStep, device: torch.device) -> None:
        """Plan for the largest step that has been seen; if no plan fits, the last one stays in force."""
        context, tensors = self._context, [*self._parameters, *self._module.buffers()]
        headroom = Headroom(context.config, device, tensors, context.memory)
        self.control = ControlLoop(context, largest.chain(self._dropped), headroom=headroom, device=device)
        self._largest = largest

    def _interceptor(self, unit: _Unit) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._intercept(unit, args, kwargs)

    def _intercept(self, unit: _Unit, args: Any, kwargs: Any) -> Any:
        """Run one call of a unit, dropping what it saves unless the plan keeps it."""
        forward = self._open
        if forward is None or not torch.is_grad_enabled() or unit.name in self._kept:
            return unit.impl(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        started = time.perf_counter()
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        input_bytes = sum(t.numel() * t.element_size() for t in tensors)  # a sparse tensor counts as dense
        cost = CallCost(unit.name, forward.num_calls[unit.name], input_bytes)
        forward.num_calls[unit.name] += 1
        forward.calls.append(cost)
        place = self._largest.place(cost)
        is_kept_by_plan = self.control is not None and place is not None and self.control.program.kept[place]
        if is_kept_by_plan or not self._is_replayable(unit, leaves):
            result = unit.impl(*args, **kwargs)
        else:
            result = self._drop(unit, leaves, spec, cost, forward)
        cost.forward_s = time.perf_counter() - started
        return result

    def _drop(self, unit: _Unit, leaves: list[Any], spec: TreeSpec, cost: CallCost, forward: _OpenForward) -> Any:
        module = unit.module
        first_time = unit.name not in self._volatile
        # Noted once the first run has succeeded: a run that fails has shown nothing of what the unit changes.
        volatile = self._volatile.get(unit.name, {n for n, _ in module.named_buffers()})
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        devices = sorted({p.device for p in [*self._parameters[:1], *tensors]}, key=str)
        # A sharded unit gathers into its parameters and lets go of them again: they have no version to rely on.
        externals = NonBoundaryInputs.of([] if is_sharded(module) else list(module.parameters()))
        block = _ModuleBlock(unit.name, unit, spec, externals, devices, volatile)
        autocast, checks = autocast_now(device_type_of(devices)), self._context.config.check
        run = Run(_REPLAYED, externals, devices=devices, autocast=autocast, holds=first_time, checks=checks)
        forward.runs.append(run)
        before: PythonState = python_state(module) if first_time else {}
        run.begin(leaves)
        run.sweep(block, list(leaves))
        result, block.result = block.result, None
        cost.is_dropped = True
        cost.saved_bytes = run.dropped_bytes(0, tree_flatten(result)[0])
        if first_time:
            self._volatile[unit.name] = block.settle_buffers()
            if attributes := changed_state(before, python_state(module)):
                self._kept.add(unit.name)
                forward.calls.pop()  # this call still holds what it saved: it is not a block of the plan
                self._context.warn(
                    ("kept", type(module)),  # once for all layers of a kind
                    f"`{self._context.name}.{unit.name}` (`{type(module).__name__}`) is kept, as if marked by "
                    f"`tbp.keep`: its forward changes `{attributes[0]}`, and a replay would change it again.",
                )
            else:
                run.let_go()
        cost.guard_bytes = block.guard_bytes
        return result

    def _is_replayable(self, unit: _Unit, leaves: list[Any]) -> bool:
        odd = [t for t in leaves if not isinstance(t, (torch.Tensor, *_PLAIN_DATA))]
        if not odd and not synchronises_ranks(unit.module):
            return True
        why = f"gets a `{type(odd[0]).__name__}`, which a replay might change again" if odd else "synchronises ranks"
        self._context.warn(
            ("not replayed", unit.name), f"`{self._context.name}.{unit.name}` is not replayed: it {why}."
        )
        return False


def _sum(stats: Sequence[RunStats]) -> RunStats:
    """Return what all runs of a step replayed."""
    return RunStats(
        replayed_blocks=sum(s.replayed_blocks for s in stats),
        out_of_order_blocks=sum(s.out_of_order_blocks for s in stats),
        replay_s=sum(s.replay_s for s in stats),
    )
