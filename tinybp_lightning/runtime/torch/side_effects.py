"""Find the Python state that a module's forward changes, by comparing what it can reach before and after a call.

A replay would change it a second time. We compare numbers, strings, containers of them and the attributes of objects:
in the module and all its parts, in their classes, and in what the classes' functions and the parts' hooks refer to by
closure or by global name. Of tensors we compare the version: one that is assigned anew is put back by `ModuleState`,
and buffers have their own guard. State in code that is not Python is not found here: the first replay is compared.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from tinybp_lightning.capture.torch.private import forward_hooks

__all__ = ["PythonState", "changed_state", "python_state", "referred_by"]

PythonState = Mapping[str, Any]

_MODULES_OWN = frozenset(vars(nn.Module()))
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, deque, set, frozenset)
_MAX_DEPTH = 4
_MAX_ITEMS = 1000
"""A longer container is data that the forward looks up, and comparing it would take longer than the forward."""
_OTHER = object()


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A tensor and its version; equal to another tensor's, and to its own while nothing changes it in place."""

    identity: int
    version: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor) and (self.identity != other.identity or self.version == other.version)

    __hash__ = None  # type: ignore[assignment]


def python_state(module: nn.Module) -> PythonState:
    """Return what the forward of `module` and its parts can reach, by name, as values that do not change later."""
    found: dict[str, Any] = {}
    functions: dict[FunctionType, None] = {}
    for path, part in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if type(part).__name__ == "FullyShardedDataParallel":  # settles its own state in its first forward
            continue
        prefix = f"{path}." if path else ""
        found |= {f"{prefix}{k}": _frozen(v, 0) for k, v in vars(part).items() if k not in _MODULES_OWN}
        functions |= dict.fromkeys(f for hook in forward_hooks(part) for f in _functions(hook))
        for kind in type(part).__mro__:
            if kind.__module__.startswith("torch."):
                continue
            for name, value in vars(kind).items():
                if isinstance(value, FunctionType):
                    functions[value] = None
                elif not name.startswith("__"):
                    found[f"{kind.__name__}.{name}"] = _frozen(value, 0)
    for function in functions:
        found |= {name: _frozen(value, 0) for name, value in _referred(function).items()}
    return found


def changed_state(before: PythonState, after: PythonState) -> list[str]:
    """Return the sorted names of what was changed, added or removed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name, _OTHER) != after.get(name, _OTHER))


def referred_by(hooks: Iterable[Any]) -> frozenset[str]:
    """Return the names, as `python_state` gives them, of what `hooks` refer to."""
    return frozenset(name for hook in hooks for f in _functions(hook) for name in _referred(f))


def _functions(hook: Any) -> list[FunctionType]:
    if isinstance(hook, MethodType):
        hook = hook.__func__
    return [hook] if isinstance(hook, FunctionType) else []


def _referred(function: FunctionType) -> dict[str, Any]:
    """Return the variables outside of `function` that its code names."""
    cells = zip(function.__code__.co_freevars, cast("tuple[CellType, ...]", function.__closure__ or ()), strict=True)
    found = {f"{function.__name__}:{name}": cell.cell_contents for name, cell in cells if not _is_empty(cell)}
    names, own = function.__code__.co_names, function.__globals__
    return found | {f"{function.__module__}.{name}": own[name] for name in names if name in own}


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _frozen(value: Any, depth: int) -> Any:
    if isinstance(value, _SCALARS):
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)  # so that NaN equals NaN
    if isinstance(value, torch.Tensor):
        return _OTHER if value.is_inference() else _Tensor(id(value), value._version)
    if depth == _MAX_DEPTH:
        return _OTHER
    if isinstance(value, _CONTAINERS):
        held = cast("Any", value)
        if len(held) > _MAX_ITEMS:
            return (type(held), len(held))
        if isinstance(value, dict):
            return (dict, [(_frozen(k, depth + 1), _frozen(v, depth + 1)) for k, v in held.items()])
        if isinstance(value, (set, frozenset)):
            return (type(held), sorted(map(repr, cast("Iterable[Any]", held))))
        return (type(held), [_frozen(v, depth + 1) for v in cast("Iterable[Any]", held)])
    if _has_plain_attributes(value):
        attributes: dict[str, Any] = value.__dict__
        return (type(value), [(name, _frozen(part, depth + 1)) for name, part in attributes.items()])
    return _OTHER


def _has_plain_attributes(value: Any) -> bool:
    """Return whether an object is one of the user's that holds state: no module, no code, nothing with a resource."""
    kind = cast("type[Any]", type(value))
    if isinstance(value, (nn.Module, type, FunctionType, MethodType)) or not hasattr(value, "__dict__"):
        return False
    is_foreign = kind.__module__.partition(".")[0] in (
        "torch",
        "builtins",
        "logging",
        "threading",
        "numpy",
        "types",
        "tinybp_lightning",
    )
    return not is_foreign and kind.__reduce_ex__ is object.__reduce_ex__
