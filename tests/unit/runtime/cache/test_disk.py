"""Plans on disk: the next process neither measures nor plans, and nothing that may lie in the folder does harm."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, assert_all_same, peak_bytes, residual_net, train
from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.errors import HCBWarning, PlanFileError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch import targets
from tinybp_lightning.runtime.torch.cache import disk
from tinybp_lightning.runtime.torch.cache.disk import DiskCache, cache_folder, open_cache
from tinybp_lightning.schedule.baselines import keep_all
from tinybp_lightning.schedule.measured import measured_plan
from tinybp_lightning.schedule.serialize import (
    _checksum,  # pyright: ignore[reportPrivateUsage]  # a forger would use it too
    chain_from_data,
)

ROOT = Path(__file__).parents[4]
KNOWN = measured_plan(uniform_chain(2), keep_all(uniform_chain(2)), headroom_bytes=100)
BUDGET_BYTES = 90_000
ROWS = torch.ones(64, 16)


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(ROWS).square().mean()


def trained(*, plan_cache: bool | str = True, budget: int | str = BUDGET_BYTES, **options: Any) -> tuple[Any, Recorder]:
    """Train a new model for three steps under the cache; return its target and what an observer heard."""
    recorder = Recorder()
    config = tbp.HCBConfig(activation_budget=budget, plan_cache=plan_cache)
    model = tbp.hcb(residual_net(**options), config=config, observers=[recorder])
    assert_all_same(train(model, square_loss), train(residual_net(**options), square_loss))
    (target,) = targets(model)
    return target, recorder


def files(folder: Path | None = None) -> list[Path]:
    return sorted(path for path in (folder or cache_folder()).glob("*") if path.is_file())


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_second_training_takes_the_first_ones_plan() -> None:
    first, _ = trained()
    assert (first.counts.num_measured, first.counts.num_cached) == (1, 0)
    (path,) = files()
    written = path.read_bytes()
    second, recorder = trained()
    assert (second.counts.num_measured, second.counts.num_cached) == (0, 1)
    assert second.reports[0].schedule == first.reports[0].schedule
    assert second.reports[0].chain == first.reports[0].chain
    assert second.reports[0].reason == "cached"
    # The first step runs the plan for the budget, is traced, and fits: the smallest plan is never run.
    assert recorder.profiles[0].measured_peak_bytes == second.reports[0].predicted_peak_bytes
    assert 0.5 * BUDGET_BYTES < recorder.profiles[0].measured_peak_bytes <= BUDGET_BYTES
    assert [p.measured_peak_bytes for p in recorder.profiles[1:]] == [None, None]
    assert files() == [path]
    assert path.read_bytes() == written


def test_measuring_and_planning_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured or planned, with a plan in the cache")

    monkeypatch.setattr("tinybp_lightning.runtime.torch.traced_module.measure_chain", refuse)
    monkeypatch.setattr("tinybp_lightning.runtime.torch.control_loop.Planner", refuse)
    target, _ = trained()
    assert target.counts.num_cached == 1


def test_switched_off_nothing_is_read_or_written() -> None:
    trained(plan_cache=False)
    assert files() == []
    trained()
    target, _ = trained(plan_cache=False)
    assert target.counts.num_measured == 1


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "plans"
    trained(plan_cache=str(folder))
    assert (len(files(folder)), files()) == (1, [])
    target, _ = trained(plan_cache=str(folder))
    assert target.counts.num_cached == 1


@pytest.mark.parametrize("options", [{"budget": BUDGET_BYTES + 1}, {"budget": "80%"}, {"dropout": 0.2}, {"depth": 5}])
def test_another_question_is_not_answered(options: dict[str, Any]) -> None:
    trained()
    options = {"depth": 4, **options}
    target, _ = trained(**options)
    assert target.counts.num_measured == 1
    assert len(files()) == 2


def test_a_plan_that_does_not_fit_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says that saved tensors take a quarter of what they do: the traced step knows better."""
    budget_bytes = 110_000
    target, _ = trained()
    chain = target.reports[0].chain
    blocks = (
        replace(b, options=tuple(replace(o, saved_bytes=o.saved_bytes // 4) for o in b.options)) for b in chain.blocks
    )
    light = replace(chain, blocks=tuple(blocks))
    lie = measured_plan(light, keep_all(light), headroom_bytes=budget_bytes)
    monkeypatch.setattr(DiskCache, "find", lambda *_: lie)
    target, recorder = trained(budget=budget_bytes)
    assert target.counts.num_cached == 1
    assert recorder.profiles[0].measured_peak_bytes is not None
    assert recorder.profiles[0].measured_peak_bytes > budget_bytes
    (report,) = target.reports
    assert report.reason == "measured"
    assert report.predicted_peak_bytes <= budget_bytes


def test_costs_that_no_budget_suits_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = trained()
    (report,) = target.reports
    heavy = replace(report.chain, unmodelled_bytes=10 * BUDGET_BYTES)
    known = measured_plan(heavy, keep_all(heavy), headroom_bytes=20 * BUDGET_BYTES)
    monkeypatch.setattr(DiskCache, "find", lambda *_: known)
    target, _ = trained()
    assert (target.counts.num_measured, target.counts.num_cached) == (1, 0)


# ---- what may lie there ----------------------------------------------------------------------------------------------


def _resealed(text: str, **changes: object) -> str:
    payload = {**json.loads(text), **changes}
    del payload["checksum"]
    return json.dumps({**payload, "checksum": _checksum(payload)})


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text[: len(text) // 2], "not whole JSON"),
        (lambda text: "", "not whole JSON"),
        (lambda text: text.replace("K0", "F0"), "`checksum` does not hold"),
        (lambda text: _resealed(text, schema_version=99), "update it"),
        (lambda text: _resealed(text, schedule="K0 B0"), "not legal"),
        (lambda text: _resealed(text, context={"graph": "foreign"}), "is not the present one"),
        (lambda text: "\0\0\0", "not whole JSON"),
        (lambda text: '{"torch": 1}', "`schema_version=None`"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_replaced(spoil: Any, problem: str) -> None:
    trained()
    (path,) = files()
    path.write_text(spoil(path.read_text()))
    with pytest.warns(HCBWarning, match=f"{path.name}` cannot be used.*{problem}") as caught:
        target, _ = trained()
    assert len(caught) == 1
    assert target.counts.num_measured == 1
    target, _ = trained()
    assert target.counts.num_cached == 1


def test_another_programs_chain_is_refused() -> None:
    """A file whose every check holds, for blocks of other names."""
    trained()
    (path,) = files()
    data = json.loads(path.read_text())
    for block in data["costs"]["blocks"]:
        block["name"] = "elsewhere"
    chain = chain_from_data(data["costs"])
    disk.save_measured_plan(path, measured_plan(chain, keep_all(chain), headroom_bytes=10**9), context=data["context"])
    with pytest.warns(HCBWarning, match="the `blocks` of its chain are not those of the program"):
        target, _ = trained()
    assert target.counts.num_measured == 1


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(HCBWarning) as caught:
        trained(plan_cache=str(tmp_path / "file" / "plans"))
    read, written = (str(warning.message) for warning in caught)
    assert "cannot be used, so the program is measured and planned again" in read
    assert "cannot be written" in written
    assert "`TINYBP_CACHE`" in written


# ---- the folder ------------------------------------------------------------------------------------------------------


def no_check(_: Chain) -> None:
    pass


def test_puts_and_finds(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "a" / "b")
    assert cache.find({"graph": "one"}, no_check) is None
    cache.put({"graph": "one"}, KNOWN)
    assert cache.find({"graph": "one"}, no_check) == KNOWN
    assert cache.find({"graph": "two"}, no_check) is None


def test_the_callers_check_is_heard(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put({"graph": "one"}, KNOWN)

    def refuse(chain: Chain) -> None:
        assert chain == KNOWN.chain
        raise PlanFileError("not mine")

    with pytest.warns(HCBWarning, match="not mine"):
        assert cache.find({"graph": "one"}, refuse) is None


def test_the_folder_stays_small_and_what_was_used_last_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path)
    contexts = [{"graph": str(i)} for i in range(6)]
    for age, context in enumerate(contexts[:5]):
        cache.put(context, KNOWN)
        os.utime(cache.path_of(context), (1000 + age, 1000 + age))
    size_bytes = cache.path_of(contexts[0]).stat().st_size
    assert cache.find(contexts[0], no_check) == KNOWN  # the oldest, but used just now
    monkeypatch.setattr(disk, "MAX_CACHE_BYTES", 3 * size_bytes)
    cache.put(contexts[5], KNOWN)
    left = [i for i, context in enumerate(contexts) if cache.path_of(context).exists()]
    assert left == [0, 4, 5]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_CACHE_BYTES", 0)
    for name in ("model.json", "notes.txt", ".hidden", "0" * 31 + ".json"):
        (tmp_path / name).write_text("mine")
    cache = DiskCache(tmp_path)
    dead, writing = (tmp_path / f".{'0' * 32}.json.{name}" for name in ("dead", "writing"))
    dead.write_text("")
    writing.write_text("")
    os.utime(dead, (1000, 1000))
    cache.put({"graph": "one"}, KNOWN)
    cache.put({"graph": "two"}, KNOWN)
    names = {path.name for path in files(tmp_path)}
    assert names == {
        "model.json",
        "notes.txt",
        ".hidden",
        "0" * 31 + ".json",
        writing.name,
        cache.path_of({"graph": "two"}).name,
    }


@pytest.mark.parametrize(
    ("environ", "platform", "folder"),
    [
        ({"TINYBP_CACHE": "/somewhere"}, "linux", "/somewhere"),
        ({"TINYBP_CACHE": " ", "XDG_CACHE_HOME": "/xdg"}, "linux", "/xdg/tinybp_lightning/plans"),
        ({}, "linux", "/home/me/.cache/tinybp_lightning/plans"),
        ({}, "darwin", "/home/me/Library/Caches/tinybp_lightning/plans"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/tinybp_lightning/plans"),
        ({"TINYBP_CACHE": "~/here"}, "linux", "/home/me/here"),
    ],
)
def test_where_the_folder_is(
    environ: dict[str, str], platform: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(environ, platform=platform) == Path(folder)


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(HCBWarning, match="names no folder.*`TINYBP_CACHE`"):
        assert open_cache("~nobody-of-this-name/plans") is None
    monkeypatch.setenv("TINYBP_CACHE", "~nobody-of-this-name")
    with pytest.warns(HCBWarning, match="names no folder"):
        assert open_cache(True) is None


# ---- processes -------------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from tests.unit.runtime.cache.test_disk import KNOWN, no_check
from tinybp_lightning.runtime.torch.cache import disk
disk.MAX_CACHE_BYTES = 3000  # about one file: each process removes what the other wrote
cache = disk.DiskCache(Path(sys.argv[1]))
for i in range(150):
    cache.put({"graph": str(i % 3)}, KNOWN)
    found = cache.find({"graph": str((i + 1) % 3)}, no_check)
    assert found in (None, KNOWN)
"""

_TRAINER = """
from tests.unit.runtime.cache.test_disk import trained
target, _ = trained()
print(target.counts.num_measured, target.counts.num_cached)
"""


def _run_at_once(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return printed


def test_processes_that_write_read_and_remove_at_once(tmp_path: Path) -> None:
    _run_at_once(_WRITER, str(tmp_path))
    assert len(files(tmp_path)) >= 1


def test_processes_that_train_at_once_leave_one_plan_for_the_next() -> None:
    printed = _run_at_once(_TRAINER)
    assert all(line.split() in (["1", "0"], ["0", "1"]) for line in printed)
    assert len(files()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target, recorder = trained()
    assert target.counts.num_cached == 1
    assert recorder.profiles[0].measured_peak_bytes is not None
    assert recorder.profiles[0].measured_peak_bytes <= BUDGET_BYTES
    model = tbp.hcb(residual_net(), activation_budget=BUDGET_BYTES)
    train(model, square_loss)
    assert peak_bytes(model, square_loss) <= BUDGET_BYTES
