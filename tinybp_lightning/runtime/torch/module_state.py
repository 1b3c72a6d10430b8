"""What did a module's parts hold when it ran? Attributes, weights, modes and hooks, put back around a replay.

Between a forward and its backward the user may take hooks off, switch to evaluation, or end a `functional_call` that
had put other weights in place. A replay finds everything as the first run did, and leaves no attribute changed.

Note [Hooks that only look]
    A hook that fires in a replay fires twice a step. One that returned nothing in the first run only looked: replays
    leave it out. One that returned something is needed, and runs again.
"""

import contextlib
import operator
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as nn_module

__all__ = ["ModuleState"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOK_TABLES = (
    *_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_SCALARS = (bool, int, float, complex, str, bytes)
_MODULES_OWN = frozenset(vars(nn.Module()))
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


@dataclass(slots=True)
class _Part:
    """One dictionary of a part: its attributes, or one of its tables."""

    owner: dict[str, Any]
    values: dict[str, Any]

    @classmethod
    def of(cls, owner: dict[str, Any]) -> "_Part":
        # The last step's output, left in an attribute, would keep that step's activations alive.
        return cls(owner, owner.copy())

    def is_in_place(self) -> bool:
        now, then = self.owner, self.values
        return len(now) == len(then) and all(map(operator.is_, now.values(), then.values()))

    def put(self) -> None:
        if not self.is_in_place():
            self.owner.clear()
            self.owner.update(self.values)


@dataclass(slots=True)
class ModuleState:
    """What every part of a module held at one moment; `observers`: the hooks that only looked (by table and key)."""

    modules: list[nn.Module]
    parts: list[_Part]
    hooks: list[_Part]
    observers: set[tuple[int, Any]] = field(default_factory=set[tuple[int, Any]])

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleState":
        """Note what the parts of `module` hold."""
        parts: list[_Part] = []
        modules = list(module.modules())
        hooks = [_Part.of(table) for name in _GLOBAL_HOOKS if (table := getattr(nn_module, name))]
        for part in modules:
            own = vars(part)
            attributes = _Part.of(own)
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    attributes.values[name] = None
            parts.append(attributes)
            for name in (*_TABLES, *_HOOK_TABLES):
                if table := own[name]:
                    (hooks if name in _HOOKS else parts).append(_Part.of(table))
        return cls(modules, parts, hooks)

    def changed(self) -> list[str]:
        """Return the attributes of plain data that were changed since, as far as a quick look shows."""
        return [
            name
            for part in self.parts
            if not part.is_in_place()
            for name, value in part.owner.items()
            if isinstance(value, _SCALARS) and name not in _MODULES_OWN and part.values.get(name, _SCALARS) != value
        ]

    @contextlib.contextmanager
    def watching_hooks(self) -> Generator[None]:
        """Find the hooks that only look while the body runs. See Note [Hooks that only look]."""
        if not self.hooks:
            yield
            return
        seen: dict[tuple[int, Any], bool] = {}
        for number, table in enumerate(self.hooks):
            for key, hook in table.values.items():
                table.owner[key] = _watched(hook, seen, (number, key))
        try:
            yield
        finally:
            for table in self.hooks:
                for key, hook in table.values.items():
                    if key in table.owner:
                        table.owner[key] = hook
            self.observers = {place for place, only_looked in seen.items() if only_looked}

    @property
    def looking_hooks(self) -> list[Callable[..., Any]]:
        """The hooks that only looked in the first run."""
        return [self.hooks[number].values[key] for number, key in self.observers]

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """Have the parts hold what they held, without the hooks that only looked; whatever they then hold is undone."""
        known = {id(part.owner) for part in (*self.parts, *self.hooks)}
        tables = [vars(module)[name] for module in self.modules for name in _HOOK_TABLES]
        tables += [getattr(nn_module, name) for name in _GLOBAL_HOOKS]
        new = [_Part(table, {}) for table in tables if table and id(table) not in known]
        before = [_Part.of(part.owner) for part in (*self.parts, *self.hooks, *new)]
        try:
            for part in (*self.parts, *new):
                part.put()
            for number, table in enumerate(self.hooks):
                table.put()
                for key in table.values:
                    if (number, key) in self.observers:
                        del table.owner[key]
            yield
        finally:
            for part in before:
                part.put()


def _watched(hook: Callable[..., Any], seen: dict[tuple[int, Any], bool], place: tuple[int, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        versions = _versions(args)
        result = hook(*args, **kwargs)
        only_looked = result is None and versions == _versions(args)
        seen[place] = seen.get(place, True) and only_looked
        return result

    return run


def _versions(args: Any) -> list[int]:
    found: list[int] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            found.append(-1 if value.is_inference() else value._version)
        elif isinstance(value, (list, tuple)):
            found += _versions(cast("Any", value))
        elif isinstance(value, dict):
            found += _versions(list(cast("dict[Any, Any]", value).values()))
    return found
