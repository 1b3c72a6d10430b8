"""Find the Python state that a module's forward changes, by comparing plain-data attributes before and after a call.

A replay would change them a second time. We compare numbers, strings and containers of them, in the module and in all
its parts. We do not compare tensors: buffers have their own guard, and weight parametrisations and sharding assign new
tensors in every forward. Changes to objects outside the module are not found.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

__all__ = ["PythonState", "changed_state", "python_state"]

PythonState = Mapping[str, Any]

_MODULES_OWN = frozenset(vars(nn.Module()))
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_MAX_DEPTH = 4
_OTHER = object()


def python_state(module: nn.Module) -> PythonState:
    """Return the plain-data attributes of `module` and its parts by name, as values that do not change later."""
    parts = cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
    return {
        f"{path}.{key}" if path else key: _frozen(value, 0)
        for path, part in parts
        if type(part).__name__ != "FullyShardedDataParallel"  # settles its own state in its first forward
        for key, value in vars(part).items()
        if key not in _MODULES_OWN
    }


def changed_state(before: PythonState, after: PythonState) -> list[str]:
    """Return the sorted names of attributes that were changed, added or removed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name, _OTHER) != after.get(name, _OTHER))


def _frozen(value: Any, depth: int) -> Any:
    if isinstance(value, _SCALARS):
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)  # so that NaN equals NaN
    if depth == _MAX_DEPTH:
        return _OTHER
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return (dict, tuple((_frozen(k, depth + 1), _frozen(v, depth + 1)) for k, v in items))
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        parts = (_frozen(v, depth + 1) for v in cast("Iterable[Any]", value))
        return (type(cast("Any", value)), frozenset(parts) if isinstance(value, (set, frozenset)) else tuple(parts))
    return _OTHER
