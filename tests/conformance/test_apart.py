"""Does a benchmark's process of its own end in time, say why it failed, and leave nothing running?"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.apart import fork_server, run_apart, run_forked

_ROOT = Path(__file__).resolve().parents[2]
_STARTERS = {
    "apart": "run_apart('sleeping', [], log, timeout_s=100)",
    "forked": "run_forked(fork_server([]), time.sleep, (100,), log, timeout_s=100)",
}


def test_a_forked_process_ends_well_in_an_error_or_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that they are put back
    context, log = fork_server([]), tmp_path / "log"
    assert run_forked(context, print, ("here",), log, timeout_s=60) == ""
    assert log.read_text() == "here\n"
    assert run_forked(context, int, ("x",), log, timeout_s=60).startswith("ValueError: invalid literal for int()")
    assert run_forked(context, os.abort, (), log, timeout_s=60) == "killed by SIGABRT"
    assert run_forked(context, time.sleep, (100,), log, timeout_s=1) == "timed out after 1 s"


def test_a_started_process_ends_well_in_an_error_or_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    (tmp_path / "asked.py").write_text("import sys, time\nprint(sys.argv[1:])\ntime.sleep(float(sys.argv[1]))\n")
    assert run_apart("asked", ["0"], log, timeout_s=60) == ""
    assert log.read_text() == "['0']\n"
    assert run_apart("asked", ["x"], log, timeout_s=60) == "ValueError: could not convert string to float: 'x'"
    assert run_apart("asked", ["100"], log, timeout_s=1) == "timed out after 1 s"


@pytest.mark.parametrize("how", list(_STARTERS))
def test_a_process_ends_with_the_one_that_started_it(how: str, tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text("import time\ntime.sleep(100)\n")
    (tmp_path / "starter.py").write_text(
        "import time\nfrom pathlib import Path\nfrom benchmarks.apart import fork_server, run_apart, run_forked\n"
        f"log = Path({str(tmp_path / 'log')!r})\nif __name__ == '__main__':\n    {_STARTERS[how]}\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{_ROOT}{os.pathsep}{tmp_path}"}
    starter = subprocess.Popen([sys.executable, tmp_path / "starter.py"], env=environment)
    # `run_apart` has it open itself.
    _wait_until(lambda: _num_with_open(tmp_path / "log") == (2 if how == "apart" else 1))
    starter.kill()
    starter.wait()
    _wait_until(lambda: _num_with_open(tmp_path / "log") == 0)


def _wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until, "still not after 30 s"
        time.sleep(0.05)


def _num_with_open(file: Path) -> int:
    """Return how many processes have `file` open."""
    return sum(_has_open(process, file) for process in Path("/proc").iterdir() if process.name.isdigit())


def _has_open(process: Path, file: Path) -> bool:
    try:
        return any(link.readlink() == file for link in (process / "fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return False
