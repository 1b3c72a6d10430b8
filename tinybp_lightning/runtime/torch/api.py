"""Put a module under a byte budget (`hcb`, `attach`), and take it out again (`restore`).

`hcb` makes one module the target of one plan. `attach(discover=True)` takes a whole tree (a LightningModule): the
outermost modules that are called in training become the targets, with a plan each.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Never, TypeVar, cast

from torch import nn
from torch._dynamo import OptimizedModule

from tinybp_lightning.capture.torch.private import compiled_call_impl
from tinybp_lightning.config import (
    BudgetKind,
    CostsChoice,
    ExecutorChoice,
    HCBConfig,
    OnOomChoice,
    check_config,
    config_from,
    refuse_unknown_options,
)
from tinybp_lightning.errors import ConfigError, HCBWarning, UnsupportedModuleError
from tinybp_lightning.runtime.profile import Observer, PlanCounts, PlanReport, StepProfile, check_observers
from tinybp_lightning.runtime.torch.dispatcher import Dispatcher, Target, dispatcher_of
from tinybp_lightning.runtime.torch.gradient_watch import GradientWatch
from tinybp_lightning.runtime.torch.measure.memory_limit import OptimizerState
from tinybp_lightning.runtime.torch.refuse import refuse_other_than_module, refuse_unsupported

__all__ = ["Session", "attach", "hcb", "restore", "targets"]

M = TypeVar("M", bound=nn.Module)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Session:
    """The targets that `attach` has found so far, their profiles, and the way back (`detach`)."""

    def __init__(self, root: nn.Module, config: HCBConfig, observers: Sequence[Observer], *, discover: bool) -> None:
        self.config = config
        self._claimed: list[Dispatcher] = []
        # A loss or a metric has no parameters: it belongs to the code around a target.
        own = [m for m in root.modules() if not isinstance(m, _CONTAINERS) and next(m.parameters(), None) is not None]
        modules = own if discover else [root]
        is_counted = config.budget.kind is BudgetKind.MEMORY
        state = OptimizerState(root.parameters()) if is_counted else None  # the dispatchers hold the only references
        watch = GradientWatch(root)
        self._dispatchers = [Dispatcher(m, config, observers, self._claim, state, watch) for m in modules]

    def _claim(self, dispatcher: Dispatcher) -> None:
        """Make the outermost module that was called a target; the modules below it are parts of it."""
        self._claimed.append(dispatcher)
        _, *parts = dispatcher.module.modules()
        below = {id(m) for m in parts}
        for other in self._dispatchers:
            if id(other.module) in below:
                other.remove()
        self._dispatchers = [d for d in self._dispatchers if id(d.module) not in below]
        for inner in filter(None, map(dispatcher_of, parts)):
            warnings.warn(
                f"`hcb` was called on `{type(inner.module).__name__}`, which is part of "
                f"`{type(dispatcher.module).__name__}`: one plan covers both, under the outer module's budget.",
                HCBWarning,
                stacklevel=2,
            )
            inner.remove()

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets found so far, in order of their first call."""
        return tuple(d.target for d in self._claimed if d.target is not None)

    @property
    def profile(self) -> StepProfile | None:
        """The last finished step of the first target that has one; for the others, see `targets`."""
        return next((t.profile for t in self.targets if t.profile is not None), None)

    @property
    def reports(self) -> tuple[PlanReport, ...]:
        """The active plans."""
        return tuple(report for target in self.targets for report in target.reports)

    @property
    def counts(self) -> tuple[PlanCounts, ...]:
        """How many graphs and plans each target has had, and where the plans came from."""
        return tuple(target.counts for target in self.targets)

    def detach(self) -> None:
        """Put every forward back as it was. A second call does nothing."""
        for dispatcher in [*self._dispatchers, *self._claimed]:
            dispatcher.remove()
        self._dispatchers, self._claimed = [], []


def attach(
    root: nn.Module, *, config: HCBConfig | None = None, observers: Sequence[Observer] = (), discover: bool = False
) -> Session:
    """Put `root`, or with `discover` the outermost modules called in its training, under a budget.

    **Raises:** `UnsupportedModuleError` for what cannot be trained this way; `ConfigError` for options of a wrong type.
    """
    check_config(config)
    check_observers(observers)
    if not isinstance(cast(Any, discover), bool):
        raise ConfigError(f"`discover={discover!r}` has type {type(discover).__name__}: expected True or False.")
    _refuse_untrainable(root)
    if not discover:  # with `discover`, each target is checked when it is found: a part that is not trained may stay
        refuse_unsupported(root)
        if type(root).forward is nn.Module.forward and "forward" not in vars(root):
            shown = f"`{type(root).__name__}` has no forward of its own"
            raise UnsupportedModuleError(f"{shown}, so nothing calls it: pass the module that has one.")
    restore(root)
    _warn_of_compiled_parts(root)
    _take_over_checkpointing(root)
    return Session(root, config or HCBConfig(), observers, discover=discover)


def hcb(
    module: M,
    *,
    memory_budget: int | str | None = None,
    activation_budget: int | str | None = None,
    executor: ExecutorChoice = "auto",
    optimizer_state_bytes: int | None = None,
    on_oom: OnOomChoice = "replan",
    plan_cache: bool | str = True,
    check: bool = False,
    costs: CostsChoice = "seconds",
    observers: Sequence[Observer] = (),
    config: HCBConfig | None = None,
    **misspelt: Never,
) -> M:
    """Train `module` under a byte budget. Returns the same object; its state-dict keys do not change.

    **Arguments:** the options of `HCBConfig`, singly or as one `config`. `observers` are told of every plan and every
    finished step. A second call replaces the first.

    **Raises:** `BudgetError`, `ConfigError`, `UnsupportedModuleError` now; `BudgetTooSmallError` at the first training
    step, when the smallest feasible budget is known.
    """
    config = config_from(locals())
    refuse_unknown_options(misspelt, also_known=("config", "observers"))
    attach(module, config=config, observers=observers)
    return module


def restore(module: M) -> M:
    """Undo `hcb` on `module` and on all modules below it. Returns the same object, as it was before."""
    for dispatcher in _dispatchers_in(module):
        dispatcher.remove()
    return module


def targets(module: nn.Module) -> tuple[Target, ...]:
    """Return the targets at or below `module` that have been called in training."""
    return tuple(d.target for d in _dispatchers_in(module) if d.target is not None)


def _dispatchers_in(module: nn.Module) -> list[Dispatcher]:
    refuse_other_than_module(module)
    return [found for part in module.modules() if (found := dispatcher_of(part)) is not None]


def _refuse_untrainable(root: nn.Module) -> None:
    if isinstance(root, OptimizedModule):
        raise UnsupportedModuleError(
            f"`{type(root).__name__}` is the result of torch.compile: pass the module inside it, "
            'and use `executor="inductor"` to compile its blocks.'
        )
    refuse_other_than_module(root)
    if compiled_call_impl(root) is not None:
        raise UnsupportedModuleError(
            f"`{type(root).__name__}.compile()` was called: do not call it, "
            'and use `executor="inductor"` to compile blocks.'
        )
    if next(root.parameters(), None) is None:
        raise UnsupportedModuleError(
            f"`{type(root).__name__}` has no parameters, so there is no backward to save memory in: pass a model."
        )


def _warn_of_compiled_parts(root: nn.Module) -> None:
    """Warn of parts that the user compiled; an earlier `hcb` on `root` must be gone, as it uses the same attribute."""
    compiled = [m for m in root.modules() if isinstance(m, OptimizedModule) or compiled_call_impl(m) is not None]
    if compiled:
        message = (
            f"`{type(compiled[0]).__name__}` inside `{type(root).__name__}` is compiled: its blocks run under "
            'the chosen executor instead. Do not compile it, or use `executor="inductor"`.'
        )
        warnings.warn(message, HCBWarning, stacklevel=4)


def _take_over_checkpointing(root: nn.Module) -> None:
    """Switch off the model's own checkpointing: two schemes at once would replay everything twice."""
    is_enabled = any(getattr(m, "gradient_checkpointing", False) is True for m in root.modules())
    owner = next((m for m in root.modules() if hasattr(m, "gradient_checkpointing_disable")), None)
    if is_enabled and owner is not None:
        shown = f"`{type(owner).__name__}` had gradient checkpointing enabled"
        warnings.warn(f"{shown}. It is now disabled: the plan decides what to recompute.", HCBWarning, stacklevel=3)
        cast(Any, owner).gradient_checkpointing_disable()
