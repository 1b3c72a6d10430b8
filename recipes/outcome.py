"""Define the outcome of training in one mode (a measurement or an error), and its JSON file."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recipes.forecast import Prediction
from recipes.measurement import Measurement, Versions
from recipes.modes import Mode
from recipes.timeline import Timeline

__all__ = ["Failed", "Finished", "Outcome", "median_outcome", "read_outcome", "write_outcome"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The mode trained. `source` names the network, `data_sha256` the batches; `setup_s` precedes the first step."""

    mode: Mode
    measurement: Measurement
    prediction: Prediction | None
    source: str
    data_sha256: str
    setup_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The mode failed: `error` is one line, `log` the path of the file with the rest."""

    mode: Mode
    error: str
    log: str


Outcome = Finished | Failed


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Write `outcome` as JSON; the mode is stored by name, and only a failed outcome has the key `error`."""
    path.write_text(json.dumps(asdict(outcome) | {"mode": outcome.mode.value}, indent=1) + "\n")


def read_outcome(path: Path) -> Outcome:
    """Return what `write_outcome` wrote.

    **Raises:** `KeyError` or `TypeError` when the file contains something else.
    """
    fields: dict[str, Any] = json.loads(path.read_text())
    mode = Mode(fields["mode"])
    if "error" in fields:
        return Failed(mode, fields["error"], fields["log"])
    predicted: dict[str, Any] | None = fields["prediction"]
    return Finished(
        mode=mode,
        measurement=_measurement(fields["measurement"]),
        prediction=None if predicted is None else _prediction(predicted),
        source=fields["source"],
        data_sha256=fields["data_sha256"],
        setup_s=fields["setup_s"],
    )


def _measurement(fields: dict[str, Any]) -> Measurement:
    parsed: dict[str, Any] = {
        "losses": tuple(fields["losses"]),
        "step_walls_s": tuple(fields["step_walls_s"]),
        "timeline": _timeline(fields["timeline"]),
        "versions": Versions(**fields["versions"]),
    }
    return Measurement(**(fields | parsed))


def _prediction(fields: dict[str, Any]) -> Prediction:
    return Prediction(fields["peak_bytes"], _timeline(fields["timeline"]), fields["summary"])


def _timeline(fields: dict[str, Any]) -> Timeline:
    return Timeline(tuple(fields["time_s"]), tuple(fields["live_bytes"]))


def median_outcome(trials: Sequence[Outcome]) -> Outcome:
    """Return one outcome for several trials of one mode: the first failure, or the medians of seconds and bytes.

    **Arguments:** `trials`: at least one, all of one mode.

    **Returns:** losses, digests and timelines are the first trial's.

    **Raises:** `ValueError` when `trials` is empty.
    """
    if not trials:
        raise ValueError("`trials` is empty: run at least one.")
    finished = [trial for trial in trials if isinstance(trial, Finished)]
    if len(finished) < len(trials):
        return next(trial for trial in trials if isinstance(trial, Failed))
    first = finished[0]
    measurements = [trial.measurement for trial in finished]
    reserved = [m.reserved_peak_bytes for m in measurements if m.reserved_peak_bytes is not None]
    return replace(
        first,
        measurement=replace(
            first.measurement,
            wall_s=statistics.median(m.wall_s for m in measurements),
            step_walls_s=tuple(wall_s for m in measurements for wall_s in m.step_walls_s),
            first_step_s=statistics.median(m.first_step_s for m in measurements),
            peak_bytes=statistics.median_low([m.peak_bytes for m in measurements]),
            activation_peak_bytes=statistics.median_low([m.activation_peak_bytes for m in measurements]),
            reserved_peak_bytes=statistics.median_low(reserved) if reserved else None,
        ),
    )
