"""Does the conformance table hold every outcome, a crash and a timeout among them?"""

import json
from dataclasses import asdict
from pathlib import Path
from threading import Event

import pytest
from typer.testing import CliRunner

from benchmarks import conformance
from benchmarks.conformance import Checked, Stopped, app, markdown_table
from benchmarks.conformance_check import Conformity, Sameness
from benchmarks.zoo import Blocks

CONFORMITY = Conformity(
    architecture="net",
    executor="eager",
    budget="30%",
    budget_bytes=2**20,
    is_smallest=False,
    plain_peak_bytes=3 * 2**20,
    measured_peak_bytes=2**20,
    predicted_peak_bytes=2**20,
    sameness=Sameness(True, True, True, True, True, ""),
    num_steps=3,
    blocks=Blocks.GRAPH,
    num_blocks=8,
    num_kept=3,
    num_partial=0,
    replayed_blocks=5,
    advanced_blocks=0,
    out_of_order_blocks=0,
    recompute_share=0.25,
    plain_step_s=0.1,
    step_s=0.2,
    planning_s=1.0,
    warnings=(),
    named_bytes=(),
    first_step_cpu_s=1.0,
    time_ratio=2.0,
)


def _checked(**changes: object) -> Checked:
    fields = asdict(CONFORMITY) | {"blocks": "graph"} | changes
    return Checked("net", "eager", "30%", fields)


def test_a_good_row_says_yes_and_how_full_the_budget_is() -> None:
    table = markdown_table([_checked()])
    assert table.startswith("1 checks: 0 wrong, 0 over budget, 0 not finished.")
    assert "| net | eager | 30% | yes | 1.000 | 1.00 | 3.00 | 25% | 8 | 3 | graph |" in table


@pytest.mark.parametrize(
    ("row", "counts", "cells"),
    [
        (_checked(measured_peak_bytes=2**20 + 2**14), "0 wrong, 1 over budget, 0 not finished", "| 1.016 ! |"),
        (
            _checked(sameness=asdict(Sameness(True, False, True, False, True, "step 1: …"))),
            "1 wrong, 0 over budget, 0 not finished",
            "| no: gradients, parameters |",
        ),
        (_checked(is_smallest=True), "0 wrong, 0 over budget, 0 not finished", "| 30% * |"),
        (_checked(blocks=None), "0 wrong, 0 over budget, 0 not finished", "| none |"),
        (
            Stopped("net", "eager", "30%", "RuntimeError: a | b"),
            "0 wrong, 0 over budget, 1 not finished",
            "| failed: RuntimeError: a \\| b |",
        ),
    ],
)
def test_rows_that_are_not_good_are_counted_and_shown(row: Checked | Stopped, counts: str, cells: str) -> None:
    table = markdown_table([row])
    assert counts in table
    assert cells in table


def test_a_check_that_hangs_is_a_row_and_ends_the_program_with_1(tmp_path: Path) -> None:
    export = tmp_path / "found.json"
    options = ["--filter", "dlrm", "--budget", "60%", "--export", str(export), "--timeout-s", "1"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    (row,) = json.loads(export.read_text())["rows"]
    assert row["error"] == "timed out after 1 s"
    assert "1 not finished" in export.with_suffix(".md").read_text()


def test_rows_are_in_the_zoos_order_whichever_check_ends_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_ended = Event()

    def check_apart(name: str, *_: object) -> list[Stopped]:
        if name == "llama":
            assert second_ended.wait(timeout=60), "not two at once"
        else:
            second_ended.set()
        return [Stopped(name, "eager", "60%", "stopped")]

    monkeypatch.setattr(conformance, "_check_apart", check_apart)
    export = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["--filter", "llama", "--jobs", "2", "--export", str(export)])
    assert result.exit_code == 1
    written = json.loads(export.read_text())
    assert [row["architecture"] for row in written["rows"]] == ["llama", "llama_with_mask"]
    assert written["device"] == "cpu"


def test_a_check_that_raises_is_a_row_and_the_next_budget_is_still_checked(tmp_path: Path) -> None:
    export = tmp_path / "found.json"
    options = ["--filter", "dlrm", "--budget", "plenty", "--budget", "60%", "--export", str(export)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    failed, checked = json.loads(export.read_text())["rows"]
    assert "BudgetError: `activation_budget='plenty'` cannot be read" in failed["error"]
    assert checked["result"]["sameness"]["first_difference"] == ""


def test_a_filter_that_matches_nothing_names_what_there_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--filter", "resnext", "--export", str(tmp_path / "found.json")])
    assert result.exit_code == 2
    assert "resnext" in result.output
