"""How is a module trained whose forward is not one graph? Its submodules' calls become the blocks.

The module runs as it is: its Python, branches and side effects between submodules happen once, under plain autograd.
Only the calls of its repeated parts (or FSDP units) are intercepted, outside all hooks, through the attribute that
`Module.compile` uses. Each call holds its arguments and is replayed on its own, so nothing is ever advanced through;
the plan decides which calls keep their saved tensors.
"""

import enum
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tinybp_lightning.capture.torch.private import call_impl, compiled_call_impl, set_call_impl, swap_buffer
from tinybp_lightning.config import Costs, HCBConfig
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.runtime.profile import Observer, StepProfile
from tinybp_lightning.runtime.torch.calls import CallBook, CallCost
from tinybp_lightning.runtime.torch.controller import Controller
from tinybp_lightning.runtime.torch.kept_modules import has_kept, is_kept, synchronises_ranks
from tinybp_lightning.runtime.torch.measure.memory_limit import Headroom, TargetMemory
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMeasurement, StepMonitor, stop_tracing
from tinybp_lightning.runtime.torch.replay.ambient import autocast_now, device_type_of, random_state_now
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run, RunStats
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, ReplayStep
from tinybp_lightning.runtime.torch.side_effects import changed_state, python_state
from tinybp_lightning.schedule.actions import ForwardSave

__all__ = ["ModuleSteps", "has_sharded_units", "step_modules"]

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (*_NEVER_CALLED, nn.Sequential)
_REPLAYED = ReplayProgram(
    (False,), (OptionId(0),), frozenset(), ((ReplayStep(ForwardSave(BlockId(0)), stops_early=True),),)
)
# A norm that is in evaluation mode now may learn later, and does so without raising the version counter.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PLAIN_DATA = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)


def has_sharded_units(module: nn.Module) -> bool:
    """Whether some part of `module` is an FSDP unit: those break the graph, and always are boundaries."""
    return any(_is_sharded(m) for m in module.modules())


def _is_sharded(module: nn.Module) -> bool:
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__)


def step_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules whose calls are blocks, by name: FSDP units, else the innermost repeated parts.

    A part is repeated where a container holds two or more of its class, and it has parts itself (an attention block is,
    a layer of an `nn.Sequential` is not). Around the repeated parts, whatever does not contain any is one block. A
    module that is to be kept is no block, nor part of one.
    """
    units: dict[str, nn.Module] = {}
    sharded = any(_is_sharded(m) for m in root.modules() if m is not root)
    seen: set[int] = set()

    def is_split(module: nn.Module) -> bool:
        inside = [c for c in module.modules() if c is not module]
        if not sharded and any(is_kept(c) for c in inside):
            return True
        if sharded:
            return not _is_sharded(module) and any(_is_sharded(c) for c in inside)
        return isinstance(module, _NEVER_CALLED) or any(_is_repeated(c) for c in [module, *inside])

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen or is_kept(module) or next(module.parameters(), None) is None:
            return
        seen.add(id(module))  # a module in two places has one call to intercept
        if is_split(module):
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}", child)
        elif not sharded or (_is_sharded(module) and not has_kept(module)):
            units[name] = module

    for child_name, child in root.named_children():
        visit(child_name, child)
    return units


def _is_repeated(container: nn.Module) -> bool:
    """Whether `container` holds several parts of one class that have parts themselves."""
    if not isinstance(container, _CONTAINERS):
        return False
    kinds = [type(part) for part in container.children() if next(part.children(), None) is not None]
    return len(kinds) > len(set(kinds))


class _ModuleBlock:
    """One call of a submodule, runnable again. `is_random` until the first run has shown that it draws nothing."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        impl: Callable[..., Any],
        spec: TreeSpec,
        *,
        externals: NonBoundaryInputs,
        devices: Sequence[torch.device],
        volatile: set[str],
    ) -> None:
        self.name = name
        self._externals = externals
        self.is_random = True
        self.is_out_of_place = False  # nobody has looked
        self._devices = devices
        self._module = module
        self._impl = impl
        self._spec = spec
        self._volatile = volatile
        self._snapshots: dict[str, torch.Tensor] = {}
        self.result: Any = None

    def first(self, state: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(state, self._spec)
        state.clear()
        self._snapshots = {n: b.detach().clone() for n, b in _buffers(self._module) if n in self._volatile}
        random = random_state_now(self._devices)
        self.result = self._impl(*args, **kwargs)
        self.is_random = not random_state_now(self._devices).same_as(random)
        return []

    def again(self, state: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(state, self._spec)
        state.clear()
        for i in range(len(self._externals.values)):
            self._externals.value(i, self.name)  # checks that a parameter is what it was
        # See Note [Buffers] in engine.py: the replay works on copies, the module keeps its own.
        owners = [(self._module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], n) for n in self._snapshots]
        own = [swap_buffer(owner, key, self._snapshots[name].clone()) for owner, key, name in owners]
        try:
            self._impl(*args, **kwargs)
        finally:
            for (owner, key, _), buffer in zip(owners, own, strict=True):
                swap_buffer(owner, key, buffer)
        return []

    def changed_buffers(self) -> set[str]:
        """Names of the buffers that the first run changed, and of those that a norm may change in another run."""
        now = dict(_buffers(self._module))
        return {n for n, old in self._snapshots.items() if n.endswith(_STATISTICS) or not torch.equal(old, now[n])}

    def forget_buffers_but(self, names: set[str]) -> None:
        """Keep only the snapshots that a replay needs."""
        self._volatile = names
        self._snapshots = {n: t for n, t in self._snapshots.items() if n in names}

    @property
    def guard_bytes(self) -> int:
        """What is kept so that a replay sees what the first run saw: buffers, and a generator's state."""
        random = torch.get_rng_state().nbytes if self.is_random else 0
        return random + sum(t.nbytes for t in self._snapshots.values())


class ModuleSteps:
    """Trains one module by intercepting the calls of its parts."""

    def __init__(
        self,
        module: nn.Module,
        plain: Callable[..., Any],
        name: str,
        config: HCBConfig,
        observers: Sequence[Observer],
        memory: TargetMemory,
    ) -> None:
        self._memory = memory
        self._plain = plain
        self._name = name
        self._config = config
        self._observers = observers
        self._units = step_modules(module)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._buffers = list(module.buffers())
        self._volatile: dict[str, set[str]] = {}
        self._warned: set[str] = set()
        self._kept_units: set[str] = set()  # found to change Python state
        self._kept_kinds: set[type[nn.Module]] = set()
        self._has_blocks = True  # until a step is seen to have none
        self._book = CallBook()
        self._dropped: tuple[StepMeasurement | None, list[CallCost]] = (
            None,
            [],
        )  # the first step, which drops every block
        self._calls: list[CallCost] | None = None
        self._num_calls = Counter[str]()  # of each unit in the step
        self._runs: list[Run] = []
        self._watch: StepMonitor | None = None
        self.controller: Controller | None = None
        self.profile: StepProfile | None = None
        self._compiled = {unit_name: compiled_call_impl(unit) for unit_name, unit in self._units.items()}
        for unit_name, unit in self._units.items():
            interceptor = _Interceptor(self, unit_name, unit, call_impl(unit))
            set_call_impl(unit, torch._dynamo.disable(interceptor))

    def remove(self) -> None:
        """Take the interceptors out; what the user compiled stays compiled."""
        for unit_name, unit in self._units.items():
            set_call_impl(unit, self._compiled[unit_name])

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one training forward of the whole module."""
        if self._watch is not None:
            self._watch.abandon()
        device = self._parameters[0].device
        self._calls, self._runs = [], []
        self._num_calls.clear()
        self._watch = watch = self._begin(device)
        try:
            result = self._plain(*args, **kwargs)
        except BaseException:
            watch.abandon()
            raise
        finally:
            calls, runs = self._calls, self._runs
            self._calls, self._runs = None, []
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        stats = [run.stats for run in runs]
        watch.forward_ended(outputs, lambda w: self._ended(w, calls, stats, device))
        return result

    def _begin(self, device: torch.device) -> StepMonitor:
        if self.controller is not None:
            return self.controller.begin_step(self._parameters)
        stop_tracing()  # what this step needs must be measured, or there is nothing to plan with
        return StepMonitor(device, self._parameters, self._config.budget, wants_trace=self._has_blocks)

    def _ended(self, watch: StepMonitor, calls: list[CallCost], stats: list[RunStats], device: torch.device) -> None:
        total = RunStats()
        for s in stats:
            total.replayed_blocks += s.replayed_blocks
            total.out_of_order_blocks += s.out_of_order_blocks
            total.replay_s += s.replay_s
        book = self._book.with_calls(calls).without(self._kept_units)
        if self.controller is None and not calls:
            self._say_nothing_is_planned()
        elif self.controller is None:
            self._dropped = (watch.measured, calls)
            if Costs(self._config.costs) is Costs.OPERATIONS:
                warnings.warn(
                    f"`{self._name}` is trained by module steps, whose operations are not known: it is planned by "
                    "measured seconds, whatever `costs='operations'` says.",
                    HCBWarning,
                    stacklevel=2,
                )
            self._plan_for(book, device)
        elif book is not self._book:
            if watch.measured is not None and all(call.is_dropped for call in calls):
                self._dropped = (watch.measured, calls)
            self._plan_for(book, device)
        else:
            self.profile = self.controller.end_step(watch, total, is_whole=self._book.is_whole(calls))

    def _plan_for(self, book: CallBook, device: torch.device) -> None:
        """Plan for the largest step that has been seen; where no plan fits, the last one stays in force."""
        room = Headroom(self._config, device, [*self._parameters, *self._buffers], self._memory)
        chain = book.chain(*self._dropped)
        self.controller = Controller(
            self._name, chain, budget=self._config.budget, room=room, device=device, observers=self._observers
        )
        self._book = book

    def _say_nothing_is_planned(self) -> None:
        if self._has_blocks:
            self._has_blocks = False
            warnings.warn(
                f"Nothing of `{self._name}` can be replayed, because every part of it is kept: it is trained plainly, "
                "and the budget is not enforced. Keep fewer parts, or leave `hcb` out.",
                HCBWarning,
                stacklevel=2,
            )

    def intercept(self, unit: str, module: nn.Module, impl: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one call of a unit, dropping what it saves unless the plan keeps it."""
        if self._calls is None or not torch.is_grad_enabled() or unit in self._kept_units:
            return impl(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        started = time.perf_counter()
        cost = CallCost(unit, self._num_calls[unit], sum(map(_size_bytes, leaves)))
        self._num_calls[unit] += 1
        self._calls.append(cost)
        if self._kept(cost) or not self._replayable(unit, module, leaves):
            result = impl(*args, **kwargs)
        else:
            result = self._drop(unit, module, impl, leaves, spec, cost)
        cost.forward_s = time.perf_counter() - started
        return result

    def _drop(
        self, unit: str, module: nn.Module, impl: Callable[..., Any], leaves: list[Any], spec: TreeSpec, cost: CallCost
    ) -> Any:
        first_time = unit not in self._volatile
        # Noted once the first run has succeeded: a run that fails has shown nothing of what the unit changes.
        volatile = self._volatile.get(unit, {n for n, _ in _buffers(module)})
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        devices = sorted({p.device for p in [*self._parameters[:1], *tensors]}, key=str)
        # A sharded unit gathers into its parameters and lets go of them again: they have no version to rely on.
        externals = NonBoundaryInputs.of([] if _is_sharded(module) else list(module.parameters()))
        step = _ModuleBlock(unit, module, impl, spec, externals=externals, devices=devices, volatile=volatile)
        autocast = autocast_now(device_type_of(devices))
        run = Run(
            _REPLAYED,
            externals,
            devices=devices,
            autocast=autocast,
            holds=first_time,
            checks=self._config.check,
        )
        self._runs.append(run)
        before = python_state(module) if first_time else None
        run.begin(leaves)
        run.sweep(step, list(leaves))
        result, step.result = step.result, None
        cost.is_dropped = True
        cost.saved_bytes = run.dropped_bytes(0, tree_flatten(result)[0])
        if first_time:
            changed = step.changed_buffers()
            self._volatile[unit] = changed
            step.forget_buffers_but(changed)
            attributes = [] if before is None else changed_state(before, python_state(module))
            if attributes:
                self._keep(unit, module, attributes)
            else:
                run.let_go()
        cost.guard_bytes = step.guard_bytes
        return result

    def _keep(self, unit: str, module: nn.Module, attributes: Sequence[str]) -> None:
        """Leave a unit alone from now on. Its first call still holds what it saved, and is no block of the plan."""
        self._kept_units.add(unit)
        if self._calls is not None:
            self._calls.pop()
        if type(module) not in self._kept_kinds:  # once for all layers of a kind
            self._kept_kinds.add(type(module))
            warnings.warn(
                f"`{self._name}.{unit}` (`{type(module).__name__}`) is kept, as if marked by `tbp.keep`: its forward "
                f"changes `{attributes[0]}`, and a replay would change it again.",
                HCBWarning,
                stacklevel=2,
            )

    def _kept(self, call: CallCost) -> bool:
        place = self._book.place(call)
        return self.controller is not None and place is not None and self.controller.script.kept[place]

    def _replayable(self, unit: str, module: nn.Module, leaves: list[Any]) -> bool:
        odd = [t for t in leaves if not isinstance(t, (torch.Tensor, *_PLAIN_DATA))]
        if not odd and not synchronises_ranks(module):
            return True
        if unit not in self._warned:
            self._warned.add(unit)
            why = (
                f"gets a `{type(odd[0]).__name__}`, which a replay might change again" if odd else "synchronises ranks"
            )
            warnings.warn(f"`{self._name}.{unit}` is not replayed: it {why}.", HCBWarning, stacklevel=2)
        return False


class _Interceptor:
    """Stands in a unit's `_compiled_call_impl`."""

    def __init__(self, owner: ModuleSteps, name: str, module: nn.Module, impl: Callable[..., Any]) -> None:
        self._owner = owner
        self._name = name
        self._module = module
        self._impl = impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner.intercept(self._name, self._module, self._impl, args, kwargs)


def _size_bytes(leaf: Any) -> int:
    """The bytes of a tensor's elements, of a sparse one those it would have; 0 for anything else."""
    return leaf.numel() * leaf.element_size() if isinstance(leaf, torch.Tensor) else 0


def _buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.named_buffers())
