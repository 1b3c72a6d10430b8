"""Take the arguments of a call apart, so that a replay is given equal ones of its own.

The first run gets the caller's own objects: what it changes in a dictionary is the caller's to see. A replay gets
copies of the containers as they were before the first run. Where one object was given twice, it is given twice again.
"""

import copy
import enum
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

__all__ = ["CallArguments"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum, slice)
_CODE = (FunctionType, MethodType, type, nn.Module)
_MAX_DEPTH = 8

_Build = Callable[[Sequence[Any], dict[int, Any]], Any]
"""Makes a value from the leaves; the dictionary holds what was made already, by the identity of the original."""


@dataclass
class CallArguments:
    """The arguments of one call. `leaves`: their tensors, each once; `odd`: what cannot be given again."""

    leaves: list[Any] = field(default_factory=list[Any])
    odd: list[Any] = field(default_factory=list[Any])
    _places: dict[int, int] = field(default_factory=dict[int, int])
    _build: _Build | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "CallArguments":
        """Take the arguments of a call apart."""
        made = cls()
        made._build = made._take((args, kwargs), 0)
        made._places.clear()  # identities hold while the caller's objects live
        return made

    def again(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for a replay, with `leaves` in place of the tensors."""
        assert self._build is not None, "made by `of`"
        return self._build(leaves, {})

    def _take(self, value: Any, depth: int) -> _Build:
        kind: Any = value.__class__
        if issubclass(kind, torch.Tensor):
            return self._take_tensor(value, depth)
        if issubclass(kind, _PLAIN):
            return _same(value)
        if kind in (list, tuple, dict) and depth < _MAX_DEPTH:
            return _once(id(value), self._take_container(value, depth))
        if issubclass(kind, tuple) and hasattr(value, "_fields"):
            return _namedtuple(kind, [self._take(item, depth + 1) for item in value])
        if depth < _MAX_DEPTH and _can_copy(value):
            return _once(id(value), self._take_object(value, depth))
        if issubclass(kind, (set, frozenset)) and all(isinstance(v, _PLAIN) for v in value):
            then = copy.copy(value)
            return lambda leaves, made: copy.copy(then)
        self.odd.append(value)
        return _same(value)

    def _take_tensor(self, t: torch.Tensor, depth: int) -> _Build:
        place = self._places.setdefault(id(t), len(self.leaves))
        if place == len(self.leaves):
            self.leaves.append(t)
        extra = vars(t)
        if not extra or depth >= _MAX_DEPTH or type(t) is not torch.Tensor:
            return lambda leaves, made: leaves[place]
        attributes = {name: self._take(value, depth + 1) for name, value in extra.items()}

        def build(leaves: Sequence[Any], made: dict[int, Any]) -> Any:
            t = leaves[place]
            vars(t).update({name: value(leaves, made) for name, value in attributes.items()})
            return t

        return build

    def _take_container(self, value: Any, depth: int) -> _Build:
        kind: Any = value.__class__
        if kind is dict:
            entries = [(self._take(k, depth + 1), self._take(v, depth + 1)) for k, v in value.items()]
            return lambda leaves, made: {k(leaves, made): v(leaves, made) for k, v in entries}
        items = [self._take(item, depth + 1) for item in value]
        return lambda leaves, made: kind(item(leaves, made) for item in items)

    def _take_object(self, value: Any, depth: int) -> _Build:
        """Take an object apart by its attributes, and by its entries if it is a dictionary of some kind."""
        kind: Any = value.__class__
        attributes = {name: self._take(part, depth + 1) for name, part in value.__dict__.items()}
        is_dict = issubclass(kind, dict)
        entries = {k: self._take(v, depth + 1) for k, v in (value.items() if is_dict else ())}
        base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
        key = id(value)

        def build(leaves: Sequence[Any], made: dict[int, Any]) -> Any:
            new = _blank(kind)
            made[key] = new  # it may refer to itself
            for name, part in entries.items():
                base.__setitem__(new, name, part(leaves, made))  # a class of one's own may set attributes too
            new.__dict__.update({name: part(leaves, made) for name, part in attributes.items()})
            return new

        return build


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)


def _namedtuple(kind: Any, items: Sequence[_Build]) -> _Build:
    return lambda leaves, made: kind(*(item(leaves, made) for item in items))


def _same(value: Any) -> _Build:
    return lambda leaves, made: value


def _once(key: int, build: _Build) -> _Build:
    """Make the object of one identity once."""

    def build_once(leaves: Sequence[Any], made: dict[int, Any]) -> Any:
        if key not in made:
            made[key] = build(leaves, made)
        return made[key]

    return build_once


def _can_copy(value: Any) -> bool:
    """Return whether an object is all in its attributes and entries: no code, and nothing that holds a resource."""
    kind = cast("type[Any]", type(value))
    if isinstance(value, _CODE) or not hasattr(value, "__dict__") or kind.__reduce_ex__ is not object.__reduce_ex__:
        return False
    has_slots = any(vars(c).get("__slots__") for c in kind.__mro__[:-1])
    return not has_slots and (kind.__new__ is object.__new__ or isinstance(value, dict))
