"""What does the user see while the first step is planned? A bar on a terminal, nothing elsewhere."""

import contextlib
from collections.abc import Generator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["PlanningProgress", "planning_progress"]


class PlanningProgress:
    """Stages of planning: `tracing`, `measuring` block by block, `planning`."""

    def __init__(self, bar: Progress, task: TaskID, target: str) -> None:
        self._bar = bar
        self._task = task
        self._target = target

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Begin a stage of `total` parts (unknown if `None`)."""
        self._bar.reset(self._task, total=total, description=f"hcb: {name} {self._target}")

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` parts are ready."""
        self._bar.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def planning_progress(target: str) -> Generator[PlanningProgress]:
    """Show progress on stderr while the body runs, if stderr is a terminal; the bar is removed at the end."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield PlanningProgress(bar, bar.add_task(f"hcb: {target}", total=None), target)
