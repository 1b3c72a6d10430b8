from pathlib import Path

import pytest

from recipes.modes import Mode
from recipes.outcome import Failed, Finished, Outcome, median_outcome, read_outcome, write_outcome
from tests.unit.recipes.outcomes import MIB, finished


@pytest.mark.parametrize(
    "outcome",
    [finished(Mode.naive), finished(Mode.hcb_eager), Failed(Mode.compile, "RuntimeError: no", "compile.log")],
    ids=["finished", "predicted", "failed"],
)
def test_json_holds_an_outcome(outcome: Outcome, tmp_path: Path) -> None:
    write_outcome(outcome, tmp_path / "one.json")
    assert read_outcome(tmp_path / "one.json") == outcome


def test_medians_over_trials() -> None:
    trials = [finished(Mode.naive, wall_s=wall_s, peak_mib=peak) for wall_s, peak in ((3, 10), (1, 30), (2, 20))]
    found = median_outcome(trials)
    assert isinstance(found, Finished)
    assert (found.measurement.wall_s, found.measurement.activation_peak_bytes) == (2, 20 * MIB)
    assert found.measurement.step_walls_s == (3, 1, 2)
    assert found.measurement.timeline == trials[0].measurement.timeline


def test_one_failed_trial_is_a_failure() -> None:
    failed = Failed(Mode.naive, "killed by SIGKILL", "")
    assert median_outcome([finished(Mode.naive), failed]) is failed


def test_no_trials_is_an_error() -> None:
    with pytest.raises(ValueError, match="`trials` is empty"):
        median_outcome([])
