"""Do public architectures train bit for bit within their budgets, and does their table say where one does not?

Each run trains this week's tenth of a fixed list; `python -m benchmarks.public_models` trains all.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import public_models
from benchmarks.conformance_check import Sameness
from benchmarks.public_models import THIS_WEEK, app, tenth_of
from benchmarks.public_models_check import cause_in, train
from benchmarks.public_models_configs import tiny_values
from benchmarks.public_models_list import listed
from benchmarks.public_models_table import HALF, SMALLEST, Row, Stopped, Trained, Untried, is_good, markdown_table
from tests.conformance.test_table import CONFORMITY

_QUICK = (
    "transformers/AlbertForMaskedLM",
    "transformers/BertForMaskedLM",
    "transformers/BloomForCausalLM",
    "transformers/ConvNextForImageClassification",
    "transformers/DistilBertForMaskedLM",
    "transformers/ElectraForMaskedLM",
    "transformers/GPT2LMHeadModel",
    "transformers/GPTNeoXForCausalLM",
    "transformers/LlamaForCausalLM",
    "transformers/MixtralForCausalLM",
    "transformers/OPTForCausalLM",
    "transformers/Qwen3ForCausalLM",
    "transformers/ResNetForImageClassification",
    "transformers/T5ForConditionalGeneration",
    "transformers/ViTForImageClassification",
    "transformers/WhisperForConditionalGeneration",
    "diffusers/AutoencoderKL",
    "diffusers/DiTTransformer2DModel",
    "diffusers/AutoencoderTiny",
    "diffusers/SD3Transformer2DModel",
)


@pytest.mark.parametrize("key", tenth_of(_QUICK, THIS_WEEK))
def test_this_weeks_tenth_trains_with_the_same_bits_within_its_budgets(key: str) -> None:
    *_, found = train(key)
    row = Trained("any", key, _as_json(found[HALF]), _as_json(found[SMALLEST]), found["is_repeatable"], found["cause"])
    assert row.first_difference == ""
    assert row.is_within_budget
    assert row.smallest["named_bytes"] == [row.smallest["budget_bytes"]]  # the budget named first was not refused
    assert all(result["first_step_cpu_s"] > 0 < result["time_ratio"] for result in row.results)


def _as_json(result: Any) -> Any:
    return json.loads(json.dumps(result, default=lambda member: member.value))


def test_each_week_chooses_a_tenth_and_every_name_is_chosen_in_some_week() -> None:
    weeks = [tenth_of(_QUICK, f"2026-W{week:02}") for week in range(1, 54)]
    assert all(len(chosen) == 2 for chosen in weeks)
    assert {name for chosen in weeks for name in chosen} == set(_QUICK)
    assert tenth_of(_QUICK, "2026-W49") == tenth_of(_QUICK, "2026-W49") != tenth_of(_QUICK, "2026-W50")


def test_the_list_is_long_and_its_names_are_unique() -> None:
    names = [model.key for model in listed()]
    assert len(set(names)) == len(names) >= 300
    assert set(_QUICK) <= set(names)


@pytest.mark.parametrize(
    ("values", "tiny"),
    [
        ({"hidden_size": 4096, "head_dim": 128, "hidden_act": "silu"}, {"hidden_size": 64, "head_dim": 16}),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ({"num_attention_heads": 32, "num_key_value_heads": 1}, {"num_attention_heads": 4}),
        (
            {"num_hidden_layers": 12, "layer_types": ["a"] * 5 + ["b"] + ["a"] * 6},
            {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "b"]},
        ),
        ({"vocab_size": 32000, "eos_token_id": 31999}, {"vocab_size": 256, "eos_token_id": 2}),
        ({"depths": [2, 2, 18, 2], "embed_dim": 96, "num_heads": [3, 6, 12, 24]},
         {"depths": [2, 2, 2, 2], "embed_dim": 32, "num_heads": [1, 2, 4, 8]}),
        ({"image_size": 224, "patch_size": 4}, {"image_size": 32}),
        (
            {"text_config": {"model_type": "text", "hidden_size": 4096, "hidden_act": "silu"}},
            {"text_config": {"model_type": "text", "hidden_size": 64, "hidden_act": "silu"}},
        ),
    ],
)  # fmt: skip
def test_a_configuration_becomes_tiny_and_keeps_what_it_is(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    assert tiny_values(values) == tiny


def _trained(**changes: Any) -> Trained:
    smallest = _as_json(asdict(CONFORMITY)) | {"named_bytes": [2**20]} | changes
    return Trained("library", "Net", _as_json(asdict(CONFORMITY)), smallest)


_STEPS = "`Net` cannot be traced as one graph (a | b). It is trained by module steps instead: ..."


def test_a_good_row_says_yes_and_how_small_it_can_be() -> None:
    table = markdown_table([_trained()])
    assert table.startswith(
        "1 architectures: 0 wrong, 0 over budget, 0 whose named budget was refused, 0 not finished;"
    )
    assert "- library: 1 architectures; 50 % is enough for 100%; steps of graphs 100%" in table
    assert "| library/Net | yes | 1.000 | 1.000 | 0.33 | 0 | graph |  | 1.0 | 2.00 | 2.00 |" in table
    assert is_good(_trained())


@pytest.mark.parametrize(
    ("row", "counts", "cells", "good"),
    [
        (_trained(measured_peak_bytes=2**20 + 2**14), "1 over budget", "| 1.016 ! |", False),
        (_trained(named_bytes=[1, 2, 3]), "1 whose named budget was refused", "| 2 ! |", False),
        (
            _trained(sameness=asdict(Sameness(True, False, True, True, True, "step 1: x"))),
            "1 wrong",
            "| no: step 1: x |",
            False,
        ),
        (
            replace(_trained(sameness=asdict(Sameness(True, False, True, True, True, "s"))), is_repeatable=False),
            "0 without a tiny configuration, 1 whose plain training differs from itself",
            "| no: s (plain training's differ too) |",
            True,
        ),
        (replace(_trained(), half=None), "50 % is enough for 0%", "| refused | 1.000 |", True),
        (replace(_trained(blocks="module", warnings=[_STEPS]), half=None), "- 1: a | b", "| module | a \\| b |", True),
        (Stopped("library", "Net", "killed by SIGSEGV"), "1 not finished", "| failed: killed by SIGSEGV |", False),
        (Untried("library", "Net", "no size"), "1 without a tiny", "| no tiny config: no size |", True),
    ],
)
def test_rows_that_are_not_good_are_counted_and_shown(row: Row, counts: str, cells: str, good: bool) -> None:
    table = markdown_table([row])
    assert counts in table
    assert cells in table
    assert is_good(row) is good


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--library", "keras"], "expected transformers, timm, diffusers"),
        (["--week", "2026-49"], "expected a year and a week"),
        (["--select", "*/ResNeXt9"], "--list prints them"),
    ],
)
def test_wrong_options_are_told_before_anything_is_trained(options: list[str], told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*options, "--export", str(tmp_path / "found.json")])
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_rows_are_exported_in_the_lists_order_and_a_bad_one_ends_the_program_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_ended = Event()

    def train_apart(key: str, *_: object) -> Row:
        if key.endswith("GPT2LMHeadModel"):
            assert second_ended.wait(timeout=60), "not two at once"
            return _trained()
        second_ended.set()
        return Stopped("transformers", "GPTNeoForCausalLM", "timed out after 1 s")

    monkeypatch.setattr(public_models, "_train_apart", train_apart)
    export = tmp_path / "found.json"
    options = ["--select", "*/GPT2LM*", "--select", "*/GPTNeoFor*", "--jobs", "2", "--export", str(export)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1, result.output
    written = json.loads(export.read_text())
    assert [row["kind"] for row in written["rows"]] == ["Trained", "Stopped"]
    assert "1 not finished" in export.with_suffix(".md").read_text()
    assert export.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (
            "A\n  Explanation: failed: f(x): got RuntimeError('Expected BF16')\n  Hint: y",
            "RuntimeError('Expected BF16')",
        ),
        ("B\n  # File 'x.py', line 2, in f, code: if x.sum() > 0:\n  Hint: y", "if x.sum() > 0:"),
        ("C\n  Developer debug context: call f\n", "call f"),
        ("D", ""),
    ],
)
def test_the_cause_is_the_error_or_the_line_of_code(message: str, cause: str) -> None:
    assert cause_in(message) == cause
