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
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NewType, cast, get_args, get_origin, get_type_hints

from tinybp_lightning.errors import GraphError, PlanFileError, ScheduleError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.schedule.measured import MeasuredPlan, measured_plan
from tinybp_lightning.schedule.notation import from_text, to_text

__all__ = [
    "SCHEMA_VERSION",
    "chain_digest",
    "chain_from_data",
    "load_measured_plan",
    "measured_plan_from_json",
    "measured_plan_to_json",
    "save_measured_plan",
]

SCHEMA_VERSION = 3
"""Raised whenever a field is added, removed or changes its meaning."""


@dataclass(frozen=True, slots=True)
class _PlanFile:
    """The fields of a file, without the checksum of them all."""

    schema_version: int
    chain: str
    context: dict[str, str]
    budget_bytes: int
    schedule: str
    num_blocks: int
    peak_bytes: int
    total_s: float
    recompute_s: float
    costs: dict[str, Any]


def chain_digest(chain: Chain) -> str:
    """Return a name for `chain` that any change of a byte, a second or a storage changes; block names count too."""
    return hashlib.sha256(repr(chain).encode()).hexdigest()


def measured_plan_to_json(known: MeasuredPlan, *, context: Mapping[str, str] | None = None) -> str:
    """Return `known` as JSON text; the reader has to give the same `context`, such as device and library versions."""
    plan = known.plan
    file = _PlanFile(
        schema_version=SCHEMA_VERSION,
        chain=chain_digest(known.chain),
        context=dict(sorted((context or {}).items())),
        budget_bytes=plan.budget_bytes,
        schedule=to_text(plan.schedule),
        num_blocks=plan.schedule.num_blocks,
        peak_bytes=plan.peak_bytes,
        total_s=float(plan.total_s),
        recompute_s=float(plan.recompute_s),
        costs=asdict(known.chain),
    )
    payload = asdict(file)
    return json.dumps({**payload, "checksum": _checksum(payload)}, indent=1, allow_nan=False) + "\n"


def measured_plan_from_json(text: str, *, context: Mapping[str, str] | None = None) -> MeasuredPlan:
    """Return the measured plan that `text` holds.

    **Raises:** `PlanFileError` that says what is wrong with the text.
    """
    file = cast(_PlanFile, _read(_PlanFile, _payload(text), ""))
    chain = chain_from_data(file.costs)
    if file.chain != chain_digest(chain):
        raise _unusable("`chain` names another chain: the model, its costs or its cuts have changed")
    if file.context != dict(context or {}):
        raise _unusable(f"`context={file.context}` is not the present one, `{dict(context or {})}`")
    try:
        schedule = from_text(file.schedule, num_blocks=file.num_blocks)
        found = measured_plan(chain, schedule, headroom_bytes=file.budget_bytes)
    except ScheduleError as error:
        raise _unusable(f"its `schedule` is not legal: {error}") from error
    plan = found.plan
    for field in ("peak_bytes", "total_s", "recompute_s"):
        if getattr(file, field) != getattr(plan, field):
            raise _unusable(
                f"`{field}={getattr(file, field)}`, but playing its schedule gives `{getattr(plan, field)}`"
            )
    if plan.peak_bytes > plan.budget_bytes:
        raise _unusable(f"`peak_bytes={plan.peak_bytes}` exceeds `budget_bytes={plan.budget_bytes}`")
    return found


def save_measured_plan(path: Path, known: MeasuredPlan, *, context: Mapping[str, str] | None = None) -> None:
    """Write `known` to `path`, wholly or not at all; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(measured_plan_to_json(known, context=context))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_measured_plan(path: Path, *, context: Mapping[str, str] | None = None) -> MeasuredPlan:
    """Return the measured plan in the file at `path`; see `measured_plan_from_json`.

    **Raises:** `PlanFileError` when the file holds no valid one; `FileNotFoundError` when there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unusable(f"it is not text ({error})") from error
    return measured_plan_from_json(text, context=context)


def _payload(text: str) -> dict[str, object]:
    """Return the fields of a whole file of this version whose checksum holds."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain `ValueError`
        raise _unusable(f"it is not whole JSON ({error})") from error
    if not isinstance(found, dict):
        raise _unusable("it is JSON, but not an object")
    payload = cast(dict[str, object], found)
    version = payload.get("schema_version")
    if type(version) is not int or version > SCHEMA_VERSION:
        raise _unusable(
            f"`schema_version={version}`, and this version of the package reads `{SCHEMA_VERSION}`: update it"
        )
    if version < SCHEMA_VERSION:
        raise _unusable(f"`schema_version={version}` is older than `{SCHEMA_VERSION}`")
    if payload.pop("checksum", None) != _checksum(payload):
        raise _unusable("its `checksum` does not hold, so it was edited or damaged")
    return payload


def _checksum(payload: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _unusable(problem: str) -> PlanFileError:
    return PlanFileError(f"this plan file cannot be used: {problem}. Delete it, or plan again.")


def chain_from_data(found: object) -> Chain:
    """Return the chain whose `asdict` went through JSON, which holds its numbers and strings exactly.

    **Raises:** `PlanFileError` that names the field that is missing, unknown, of another type, or against
    `verify_chain`.
    """
    chain = cast(Chain, _read(Chain, found, "costs"))
    try:
        verify_chain(chain)
    except GraphError as error:
        raise _unusable(f"its `costs` are not those of a chain: {error}") from error
    return chain


def _read(kind: Any, found: object, where: str) -> object:
    """Return `found`, which came from JSON, as a value of type `kind`; `where` names it in errors."""
    if isinstance(kind, NewType):
        kind = kind.__supertype__
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(kind, found, where)
    if get_origin(kind) is tuple:
        if not isinstance(found, list):
            raise _wrong(where, found, "a list")
        (item,) = {*get_args(kind)} - {...}
        return tuple(_read(item, part, f"{where}[{i}]") for i, part in enumerate(cast(list[object], found)))
    kind = get_origin(kind) or kind
    if type(found) is not kind and not (kind is float and type(found) is int):
        raise _wrong(where, found, f"of type `{kind.__name__}`")
    return found


def _read_fields(kind: type, found: object, where: str) -> object:
    if not isinstance(found, Mapping):
        raise _wrong(where, found, "an object")
    values = cast(Mapping[str, object], found)
    wanted = [field.name for field in fields(kind)]
    if sorted(values) != sorted(wanted):
        raise _unusable(f"`{where or 'file'}` has the fields `{sorted(values)}`, expected `{sorted(wanted)}`")
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    return kind(**{name: _read(hints[name], values[name], f"{prefix}{name}") for name in wanted})


def _wrong(where: str, found: object, expected: str) -> PlanFileError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return _unusable(f"`{where}={shown}` is not {expected}")
