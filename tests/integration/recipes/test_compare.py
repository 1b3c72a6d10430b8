"""The programs as a user starts them, at the size made for tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.modes import Mode
from recipes.outcome import Failed, Finished, read_outcome

ROOT = Path(__file__).resolve().parents[3]


def run(module: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Start `module` from another folder, with the checkout on the path."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def finished(folder: Path, mode: Mode) -> Finished:
    outcome = read_outcome(folder / f"{mode.value}.json")
    assert isinstance(outcome, Finished)
    return outcome


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one comparison, with a peer and with ours."""
    folder = tmp_path_factory.mktemp("transformer")
    overrides = ("size=tiny", "mode=[checkpoint,hcb_eager]", "budget=60%", f"hydra.run.dir={folder / 'run'}")
    done = run("recipes.compare", *overrides, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_all_modes_see_the_same_data_and_checkpointing_trains_like_naive(transformer: tuple[Path, str]) -> None:
    out, _ = transformer
    naive, checkpoint = finished(out, Mode.naive), finished(out, Mode.checkpoint)
    assert checkpoint.data_sha256 == naive.data_sha256
    assert checkpoint.measurement.losses == naive.measurement.losses
    assert checkpoint.measurement.parameters_sha256 == naive.measurement.parameters_sha256
    assert checkpoint.measurement.activation_peak_bytes < naive.measurement.activation_peak_bytes


def test_hcb_trains_bit_for_bit_within_the_budget(transformer: tuple[Path, str]) -> None:
    out, _ = transformer
    naive, ours = finished(out, Mode.naive), finished(out, Mode.hcb_eager)
    assert ours.measurement.losses == naive.measurement.losses
    assert ours.measurement.gradients_sha256 == naive.measurement.gradients_sha256
    assert ours.measurement.parameters_sha256 == naive.measurement.parameters_sha256
    assert ours.measurement.activation_peak_bytes <= 0.6 * naive.measurement.activation_peak_bytes
    assert ours.prediction is not None
    assert ours.prediction.peak_bytes == pytest.approx(ours.measurement.activation_peak_bytes, rel=0.05)


def test_table_picture_and_folder_are_reported(transformer: tuple[Path, str]) -> None:
    out, shown = transformer
    assert (out / "table.md").read_text().count("\n| ") == 5
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"Written to {out}" in shown


@pytest.mark.parametrize("model", ["resnet", "unet"])
def test_other_models_train_and_a_mode_that_fails_does_not_stop_the_others(model: str, tmp_path: Path) -> None:
    overrides = (f"model={model}", "size=tiny", "mode=[hcb_eager]", "budget=100B", f"hydra.run.dir={tmp_path / 'run'}")
    done = run("recipes.compare", *overrides, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    failed = read_outcome(tmp_path / "run" / "hcb_eager.json")
    assert isinstance(failed, Failed)
    assert "BudgetTooSmallError" in failed.error
    assert finished(tmp_path / "run", Mode.naive).measurement.wall_s > 0.0
    assert "failed: " in (tmp_path / "run" / "table.md").read_text()


def test_help_names_the_modes_and_the_keys(tmp_path: Path) -> None:
    done = run("recipes.compare", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(mode.value in done.stdout for mode in Mode)
    assert "usage: python -m recipes.compare [model=...]" in done.stdout
    assert "num_layers:" in done.stdout


def test_benchmark_exports_medians(tmp_path: Path) -> None:
    export = tmp_path / "results" / "transformer.json"
    arguments = ("--trials", "2", "--size", "tiny", "--mode", "naive", "--export", str(export))
    done = run("benchmarks.mem_vs_time_transformer", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    exported: dict[str, Any] = json.loads(export.read_text())
    modes = {entry["mode"]: entry for entry in exported["modes"]}
    assert [len(entry["trials"]) for entry in modes.values()] == [2]
    assert modes["naive"]["activation_peak_bytes"] > 0
    assert modes["naive"]["wall_s"] == pytest.approx(sum(trial["wall_s"] for trial in modes["naive"]["trials"]) / 2)
    assert exported["config"]["model"]["name"] == "transformer"
    assert export.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| naive |" in export.with_suffix(".md").read_text()
