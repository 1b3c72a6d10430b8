"""A plan file gives back the same plan, or says why not: never a crash, never a wrong schedule."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.schedule.chains_by_hand import transformer_chain, uniform_chain
from tinybp_lightning.errors import PlanFileError
from tinybp_lightning.schedule import Planner
from tinybp_lightning.schedule.serialize import (
    SCHEMA_VERSION,
    _checksum,  # pyright: ignore[reportPrivateUsage]  # a forger would use it too
    chain_digest,
    load_plan,
    plan_from_json,
    plan_to_json,
    save_plan,
)

CHAIN = transformer_chain(2)
PLAN = Planner(CHAIN).plan(budget_bytes=30 * 2**20)
CONTEXT = {"device": "cpu", "torch": "2.13"}
TEXT = plan_to_json(PLAN, CHAIN, context=CONTEXT)


def _forged(**changes: object) -> str:
    """The file with fields changed and its checksum made to hold again."""
    payload = {**json.loads(TEXT), **changes}
    del payload["checksum"]
    return json.dumps({**payload, "checksum": _checksum(payload)})


def test_reads_back_the_same_plan() -> None:
    found = plan_from_json(TEXT, CHAIN, context=CONTEXT)
    assert found == PLAN


def test_file_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "one.json"
    save_plan(path, PLAN, CHAIN, context=CONTEXT)
    save_plan(path, PLAN, CHAIN, context=CONTEXT)
    assert load_plan(path, CHAIN, context=CONTEXT) == PLAN
    assert [entry.name for entry in path.parent.iterdir()] == ["one.json"]


def test_no_file_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none.json", CHAIN)


@settings(max_examples=60)
@given(st.integers(0, len(TEXT) - 2))
def test_refuses_a_truncated_file(length: int) -> None:
    with pytest.raises(PlanFileError, match="cannot be used"):
        plan_from_json(TEXT[:length], CHAIN, context=CONTEXT)


@settings(max_examples=200)
@given(st.integers(0, len(TEXT) - 1), st.characters(min_codepoint=32, max_codepoint=126))
def test_one_changed_letter_is_refused_or_changes_nothing(position: int, letter: str) -> None:
    edited = TEXT[:position] + letter + TEXT[position + 1 :]
    try:
        found = plan_from_json(edited, CHAIN, context=CONTEXT)
    except PlanFileError:
        return
    assert found == PLAN


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "update it"),
        ({"schema_version": 0}, "older"),
        ({"schema_version": True}, "schema_version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"chain": "0" * 64}, "another chain"),
        ({"context": {"device": "cuda"}}, "is not the present one"),
        ({"schedule": "K0 B0"}, "not legal"),
        ({"schedule": "K0 X1"}, "`X1` is not an action"),
        ({"schedule": ""}, "not legal"),
        ({"schedule": 3}, "not of type `str`"),
        ({"num_blocks": -1}, "not legal"),
        ({"peak_bytes": PLAN.peak_bytes - 1}, "playing its schedule gives"),
        ({"total_s": PLAN.total_s / 2}, "playing its schedule gives"),
        ({"recompute_s": 0.0}, "playing its schedule gives"),
        ({"budget_bytes": PLAN.peak_bytes - 1}, "exceeds `budget_bytes"),
        ({"surprise": 1}, "unknown fields `\\['surprise'\\]`"),
    ],
)
def test_refuses_even_a_careful_forgery(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(PlanFileError, match=problem):
        plan_from_json(_forged(**changes), CHAIN, context=CONTEXT)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", "[" * 100_000, '{"schema_version": 1}', "not json"])
def test_refuses_foreign_files(text: str) -> None:
    with pytest.raises(PlanFileError, match="cannot be used"):
        plan_from_json(text, CHAIN, context=CONTEXT)


def test_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="not text"):
        load_plan(path, CHAIN)


def test_refuses_an_edited_file_by_its_checksum() -> None:
    with pytest.raises(PlanFileError, match="`checksum` does not hold"):
        plan_from_json(TEXT.replace('"torch": "2.13"', '"torch": "2.14"'), CHAIN, context=CONTEXT)


def test_digest_changes_with_any_cost() -> None:
    chain = uniform_chain(2)
    block = replace(chain.blocks[0], forward_s=1.5)
    digests = {
        chain_digest(chain),
        chain_digest(replace(chain, workspace_bytes=1)),
        chain_digest(replace(chain, blocks=(block, chain.blocks[1]))),
        chain_digest(replace(chain, storage_bytes=(0, 1, 2))),
    }
    assert len(digests) == 4
    assert chain_digest(uniform_chain(2)) == chain_digest(chain)


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.unit.schedule.chains_by_hand import uniform_chain\n"
        "from tinybp_lightning.schedule import Planner\n"
        "from tinybp_lightning.schedule.serialize import load_plan, save_plan\n"
        "chain = uniform_chain(4); path = Path(sys.argv[1]); found = Planner(chain).plan(budget_bytes=7)\n"
        "for _ in range(100): save_plan(path, found, chain); assert load_plan(path, chain) == found\n"
    )
    root = Path(__file__).parents[3]
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
