"""A known plan's file gives back the chain with all its costs, and the plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.graph.strategies_chain import chains
from tests.unit.schedule.chains_by_hand import pass_through_chain, transformer_chain, uniform_chain
from tinybp_lightning.errors import PlanFileError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule import Planner, keep_all
from tinybp_lightning.schedule.chain_json import chain_from_data, chain_to_data
from tinybp_lightning.schedule.measured import measured_plan, plain_peak_bytes
from tinybp_lightning.schedule.serialize import (
    _checksum,  # pyright: ignore[reportPrivateUsage]  # a forger would use it too
    chain_digest,
    load_measured_plan,
    measured_plan_from_json,
    measured_plan_to_json,
    plan_from_json,
    save_measured_plan,
)

CHAIN = replace(transformer_chain(2), tail_peak_bytes=5, tail_live_bytes=3, workspace_bytes=7)
ROOM_BYTES = 30 * 2**20
PLAN = Planner(CHAIN).plan(budget_bytes=ROOM_BYTES)
KNOWN = measured_plan(CHAIN, PLAN.schedule, headroom_bytes=ROOM_BYTES)
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
    assert chain_from_data(json.loads(json.dumps(chain_to_data(chain)))) == chain


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
        ({"schema_version": 99}, "update it"),
        ({"context": {"graph": "b", "device": "cpu"}}, "is not the present one"),
        ({"costs": None}, "`costs=None` is missing"),
        ({"costs": {}}, "`costs` has the fields `\\[\\]`"),
        ({"costs": _costs(surprise=1)}, "'surprise'"),
        ({"costs": _costs(blocks=3)}, "`costs.blocks=3` is not a list"),
        ({"costs": _costs(blocks=[3])}, "`costs.blocks\\[0\\]=3` is not an object"),
        ({"costs": _costs(blocks=[])}, "at least one block"),
        ({"costs": _costs(workspace_bytes=True)}, "`costs.workspace_bytes=True` is not of type `int`"),
        ({"costs": _costs(workspace_bytes=1.0)}, "`costs.workspace_bytes=1.0` is not of type `int`"),
        ({"costs": _costs(workspace_bytes=-1)}, "`workspace_bytes=-1`"),
        ({"costs": _costs(workspace_bytes=8)}, "another chain"),
        ({"costs": _costs(storage_bytes=["x" * 100])}, "`costs.storage_bytes\\[0\\]='x{59}..."),
        ({"budget_bytes": 1}, "exceeds `budget_bytes=1`"),
        ({"budget_bytes": "1"}, "not of type `int`"),
        ({"headroom_bytes": ROOM_BYTES}, "unknown fields"),
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


def test_neither_kind_of_file_passes_for_the_other() -> None:
    with pytest.raises(PlanFileError, match="unknown fields"):
        plan_from_json(TEXT, CHAIN, context=CONTEXT)


def test_plain_training_needs_no_workspace() -> None:
    assert plain_peak_bytes(pass_through_chain()) == plain_peak_bytes(replace(pass_through_chain(), workspace_bytes=0))


def test_everything_kept_is_known_without_a_planner() -> None:
    chain = uniform_chain(4)
    known = measured_plan(chain, keep_all(chain), headroom_bytes=100)
    assert known.plan.recompute_s == 0
    assert measured_plan_from_json(measured_plan_to_json(known)) == known


@pytest.mark.parametrize(
    ("headroom_bytes", "suits"),
    [(PLAN.peak_bytes - 1, False), (PLAN.peak_bytes, True), (ROOM_BYTES * 101 // 100, True), (2 * ROOM_BYTES, False)],
)
def test_a_plan_suits_the_room_it_was_made_for(headroom_bytes: int, suits: bool) -> None:
    assert KNOWN.suits(headroom_bytes) is suits
