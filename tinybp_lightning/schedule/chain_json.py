"""How are a chain's costs written down, so that another process need not measure them again?

The fields of `Chain` and of what it is made of are read back by their annotations: exactly those fields, each of its
type, and in the end a chain that passes `verify_chain`. Everything else is a `PlanFileError`.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NewType, cast, get_args, get_origin, get_type_hints

from tinybp_lightning.errors import GraphError, PlanFileError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.verify import verify_chain

__all__ = ["chain_from_data", "chain_to_data"]


def chain_to_data(chain: Chain) -> dict[str, Any]:
    """Return `chain` as dictionaries, sequences, strings and numbers, which JSON can hold exactly."""
    return asdict(chain)


def chain_from_data(found: object) -> Chain:
    """Return the chain that `chain_to_data` wrote, after it went through JSON.

    **Raises:** `PlanFileError` that names the field that is missing, unknown, of another type, or against
    `verify_chain`.
    """
    chain = cast(Chain, _read(Chain, found, "costs"))
    try:
        verify_chain(chain)
    except GraphError as error:
        raise PlanFileError(f"this plan file cannot be used: its `costs` are no chain's: {error}") from error
    return chain


def _read(kind: Any, found: object, where: str) -> object:
    if isinstance(kind, NewType):
        return _read(kind.__supertype__, found, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(kind, found, where)
    if get_origin(kind) is tuple:
        if not isinstance(found, list):
            raise _wrong(where, found, "a list")
        (item,) = {*get_args(kind)} - {...}
        return tuple(_read(item, part, f"{where}[{i}]") for i, part in enumerate(cast(list[object], found)))
    allowed: tuple[type, ...] = (int, float) if kind is float else (cast(type, kind),)
    if type(found) not in allowed:
        raise _wrong(where, found, f"of type `{allowed[-1].__name__}`")
    return found


def _read_fields(kind: type, found: object, where: str) -> object:
    if not isinstance(found, Mapping):
        raise _wrong(where, found, "an object")
    values = cast(Mapping[str, object], found)
    wanted = [field.name for field in fields(kind)]
    if sorted(values) != sorted(wanted):
        raise PlanFileError(
            f"this plan file cannot be used: `{where}` has the fields `{sorted(values)}`, expected `{sorted(wanted)}`. "
            "Delete it, or plan again."
        )
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], values[name], f"{where}.{name}") for name in wanted})


def _wrong(where: str, found: object, expected: str) -> PlanFileError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return PlanFileError(
        f"this plan file cannot be used: `{where}={shown}` is not {expected}. Delete it, or plan again."
    )
