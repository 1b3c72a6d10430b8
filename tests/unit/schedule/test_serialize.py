"""A measured plan's file gives back the chain with all its costs, and the plan."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.graph.strategies_chain import chains
from tests.unit.schedule.chains_by_hand import pass_through_chain, transformer_chain, uniform_chain
from tinybp_lightning.errors import PlanFileError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule import Planner, keep_all
from tinybp_lightning.schedule.measured import measured_plan, plain_peak_bytes
from tinybp_lightning.schedule.serialize import (
    SCHEMA_VERSION,
    _checksum,  # pyright: ignore[reportPrivateUsage]  # a forger would use it too
    chain_digest,
    chain_from_data,
    load_measured_plan,
    measured_plan_from_json,
    measured_plan_to_json,
    save_measured_plan,
)

CHAIN = replace(transformer_chain(2), tail_peak_bytes=5, tail_live_bytes=3, unmodelled_bytes=7)
HEADROOM_BYTES = 30 * 2**20
PLAN = Planner(CHAIN).plan(budget_bytes=HEADROOM_BYTES)
KNOWN = measured_plan(CHAIN, PLAN.schedule, headroom_bytes=HEADROOM_BYTES)
CONTEXT = {"graph": "a", "device": "cpu"}
TEXT = measured_plan_to_json(KNOWN, context=CONTEXT)
DATA = json.loads(TEXT)


def _forged(**changes: object) -> str:
    payload = {**DATA, **changes}
    del payload["checksum"]
    return json.dumps({**payload, "checksum": _checksum(payload)})


def _costs(**changes: object) -> dict[str, object]:
    return {**DATA["costs"], **changes}


def test_reads_back_the_same_chain_and_plan() -> None:
    found = measured_plan_from_json(TEXT, context=CONTEXT)
    assert found == KNOWN
    assert found.plan == PLAN
    assert chain_digest(found.chain) == chain_digest(CHAIN)


@given(chains())
def test_any_chain_survives_json(chain: Chain) -> None:
    assert chain_from_data(json.loads(json.dumps(asdict(chain)))) == chain


def test_file_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "one.json"
    save_measured_plan(path, KNOWN, context=CONTEXT)
    assert load_measured_plan(path, context=CONTEXT) == KNOWN
    assert [entry.name for entry in path.parent.iterdir()] == ["one.json"]


@settings(max_examples=60)
@given(st.integers(0, len(TEXT) - 2))
def test_refuses_a_truncated_file(length: int) -> None:
    with pytest.raises(PlanFileError, match="cannot be used"):
        measured_plan_from_json(TEXT[:length], context=CONTEXT)


@settings(max_examples=200)
@given(st.integers(0, len(TEXT) - 1), st.characters(min_codepoint=32, max_codepoint=126))
def test_one_changed_letter_is_refused_or_changes_nothing(position: int, letter: str) -> None:
    try:
        found = measured_plan_from_json(TEXT[:position] + letter + TEXT[position + 1 :], context=CONTEXT)
    except PlanFileError:
        return
    assert found == KNOWN


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "update it"),
        ({"schema_version": SCHEMA_VERSION - 1}, "older"),
        ({"schema_version": True}, "schema_version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"chain": "0" * 64}, "another chain"),
        ({"schedule": "K0 X1"}, "`X1` is not an action"),
        ({"schedule": ""}, "not legal"),
        ({"schedule": 3}, "not of type `str`"),
        ({"num_blocks": -1}, "not legal"),
        ({"peak_bytes": PLAN.peak_bytes - 1}, "playing its schedule gives"),
        ({"total_s": PLAN.total_s / 2}, "playing its schedule gives"),
        ({"surprise": 1}, "`file` has the fields .*'surprise'"),
        ({"certificate": {}}, "`file` has the fields .*'certificate'"),
        ({"context": {"graph": "b", "device": "cpu"}}, "is not the present one"),
        ({"costs": None}, "`costs=None` is not of type `dict`"),
        ({"costs": {}}, "`costs` has the fields `\\[\\]`"),
        ({"costs": _costs(surprise=1)}, "'surprise'"),
        ({"costs": _costs(blocks=3)}, "`costs.blocks=3` is not a list"),
        ({"costs": _costs(blocks=[3])}, "`costs.blocks\\[0\\]=3` is not an object"),
        ({"costs": _costs(blocks=[])}, "at least one block"),
        ({"costs": _costs(unmodelled_bytes=True)}, "`costs.unmodelled_bytes=True` is not of type `int`"),
        ({"costs": _costs(unmodelled_bytes=1.0)}, "`costs.unmodelled_bytes=1.0` is not of type `int`"),
        ({"costs": _costs(unmodelled_bytes=-1)}, "`unmodelled_bytes=-1`"),
        ({"costs": _costs(unmodelled_bytes=8)}, "another chain"),
        ({"costs": _costs(storage_bytes=["x" * 100])}, "`costs.storage_bytes\\[0\\]='x{59}..."),
        ({"budget_bytes": 1}, "exceeds `budget_bytes=1`"),
        ({"budget_bytes": "1"}, "not of type `int`"),
        ({"headroom_bytes": HEADROOM_BYTES}, "`file` has the fields .*'headroom_bytes'"),
        ({"schedule": "K0 B0"}, "not legal"),
        ({"recompute_s": 0.0}, "playing its schedule gives"),
    ],
)
def test_refuses_even_a_careful_forgery(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(PlanFileError, match=problem):
        measured_plan_from_json(_forged(**changes), context=CONTEXT)


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(PlanFileError, match="not whole JSON"):
        measured_plan_from_json('{"schema_version": ' + "9" * 5000 + "}", context=CONTEXT)


def test_plain_training_needs_no_workspace() -> None:
    assert plain_peak_bytes(pass_through_chain()) == plain_peak_bytes(replace(pass_through_chain(), unmodelled_bytes=0))


def test_everything_kept_is_known_without_a_planner() -> None:
    chain = uniform_chain(4)
    known = measured_plan(chain, keep_all(chain), headroom_bytes=100)
    assert known.plan.recompute_s == 0
    assert measured_plan_from_json(measured_plan_to_json(known)) == known


@pytest.mark.parametrize(
    ("headroom_bytes", "suits"),
    [
        (PLAN.peak_bytes - 1, False),
        (PLAN.peak_bytes, True),
        (HEADROOM_BYTES * 101 // 100, True),
        (2 * HEADROOM_BYTES, False),
    ],
)
def test_a_plan_suits_the_headroom_it_was_made_for(headroom_bytes: int, suits: bool) -> None:
    assert KNOWN.suits(headroom_bytes) is suits


def test_no_file_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_measured_plan(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", "[" * 100_000, '{"schema_version": 1}', "not json"])
def test_refuses_foreign_files(text: str) -> None:
    with pytest.raises(PlanFileError, match="cannot be used"):
        measured_plan_from_json(text, context=CONTEXT)


def test_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="not text"):
        load_measured_plan(path)


def test_refuses_an_edited_file_by_its_checksum() -> None:
    with pytest.raises(PlanFileError, match="`checksum` does not hold"):
        measured_plan_from_json(TEXT.replace('"device": "cpu"', '"device": "gpu"'), context=CONTEXT)


def test_digest_changes_with_any_cost() -> None:
    chain = uniform_chain(2)
    block = replace(chain.blocks[0], forward_s=1.5)
    digests = {
        chain_digest(chain),
        chain_digest(replace(chain, unmodelled_bytes=1)),
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
        "from tinybp_lightning.schedule.measured import measured_plan\n"
        "from tinybp_lightning.schedule.serialize import load_measured_plan, save_measured_plan\n"
        "chain = uniform_chain(4); path = Path(sys.argv[1]); schedule = Planner(chain).plan(budget_bytes=7).schedule\n"
        "known = measured_plan(chain, schedule, headroom_bytes=7)\n"
        "for _ in range(100): save_measured_plan(path, known); assert load_measured_plan(path) == known\n"
    )
    root = Path(__file__).parents[3]
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
