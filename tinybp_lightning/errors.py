"""What can go wrong, by name: every exception this package raises on purpose derives from `TinyBPError`.

Each message names the value that was passed (in backticks), what was expected, and what to change.
"""

__all__ = [
    "BudgetError",
    "BudgetTooSmallError",
    "CaptureError",
    "ConfigError",
    "GraphError",
    "HCBWarning",
    "MissingPackageError",
    "PlanFileError",
    "ReplayError",
    "ScheduleError",
    "TinyBPError",
    "UnsupportedModuleError",
]


class TinyBPError(Exception):
    """Base class of every error raised by `tinybp_lightning`."""


class ConfigError(TinyBPError, ValueError):
    """An option has a wrong type, range, unit or combination."""


class BudgetError(ConfigError):
    """A budget cannot be read: unknown unit, negative, NaN, or two budgets at once."""


class BudgetTooSmallError(TinyBPError, ValueError):
    """No schedule fits the budget. Carries the smallest feasible budget and the place that sets it.

    **Attributes:** `budget_bytes`: what was asked; `smallest_bytes`: the smallest feasible budget;
    `bottleneck`: the block or op whose working set sets it.
    """

    def __init__(self, message: str, *, budget_bytes: int, smallest_bytes: int, bottleneck: str) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.bottleneck = bottleneck


class GraphError(TinyBPError, ValueError):
    """A `Graph` or `Chain` breaks an invariant that `verify_graph` or `verify_chain` states."""


class ScheduleError(TinyBPError, ValueError):
    """A `Schedule` is not legal on its chain: it reads a state that is not there, or misses a backward."""


class PlanFileError(TinyBPError, ValueError):
    """A plan file is damaged, edited, newer, or for another chain; planning again is always the way out."""


class CaptureError(TinyBPError, RuntimeError):
    """A module's forward could not be turned into a `Graph`."""


class MissingPackageError(TinyBPError, ImportError):
    """An optional package that this entry point needs is not installed; the message names the extra."""


class ReplayError(TinyBPError, RuntimeError):
    """A replayed block did not do what its first run did, or a value it needs was changed in place."""


class UnsupportedModuleError(TinyBPError, TypeError):
    """The object cannot be trained with height-compressed backpropagation at all."""


class HCBWarning(UserWarning):
    """Part of a module is left as it is, or handled in a coarser way; the message names it and says why."""
