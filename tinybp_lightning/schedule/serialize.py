"""How does a plan outlive its process? One JSON file with a schema version, believed only after full validation.

A file is read back only if its checksum holds, it is for this very chain, its schedule is legal, and playing it gives
the bytes and seconds it claims. Everything else (truncated, edited, foreign, newer) is a `PlanFileError` that says what
is wrong: the caller plans again. Writing is atomic, so two processes at once leave one whole file.

A *plan file* holds a plan for a chain that the reader has. A *known plan's* file holds the chain too, with everything
that was learned about it: its reader need not measure.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, cast

from tinybp_lightning.errors import PlanFileError, ScheduleError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.chain_json import chain_from_data, chain_to_data
from tinybp_lightning.schedule.measured import MeasuredPlan
from tinybp_lightning.schedule.notation import from_text, to_text
from tinybp_lightning.schedule.planner.planner import Plan
from tinybp_lightning.schedule.simulator import simulate

__all__ = [
    "SCHEMA_VERSION",
    "chain_digest",
    "load_measured_plan",
    "load_plan",
    "measured_plan_from_json",
    "measured_plan_to_json",
    "plan_from_json",
    "plan_to_json",
    "save_measured_plan",
    "save_plan",
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
}
_KNOWN_FIELDS: dict[str, type] = {**_FIELDS, "costs": dict}


def chain_digest(chain: Chain) -> str:
    """Return a name for `chain` that any change of a byte, a second or a storage changes; block names count too."""
    return hashlib.sha256(repr(chain).encode()).hexdigest()


def plan_to_json(plan: Plan, chain: Chain, *, context: Mapping[str, str] | None = None) -> str:
    """Return `plan` as JSON text.

    **Arguments:** `context`: what else the plan depends on, such as device and library versions; loading asks for the
    same.
    """
    return _sealed(_data_of(plan, chain, context))


def plan_from_json(text: str, chain: Chain, *, context: Mapping[str, str] | None = None) -> Plan:
    """Return the plan that `text` holds, if it is one for `chain`.

    **Arguments:** `context`: as it was given when the plan was written.

    **Raises:** `PlanFileError` that says what is wrong with the text.
    """
    return _plan_of(_payload(text, _FIELDS), chain, context)


def measured_plan_to_json(known: MeasuredPlan, *, context: Mapping[str, str] | None = None) -> str:
    """Return `known` as JSON text; see `plan_to_json`."""
    costs = chain_to_data(known.chain)
    return _sealed({**_data_of(known.plan, known.chain, context), "costs": costs})


def measured_plan_from_json(text: str, *, context: Mapping[str, str] | None = None) -> MeasuredPlan:
    """Return the known plan that `text` holds.

    **Raises:** `PlanFileError` that says what is wrong with the text.
    """
    payload = _payload(text, _KNOWN_FIELDS)
    chain = chain_from_data(payload["costs"])
    return MeasuredPlan(chain, _plan_of(payload, chain, context))


def save_plan(path: Path, plan: Plan, chain: Chain, *, context: Mapping[str, str] | None = None) -> None:
    """Write `plan` to `path`, wholly or not at all; folders are made as needed."""
    _write(path, plan_to_json(plan, chain, context=context))


def load_plan(path: Path, chain: Chain, *, context: Mapping[str, str] | None = None) -> Plan:
    """Return the plan in the file at `path`; see `plan_from_json`.

    **Raises:** `PlanFileError` when the file is not a valid plan for `chain`; `FileNotFoundError` when there is none.
    """
    return plan_from_json(_text_of(path), chain, context=context)


def save_measured_plan(path: Path, known: MeasuredPlan, *, context: Mapping[str, str] | None = None) -> None:
    """Write `known` to `path`, wholly or not at all; folders are made as needed."""
    _write(path, measured_plan_to_json(known, context=context))


def load_measured_plan(path: Path, *, context: Mapping[str, str] | None = None) -> MeasuredPlan:
    """Return the known plan in the file at `path`; see `measured_plan_from_json`.

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


def _payload(text: str, fields: Mapping[str, type]) -> dict[str, object]:
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
    for field, kind in fields.items():
        if type(payload.get(field)) is not kind:
            _refuse(f"`{field}={payload.get(field)!r}` is missing or not of type `{kind.__name__}`")
    if unknown := sorted(set(payload) - set(fields)):
        _refuse(f"it has the unknown fields `{unknown}`")
    if payload.pop("checksum") != _checksum(payload):
        _refuse("its `checksum` does not hold, so it was edited or damaged")
    return payload


def _checksum(payload: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _refuse(problem: str) -> NoReturn:
    raise PlanFileError(f"this plan file cannot be used: {problem}. Delete it, or plan again.")
