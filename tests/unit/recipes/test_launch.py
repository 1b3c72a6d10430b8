import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from recipes import launch
from recipes.config import compose_config
from recipes.launch import error_line, run_modes
from recipes.modes import Mode
from recipes.outcome import Failed, read_outcome
from recipes.run_one import pick_device
from tinybp_lightning.errors import ConfigError

CHAINED = """step 1/2
Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'first'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in <module>
    fail()
RuntimeError: second
and its second line
a warning at exit
"""


@pytest.mark.parametrize(("log", "line"), [(CHAINED, "RuntimeError: second"), ("a warning\n", ""), ("", "")])
def test_the_line_that_names_the_error(log: str, line: str) -> None:
    assert error_line(log) == line


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import time; time.sleep(60)", "timed out after 0.5 s (size.timeout_s)"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("raise SystemExit(3)", "ended with exit code 3"),
    ],
    ids=["raises", "hangs", "is killed", "exits"],
)
def test_a_mode_that_fails_is_an_outcome(
    script: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.sys, "executable", fake_python(tmp_path, script))
    config = compose_config(["size=tiny", f"size.timeout_s={0.5 if 'sleep' in script else 60}"])
    shown = io.StringIO()
    outcomes = run_modes(config, [Mode.checkpoint], tmp_path / "out", console=Console(file=shown, width=200))
    assert [(o.mode, o.error) for o in outcomes if isinstance(o, Failed)] == [
        (Mode.naive, error),
        (Mode.checkpoint, error),
    ]
    assert read_outcome(tmp_path / "out" / "checkpoint.json") == outcomes[1]
    assert shown.getvalue().count(error) == 2


@pytest.mark.parametrize("name", ["gpu", ""])
def test_an_unknown_device_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`device={name}` is not a device"):
        pick_device(name)


def test_cpu_is_always_there() -> None:
    assert pick_device("cpu").type == "cpu"
