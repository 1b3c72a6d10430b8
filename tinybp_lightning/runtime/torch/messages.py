"""What the user sees while training is planned: a progress bar on a terminal, and each warning once."""

import contextlib
import warnings
from collections.abc import Generator, Hashable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tinybp_lightning.errors import HCBWarning

__all__ = ["PlanningProgress", "WarnOnce", "planning_progress"]


@dataclass(frozen=True, slots=True)
class PlanningProgress:
    """Shows the stages of planning: `tracing`, `compiling`, `measuring` block by block, `planning`."""

    bar: Progress
    task: TaskID
    target: str

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Begin a stage of `total` parts (unknown if `None`)."""
        self.bar.reset(self.task, total=total, description=f"hcb: {name} {self.target}")

    def advance(self, done: int, total: int) -> None:
        """Show that `done` of `total` parts are ready."""
        self.bar.update(self.task, completed=done, total=total)


@contextlib.contextmanager
def planning_progress(target: str) -> Generator[PlanningProgress]:
    """Show progress on stderr while the body runs, if stderr is a terminal; the bar is removed at the end."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield PlanningProgress(bar, bar.add_task(f"hcb: {target}", total=None), target)


class WarnOnce:
    """Gives the warnings of one target, each once."""

    def __init__(self) -> None:
        self._given: set[Hashable] = set()

    def __call__(self, key: Hashable, message: str) -> None:
        """Warn the user, unless a warning with this `key` was given before."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, HCBWarning, stacklevel=3)
