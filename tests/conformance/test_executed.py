"""Does the table of executed plans judge bytes and bits, show seconds, and hold every outcome?"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import executed
from benchmarks.chains.shapes import uniform_chain
from benchmarks.executed import app
from benchmarks.executed_check import BelowMinimum, Execution, execute, first_difference, first_told
from benchmarks.executed_table import Executed, Row, Stopped, TooSmall, is_good, markdown_table
from tinybp_lightning.runtime.profile import PlanCounts, PlanReport
from tinybp_lightning.runtime.torch.explanation import Explanation
from tinybp_lightning.schedule import keep_all

_MIB = 2**20
_EXECUTION = Execution(
    model="unet",
    budget="30%",
    budget_bytes=100 * _MIB,
    plain_peak_bytes=300 * _MIB,
    predicted_peak_bytes=99 * _MIB,
    measured_peak_bytes=98 * _MIB,
    predicted_recompute_s=0.5,
    predicted_step_s=2.0,
    replays_s=(0.5, 0.6, 9.0),
    steps_s=(2.0, 2.1, 11.0),
    plain_steps_s=(1.5, 1.5, 1.5),
    num_blocks=8,
    num_kept=3,
    num_steps=5,
    first_difference="",
    load=1.5,
    num_cores=2,
)
_BELOW = BelowMinimum("unet", "15%", 50 * _MIB, 300 * _MIB, 60 * _MIB)


def _executed(**changes: object) -> Executed:
    return Executed("unet", "30%", asdict(_EXECUTION) | changes)


def test_a_good_row_shows_both_peaks_and_the_median_of_the_replays() -> None:
    table = markdown_table([_executed()])
    assert "1 runs: 0 with other bits, 0 over budget, 0 more than 3% from the predicted peak" in table
    row = "| unet | 30% | 100.00 | yes | 99.00 | 98.00 | 0.9899 | 0.9800 | 0.5000 | 0.6000 | 1.20 | yes |"
    assert row in table
    assert "had a load of 1.5 to 1.5." in table


@pytest.mark.parametrize(
    ("row", "counts", "cells"),
    [
        (_executed(measured_peak_bytes=100 * _MIB + 1), "1 over budget, 0 more than", "| 1.0000 ! |"),
        (_executed(measured_peak_bytes=96 * _MIB), "0 over budget, 1 more than", "| 0.9697 ! |"),
        (_executed(predicted_peak_bytes=95 * _MIB), "0 over budget, 1 more than", "| 1.0316 ! |"),
        (_executed(first_difference="step 2: the loss is 1"), "1 with other bits", "| no: step 2: the loss is 1 |"),
        (Stopped("unet", "30%", "KeyError: a | b"), "1 not finished", "| failed: KeyError: a \\| b |"),
    ],
)
def test_rows_that_break_a_promise_are_counted_and_marked(row: Row, counts: str, cells: str) -> None:
    table = markdown_table([row])
    assert counts in table
    assert cells in table
    assert not is_good(row)


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (_executed(predicted_recompute_s=0.01), "| 60.00 | yes |"),
        (_executed(predicted_recompute_s=0.0), "|  | yes |"),
        (_executed(load=5.0), "it was busy"),
        (_executed(measured_peak_bytes=100 * _MIB), "| 1.0000 | 0.5000 |"),
        (TooSmall("unet", "15%", asdict(_BELOW)), "| 50.00 | below the minimum: smallest is 60.00 MiB |"),
    ],
)
def test_seconds_and_refused_budgets_are_shown_and_break_no_promise(row: Row, cells: str) -> None:
    assert cells in markdown_table([row])
    assert is_good(row)


@pytest.mark.parametrize(
    ("second", "exit_code"),
    [(_EXECUTION, 0), (_BELOW, 0), (replace(_EXECUTION, measured_peak_bytes=101 * _MIB), 1), (None, 1)],
)
def test_one_broken_promise_among_the_rows_ends_the_program_with_1(
    second: Execution | BelowMinimum | None, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter([_EXECUTION, second, _EXECUTION])

    def run(_: str, arguments: Sequence[str], log: Path, *, timeout_s: float) -> str:
        result = next(results)
        if result is None:
            return f"timed out after {timeout_s:g} s ({log.name})"
        Path(arguments[arguments.index("--export") + 1]).write_text(json.dumps(asdict(result)))
        return ""

    monkeypatch.setattr(executed, "run_apart", run)
    export = tmp_path / "found.json"
    options = ["--model", "unet", "--budget", "70%", "--budget", "30%", "--budget", "min", "--export", str(export)]
    assert CliRunner().invoke(app, options).exit_code == exit_code
    assert len(json.loads(export.read_text())["rows"]) == 3
    assert "3 runs" in export.with_suffix(".md").read_text()
    assert export.with_suffix(".png").stat().st_size > 0


def test_a_run_that_raises_is_a_row(tmp_path: Path) -> None:
    export = tmp_path / "found.json"
    options = ["--model", "resnet", "--size", "tiny", "--budget", "plenty", "--export", str(export)]
    assert CliRunner().invoke(app, options).exit_code == 1
    (row,) = json.loads(export.read_text())["rows"]
    assert "BudgetError: `activation_budget='plenty'` cannot be read" in row["error"]


def test_a_tiny_recipe_keeps_its_promises(tmp_path: Path) -> None:
    """In processes of their own, as the benchmark does it: beside another model's leftovers a peak is not so exact."""
    export = tmp_path / "found.json"
    options = ["--model", "transformer", "--size", "tiny", "--budget", "50%", "--budget", "min"]
    assert CliRunner().invoke(app, [*options, "--export", str(export)]).exit_code == 0
    for row in json.loads(export.read_text())["rows"]:
        found = row["result"]
        assert 0 < found["num_kept"] < found["num_blocks"]
        assert found["measured_peak_bytes"] < 0.6 * found["plain_peak_bytes"]


def test_a_budget_that_no_plan_meets_is_told_with_the_smallest() -> None:
    found = execute("transformer", "tiny", "1%")
    assert isinstance(found, BelowMinimum)
    assert found.budget_bytes < found.smallest_bytes < found.plain_peak_bytes


def test_the_prediction_is_what_was_told_before_the_plan_was_measured() -> None:
    chain = uniform_chain(4)
    told = PlanReport("net", chain, keep_all(chain), 90, 80, 80, 0.0, 1.0, 4, "budget")
    corrected = replace(told, predicted_peak_bytes=85, reason="measured")
    explained = Explanation((), (corrected,), (PlanCounts("net", 1, 1, 0, 1, 0, 0, 0),))
    assert first_told([told, corrected], explained) is told


def test_the_first_gradient_whose_bits_differ_is_named() -> None:
    plain, ours = nn.Linear(2, 2), nn.Linear(2, 2)
    loss = torch.tensor(1.0)
    for parameter, other in zip(plain.parameters(), ours.parameters(), strict=True):
        parameter.grad, other.grad = torch.ones_like(parameter), torch.ones_like(other)
    assert first_difference(loss, plain, loss, ours) == ""
    assert "the loss is 2.0, plainly 1.0" in first_difference(loss, plain, loss * 2, ours)
    assert ours.bias.grad is not None
    ours.bias.grad[1] += 1e-7
    assert first_difference(loss, plain, loss, ours) == "the gradient of `bias` differs"
    ours.bias.grad = None
    assert first_difference(loss, plain, loss, ours) == "`bias` has a gradient in one of the two only"
