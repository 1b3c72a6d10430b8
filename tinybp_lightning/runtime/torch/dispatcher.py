"""Stand in a module's `forward` and send each call to the engine or to the module's own code.

A `Dispatcher` is an object of an importable class, so that `copy.deepcopy` and `pickle` of the module give one whose
forward runs its own weights under the same configuration. It is not a module, so state-dict keys do not change.

Note [Wrapped by others]
    Accelerate wraps `module.forward.__func__` and binds the result to the module, so that a copy of the module calls
    the wrapper with itself; where there is no `__func__`, it stores a closure, and a copy then trains the original. So
    a dispatcher has a `__func__`, which looks for the dispatcher of the module that it is called with. To unwrap,
    Accelerate follows `__wrapped__` down to a function: a dispatcher around such a wrapper shows it.
"""

import inspect
import itertools
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from tinybp_lightning.capture.torch.dynamo import Tracer
from tinybp_lightning.config import MAX_LIVE_GRAPHS, BudgetKind, HCBConfig
from tinybp_lightning.errors import CaptureError, HCBWarning
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.profile import Observer, PlanCounts, PlanReport, StepProfile
from tinybp_lightning.runtime.torch.cache.memory import PlanCache
from tinybp_lightning.runtime.torch.control_loop import ControlLoop, TargetContext
from tinybp_lightning.runtime.torch.controller import OutOfMemory
from tinybp_lightning.runtime.torch.gradient_watch import GradientWatch
from tinybp_lightning.runtime.torch.kept_modules import pinned_paths
from tinybp_lightning.runtime.torch.key_value_caches import KeyValueCaches
from tinybp_lightning.runtime.torch.measure.memory_limit import OptimizerState, TargetMemory
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending, stop_listening
from tinybp_lightning.runtime.torch.recovery.step_snapshot import StepSnapshot
from tinybp_lightning.runtime.torch.refuse import refuse_capture, refuse_unrepeatable, why_not_replayed
from tinybp_lightning.runtime.torch.step_calls import StepCalls
from tinybp_lightning.runtime.torch.submodules import ModuleSteps, is_sharded
from tinybp_lightning.runtime.torch.traced_module import TracedModule

__all__ = ["Dispatcher", "Target", "dispatcher_of"]

# As often as torch.compile traces a function before it gives up. A forward that is traced more often (because it counts
# steps in Python, say) would be traced and planned in every step.
_MAX_TRACES = 8
_OWN_KEY = "_tbp_dispatcher"
_numbers = itertools.count()


class Target:
    """One module trained under height-compressed backpropagation: its traced graphs, or its module steps."""

    def __init__(self, module: nn.Module, plain: Callable[..., Any], context: TargetContext) -> None:
        self.name = context.name
        self._module = module
        self._plain = plain
        self._context = context
        self._calls = StepCalls(context)
        self._live: OrderedDict[int, TracedModule] = OrderedDict()
        self._num_graphs = 0
        self._num_evicted = 0
        self._num_traces: Counter[tuple[str, ...]] = Counter()
        self._tracer = Tracer(plain, self._on_graph)
        self._caches = KeyValueCaches(module, plain, context.warn)
        has_sharded_units = any(is_sharded(part) for part in module.modules())
        self.module_steps = ModuleSteps(module, plain, context) if has_sharded_units else None
        self._last_used: ModuleSteps | TracedModule | None = self.module_steps

    @property
    def _control(self) -> ControlLoop | None:
        return None if self._last_used is None else self._last_used.control

    @property
    def profile(self) -> StepProfile | None:
        """The last finished step."""
        settle_pending()
        return None if self._last_used is None else self._last_used.profile

    @property
    def traced_modules(self) -> tuple[TracedModule, ...]:
        """The graphs that hold plans and pieces now, the one used last at the end; at most `MAX_LIVE_GRAPHS`."""
        return tuple(self._live.values())

    @property
    def counts(self) -> PlanCounts:
        """How many graphs and plans there were, and where the plans came from."""
        return self._context.plans.counts(
            self.name, num_graphs=self._num_graphs, num_live=len(self._live), num_evicted=self._num_evicted
        )

    @property
    def reports(self) -> tuple[PlanReport, ...]:
        """The plans in force, one per live graph, or per step of several calls."""
        controls = [used.control for used in (*self.traced_modules, self.module_steps) if used is not None]
        return tuple(control.report for control in dict.fromkeys(controls) if control is not None)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """What the live graphs compute."""
        return tuple(graph for traced in self.traced_modules if (graph := traced.graph) is not None)

    @property
    def active_plan(self) -> PlanReport | None:
        """The plan in force for the inputs last seen, if there is one."""
        return None if self._control is None else self._control.report

    @property
    def smallest_bytes(self) -> int:
        """The peak of the smallest plan for the inputs last seen; 0 where nothing is planned yet."""
        return 0 if self._control is None else self._control.smallest_bytes

    def tighten(self, share: float) -> bool:
        """Lower the peak of the plan for the inputs last seen by `share`, if a plan can, and cap all later ones."""
        (self._calls if self.module_steps is None else self.module_steps).forget()  # the step will be run again
        return self._control is not None and self._control.observe(OutOfMemory(share))

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one training forward."""
        with self._caches.left_out(kwargs):
            return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.module_steps is not None:
            return self.module_steps.call(args, kwargs)
        if max(self._num_traces.values(), default=0) > _MAX_TRACES:
            reason = "it is traced anew again and again for the same inputs, because a value that it reads changes"
            return self._by_module_steps(reason, args, kwargs)
        try:
            return self._tracer(*args, **kwargs)
        except CaptureError as error:  # raised while tracing, or while recording on fake tensors: no real op has run
            return self._by_module_steps(str(error).splitlines()[0], args, kwargs)

    def _by_module_steps(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        steps = ModuleSteps(self._module, self._plain, self._context)
        try:
            result = steps.call(args, kwargs)
        except BaseException:
            steps.remove()  # the forward itself raises (a wrong call, say), which is not a reason to give up tracing
            raise
        self.module_steps = self._last_used = steps
        warnings.warn(
            f"`{self.name}` cannot be traced as one graph ({reason}). It is trained by module steps instead: the same "
            "results, but whole submodules are the smallest blocks.",
            HCBWarning,
            stacklevel=2,
        )
        return result

    def close(self) -> None:
        """Remove what was installed in the module's parts, and in optimizers."""
        self._context.memory.optimizer_state = None
        if self.module_steps is not None:
            self.module_steps.remove()

    def _on_graph(self, module: fx.GraphModule) -> Callable[..., Any]:
        if not any(n.op in ("call_function", "call_method", "call_module") for n in module.graph.nodes):
            return module.forward  # it returns what it was given: there is nothing to keep or to replay
        self._num_traces[_inputs_of(module)] += 1
        number = self._num_graphs
        self._num_graphs += 1

        def run(*args: Any) -> Any:
            self._last_used = traced = self._traced_module(number, module)
            return traced(*args)

        return run

    def _traced_module(self, number: int, module: fx.GraphModule) -> TracedModule:
        """Return what trains graph `number`, made anew if it was evicted: Dynamo keeps the trace, without plans."""
        traced = self._live.pop(number, None)
        if traced is None:
            traced = TracedModule(module, self._context, self._calls, pinned_paths(self._module))
        self._live[number] = traced
        if len(self._live) > MAX_LIVE_GRAPHS:
            _, oldest = self._live.popitem(last=False)
            oldest.release()
            self._num_evicted += 1
        return traced


def _inputs_of(module: fx.GraphModule) -> tuple[str, ...]:
    """Describe the inputs of a traced graph, without the values that Dynamo has made constants."""
    examples = [n.meta.get("example_value") for n in module.graph.nodes if n.op == "placeholder"]
    return tuple(f"{tuple(t.shape)} {t.dtype} {t.requires_grad}" for t in examples if isinstance(t, torch.Tensor))


class Dispatcher:
    """Callable stored as `module.forward`.

    **Arguments:** `on_claim`: called with the dispatcher the first time it takes a training forward; `optimizer_state`:
    that of everything that is trained together with the module, if the budget counts it; `watch`: ended by a training
    forward.
    """

    # What a copy begins with.
    observers: tuple[Observer, ...] = ()
    target: Target | None = None
    step_snapshot: StepSnapshot | None = None  # kept from one `run_step` to the next
    _on_claim: "Callable[[Dispatcher], None] | None" = None
    _is_removed = False
    _is_trained_in_eval = False
    _reasons: tuple[str, ...] = ()  # for which a warning was given
    _optimizer_state: OptimizerState | None = None
    _watch: GradientWatch | None = None

    def __init__(
        self,
        module: nn.Module,
        config: HCBConfig,
        observers: Sequence[Observer] = (),
        on_claim: "Callable[[Dispatcher], None] | None" = None,
        optimizer_state: OptimizerState | None = None,
        watch: GradientWatch | None = None,
    ) -> None:
        self.module = module
        self.config = config
        self.observers = tuple(observers)
        self._number = next(_numbers)  # copies have the same
        self._own_forward: Callable[..., Any] | None = module.__dict__.get("forward")
        self._on_claim = on_claim
        self._optimizer_state = optimizer_state
        self._watch = watch
        module.__dict__["forward"] = module.__dict__[_OWN_KEY] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward: through the engine when it is trained, plainly otherwise."""
        # Compilers follow these lines: they must see the module's own code where nothing is trained.
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            settle_pending()
        if self._is_removed or not torch.is_grad_enabled() or (is_compiling and not self.module.training):
            if self._own_forward is not None:
                return self._own_forward(*args, **kwargs)
            own: Any = type(self.module).forward
            return own(self.module, *args, **kwargs)
        return self._train(args, kwargs)

    def _run_training(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._end_watch()
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        is_trained = any(p.requires_grad for p in self.module.parameters())
        if not is_trained and not (self.module.training and any(t.requires_grad for t in tensors)):
            return self.plain(*args, **kwargs)  # a frozen teacher has no backward to save memory in
        if not (self.module.training or self._is_trained_in_eval):
            return self._evaluate(args, kwargs)
        if (why := why_not_replayed(tensors)) is not None:
            self._warn_plain(why)
            return self.plain(*args, **kwargs)
        if self.target is None:
            refuse_unrepeatable(self.module)
            if self._optimizer_state is None and self.config.budget.kind is BudgetKind.MEMORY:
                self._optimizer_state = OptimizerState(self.module.parameters())  # the module was copied or unpickled
            name, memory = type(self.module).__name__, TargetMemory(self._optimizer_state)
            context = TargetContext(name, self.config, self.observers, memory, PlanCache(self.config))
            self.target = Target(self.module, self.plain, context)
            if self._on_claim is not None:
                self._on_claim(self)
        refuse_capture()
        return self.target.call(args, kwargs)

    # What compiles the caller runs into this, and leaves the rest to us.
    _train: Any = torch._dynamo.disable(_run_training, reason="the plan of `tbp.hcb` runs and compiles the blocks")

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run plainly, and notice whether this is training after all: a forward alone does not tell."""
        result = self.plain(*args, **kwargs)
        out = next((t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.grad_fn is not None), None)
        if out is not None and out.grad_fn is not None:
            out.grad_fn.register_prehook(self._note_trained_in_eval)
        return result

    def _note_trained_in_eval(self, _: Any) -> None:
        if not self._is_trained_in_eval:
            self._is_trained_in_eval = True
            self._warn_plain(
                "it is in `eval()` mode; as it was differentiated in this mode, it is planned from the next step on. "
                "Call `train()` on the model, and `eval()` on the parts (norms, dropout) that must not learn."
            )

    def _warn_plain(self, why: str) -> None:
        if why not in self._reasons:
            self._reasons = (*self._reasons, why)
            warnings.warn(
                f"`{type(self.module).__name__}` is trained plainly, and its budget is not enforced, where {why}",
                HCBWarning,
                stacklevel=2,
            )

    @property
    def plain(self) -> Callable[..., Any]:
        """The forward that was there before."""
        if self._own_forward is not None:
            return self._own_forward
        return MethodType(type(self.module).forward, self.module)

    @property
    def __func__(self) -> Callable[..., Any]:
        """The forward as a function of the module. See Note [Wrapped by others]."""

        # Compilers follow these lines too, in a copy whose own dispatcher was removed.
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is self.module:
                return self(*args, **kwargs)
            found = dispatcher_of(module)
            if found is not None and found._number == self._number:
                return found(*args, **kwargs)
            own: Any = type(module).forward if self._own_forward is None else self._own_forward
            if isinstance(own, MethodType):
                own = own.__func__
            elif self._own_forward is not None:
                return own(*args, **kwargs)  # a closure, which every copy shares without `hcb` too
            return own(module, *args, **kwargs)

        return forward

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The wrapper that this forward stands around, if there is one. See Note [Wrapped by others]."""
        if self._own_forward is None:
            raise AttributeError(f"`{type(self).__name__}` wraps the forward of a class")
        return self._own_forward

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def remove(self) -> None:
        """Put the module's forward back as it was."""
        self._is_removed = True  # whoever has wrapped the forward meanwhile still calls this object
        if self.module.__dict__.get(_OWN_KEY) is self:
            del self.module.__dict__[_OWN_KEY]
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self._own_forward is not None:
                self.module.__dict__["forward"] = self._own_forward
        if self.target is not None:
            self.target.close()
            self.target = None
        self._optimizer_state = None
        self._end_watch()
        stop_listening()

    def __getstate__(self) -> dict[str, Any]:
        # Plans, graphs and observers are left out: a copy plans for itself in its first step.
        kept = ("module", "config", "_number", "_own_forward", "_is_removed")
        return {name: getattr(self, name) for name in kept}


def dispatcher_of(module: nn.Module) -> Dispatcher | None:
    """Return the dispatcher of `module`, if there is one; something else may have been put around it."""
    found = module.__dict__.get(_OWN_KEY)
    return found if isinstance(found, Dispatcher) else None
