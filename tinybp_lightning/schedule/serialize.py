"""Write a measured plan to a file, and read one back after full validation.

The file is JSON with a schema version. It holds the plan and its chain with every measured cost, so the reader need not
measure again. The reader accepts it only if its checksum holds, its chain passes `verify_chain`, its schedule is legal,
and the simulator gets the bytes and seconds that it claims. Any other file raises a `PlanFileError` that says what is
wrong, and the caller plans again. Writing is atomic: of two processes that write at once, one leaves a whole file.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NewType, NoReturn, cast, get_args, get_origin, get_type_hints

from tinybp_lightning.errors import GraphError, PlanFileError, ScheduleError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.schedule.measured import MeasuredPlan
from tinybp_lightning.schedule.notation import from_text, to_text
from tinybp_lightning.schedule.planner.planner import Plan
from tinybp_lightning.schedule.simulator import simulate

__all__ = [
    "SCHEMA_VERSION",
    "chain_digest",
    "chain_from_data",
    "chain_to_data",
    "load_measured_plan",
    "measured_plan_from_json",
    "measured_plan_to_json",
    "save_measured_plan",
]

SCHEMA_VERSION = 3
"""Raised whenever a field is added, removed or changes its meaning."""

_FIELDS: dict[str, type] = {
    "schema_version": int,
    "chain": str,
    "context": dict,
    "budget_bytes": int,
    "schedule": str,
    "num_blocks": int,
    "peak_bytes": int,
    "total_s": float,
    "recompute_s": float,
    "checksum": str,
    "costs": dict,
}


def chain_digest(chain: Chain) -> str:
    """Return a name for `chain` that any change of a byte, a second or a storage changes; block names count too."""
    return hashlib.sha256(repr(chain).encode()).hexdigest()


def measured_plan_to_json(known: MeasuredPlan, *, context: Mapping[str, str] | None = None) -> str:
    """Return `known` as JSON text.

    **Arguments:** `context`: what else the plan depends on, such as device and library versions; the reader has to give
    the same.
    """
    costs = chain_to_data(known.chain)
    return _sealed({**_data_of(known.plan, known.chain, context), "costs": costs})


def measured_plan_from_json(text: str, *, context: Mapping[str, str] | None = None) -> MeasuredPlan:
    """Return the measured plan that `text` holds.

    **Raises:** `PlanFileError` that says what is wrong with the text.
    """
    payload = _payload(text)
    chain = chain_from_data(payload["costs"])
    return MeasuredPlan(chain, _plan_of(payload, chain, context))


def save_measured_plan(path: Path, known: MeasuredPlan, *, context: Mapping[str, str] | None = None) -> None:
    """Write `known` to `path`, wholly or not at all; folders are made as needed."""
    _write(path, measured_plan_to_json(known, context=context))


def load_measured_plan(path: Path, *, context: Mapping[str, str] | None = None) -> MeasuredPlan:
    """Return the measured plan in the file at `path`; see `measured_plan_from_json`.

    **Raises:** `PlanFileError` when the file holds no valid one; `FileNotFoundError` when there is none.
    """
    return measured_plan_from_json(_text_of(path), context=context)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanFileError(f"this plan file cannot be used: it is not text ({error}). Plan again.") from error


def _data_of(plan: Plan, chain: Chain, context: Mapping[str, str] | None) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "chain": chain_digest(chain),
        "context": dict(sorted((context or {}).items())),
        "budget_bytes": plan.budget_bytes,
        "schedule": to_text(plan.schedule),
        "num_blocks": plan.schedule.num_blocks,
        "peak_bytes": plan.peak_bytes,
        "total_s": float(plan.total_s),
        "recompute_s": float(plan.recompute_s),
    }


def _sealed(payload: Mapping[str, object]) -> str:
    return json.dumps({**payload, "checksum": _checksum(payload)}, indent=1, allow_nan=False) + "\n"


def _plan_of(payload: Mapping[str, object], chain: Chain, context: Mapping[str, str] | None) -> Plan:
    """Check what a well-formed file claims against `chain` and `context`."""
    if payload["chain"] != chain_digest(chain):
        _refuse("`chain` names another chain: the model, its costs or its cuts have changed")
    if payload["context"] != dict(context or {}):
        _refuse(f"`context={payload['context']}` is not the present one, `{dict(context or {})}`")
    try:
        schedule = from_text(cast(str, payload["schedule"]), num_blocks=cast(int, payload["num_blocks"]))
        timeline = simulate(chain, schedule)
    except ScheduleError as error:
        raise PlanFileError(f"this plan file cannot be used: its `schedule` is not legal: {error}") from error
    played = {
        "peak_bytes": timeline.peak_bytes,
        "total_s": timeline.total_s,
        "recompute_s": timeline.recompute_s,
    }
    for field, found in played.items():
        if payload[field] != found:
            _refuse(f"`{field}={payload[field]}`, but playing its schedule gives `{found}`")
    budget_bytes = cast(int, payload["budget_bytes"])
    if timeline.peak_bytes > budget_bytes:
        _refuse(f"`peak_bytes={timeline.peak_bytes}` exceeds `budget_bytes={budget_bytes}`")
    return Plan(schedule, budget_bytes, timeline.peak_bytes, timeline.total_s, timeline.recompute_s)


def _payload(text: str) -> dict[str, object]:
    """Check the text's form: JSON, version, fields, types and checksum."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain `ValueError`
        raise PlanFileError(f"this plan file cannot be used: it is not whole JSON ({error}). Plan again.") from error
    if not isinstance(found, dict):
        _refuse("it is JSON, but no object")
    payload = cast(dict[str, object], found)
    version = payload.get("schema_version")
    if type(version) is not int or version > SCHEMA_VERSION:
        _refuse(f"`schema_version={version}`, and this version of the package reads `{SCHEMA_VERSION}`: update it")
    if version < SCHEMA_VERSION:
        _refuse(f"`schema_version={version}` is older than `{SCHEMA_VERSION}`")
    for field, kind in _FIELDS.items():
        if type(payload.get(field)) is not kind:
            _refuse(f"`{field}={payload.get(field)!r}` is missing or not of type `{kind.__name__}`")
    if unknown := sorted(set(payload) - set(_FIELDS)):
        _refuse(f"it has the unknown fields `{unknown}`")
    if payload.pop("checksum") != _checksum(payload):
        _refuse("its `checksum` does not hold, so it was edited or damaged")
    return payload


def _checksum(payload: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _refuse(problem: str) -> NoReturn:
    raise PlanFileError(f"this plan file cannot be used: {problem}. Delete it, or plan again.")


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
        raise PlanFileError(f"this plan file cannot be used: its `costs` are not those of a chain: {error}") from error
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
