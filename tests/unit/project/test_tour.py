"""Does `docs/tour.md` tell the way from a budget to a plan as it is? Its list is compared with a step that is traced.

Every file that is listed must be executed on that way. Every file that is called on the way must be listed: those of
`runtime/torch` on the call stack below the user's call when the planner is called, and all that run in
`schedule/planner`. The tracer and the step monitor, which call back and do not see the budget, stand in other folders.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import tinybp_lightning as tbp
from tests.unit.runtime.training import Recorder, residual_net

_ROOT = Path(__file__).parents[3]
_PACKAGE = _ROOT / "tinybp_lightning"
_MOST_FILES = 12
_PLANNER = "schedule/planner/"
_CALLERS = "runtime/torch/"
_HEADING = "From budget to plan"


@dataclass(frozen=True, slots=True)
class Way:
    """Package files: `executed` anywhere; `called` in the planner, or in the callers' folder on the stack above it."""

    executed: frozenset[str]
    called: frozenset[str]


def file_of(code: CodeType, *, package: Path = _PACKAGE) -> str | None:
    """Return the path of `code` in the package; `None` for what is not ours, or was only imported."""
    path = Path(code.co_filename)
    if code.co_name == "<module>" or not path.is_relative_to(package):
        return None
    return path.relative_to(package).as_posix()


def way_of(
    run: Callable[[], object], *, planner: str = _PLANNER, callers: str = _CALLERS, package: Path = _PACKAGE
) -> Way:
    """Return the files that `run` executes, and those by which it comes to the folder `planner`, and through it."""
    files: dict[CodeType, str | None] = {}
    executed: set[str] = set()
    called: set[str] = set()

    def file(code: CodeType) -> str | None:
        if code not in files:
            files[code] = file_of(code, package=package)
        return files[code]

    def on_event(frame: FrameType | None, event: str, _: Any) -> None:
        assert frame is not None
        found = file(frame.f_code) if event == "call" else None
        if found is None:
            return
        executed.add(found)
        if not found.startswith(planner) or found in called:
            return
        while frame is not None:
            found = file(frame.f_code)
            if found is not None and (found.startswith(planner) or found.rpartition("/")[0] == callers.rstrip("/")):
                called.add(found)
            frame = frame.f_back

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(before)
    return Way(frozenset(executed), frozenset(called))


def complaints(listed: Sequence[str], way: Way) -> dict[str, list[str]]:
    """Return what is wrong with a list of the way's files, by what it is."""
    found = {
        "more than once": sorted({path for path in listed if listed.count(path) > 1}),
        "never executed": sorted(set(listed) - way.executed),
        "not listed": sorted(way.called - set(listed)),
    }
    return {wrong: paths for wrong, paths in found.items() if paths}


def files_in_tour(text: str) -> list[str]:
    """Return the paths in the first fenced block below the heading, the first word of each line."""
    lines = iter(text.splitlines())
    listed: list[str] = []
    for line in lines:
        if re.fullmatch(rf"#+ {_HEADING}", line):
            break
    for line in lines:
        assert not line.startswith("#"), f"no fenced list below the heading `{_HEADING}`"
        if line.startswith("```"):
            break
    for line in lines:
        if line.startswith("```"):
            return listed
        listed += [word.removeprefix("tinybp_lightning/") for word in line.split()[:1]]
    raise AssertionError(f"no fenced list below the heading `{_HEADING}`")


@pytest.fixture(scope="module")
def way() -> Way:
    """Of two training steps: the first plan, and the one from what the first step measured."""
    torch.manual_seed(0)
    model, recorder = residual_net(), Recorder()
    x = torch.randn(64, 16)

    def from_budget_to_plan() -> None:
        tbp.hcb(model, activation_budget="50%", observers=[recorder])
        for _ in range(2):
            model(x).square().mean().backward()

    found = way_of(from_budget_to_plan)
    assert recorder.plans
    return found


def test_the_tour_lists_the_way_from_budget_to_plan(way: Way) -> None:
    listed = files_in_tour((_ROOT / "docs" / "tour.md").read_text())
    assert complaints(listed, way) == {}
    assert len(listed) <= _MOST_FILES


def test_the_way_begins_at_the_front_door_and_ends_at_the_planner(way: Way) -> None:
    assert {"runtime/torch/api.py", "schedule/planner/planner.py"} <= way.executed
    assert any(path.startswith("runtime/") for path in way.called)
    assert "schedule/planner/planner.py" in way.called


TOUR = """# A tour

## Before
```
other.py
```
## From budget to plan
Some words.

```text
tinybp_lightning/door.py      takes the budget
planner/table.py  fills the table
```

```
later.py
```
"""


def test_a_tour_is_read() -> None:
    assert files_in_tour(TOUR) == ["door.py", "planner/table.py"]
    with pytest.raises(AssertionError, match="no fenced list"):
        files_in_tour(TOUR.replace("From budget", "From a budget"))


def test_a_traced_way_and_what_is_wrong_with_lists_of_it(tmp_path: Path) -> None:
    """`callback.py` calls on, and is in another folder."""
    sources = {
        "run/door.py": "def enter(plan, other, back): other(); return back(lambda: middle(plan))\n"
        "def middle(plan): return plan()",
        "trace/callback.py": "def back(call): return call()",
        "run/other.py": "def other(): pass\ndef unused(): pass",
        "run/unused.py": "def unused(): pass",
        "planner/planner.py": "def plan(): pass",
    }
    names: dict[str, Any] = {}
    for path, source in sources.items():
        exec(compile(source, str(tmp_path / path), "exec"), names)
    run = lambda: names["enter"](names["plan"], names["other"], names["back"])  # noqa: E731
    found = way_of(run, planner="planner/", callers="run/", package=tmp_path)
    assert found.executed == {"run/door.py", "run/other.py", "trace/callback.py", "planner/planner.py"}
    assert found.called == {"run/door.py", "planner/planner.py"}
    assert complaints(["run/door.py", "planner/planner.py"], found) == {}
    assert complaints(["run/door.py", "planner/planner.py", "run/other.py"], found) == {}
    assert complaints(["run/door.py", "run/door.py", "run/unused.py"], found) == {
        "more than once": ["run/door.py"],
        "never executed": ["run/unused.py"],
        "not listed": ["planner/planner.py"],
    }
