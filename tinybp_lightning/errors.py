"""Define the exceptions of this package: every one that it raises on purpose derives from `TinyBPError`.

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
    """An option is unknown, or has a wrong type, range, unit or combination."""


class BudgetError(ConfigError):
    """A budget cannot be read (unknown unit, negative, NaN), or two were given."""


class BudgetTooSmallError(TinyBPError, ValueError):
    """No schedule fits the budget.

    **Attributes:** `budget_bytes`: the budget that was given; `smallest_bytes`: the smallest feasible budget;
    `bottleneck`: the block or op whose working set determines it.
    """

    def __init__(self, message: str, *, budget_bytes: int, smallest_bytes: int, bottleneck: str) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.bottleneck = bottleneck


class GraphError(TinyBPError, ValueError):
    """A `Graph` or `Chain` breaks an invariant that `verify_graph` or `verify_chain` states."""


class ScheduleError(TinyBPError, ValueError):
    """A `Schedule` is not legal on its chain: it reads a state that is not in memory, or omits a backward."""


class PlanFileError(TinyBPError, ValueError):
    """A plan file is damaged, edited, newer than this version, or for another chain. The remedy is to plan again."""


class CaptureError(TinyBPError, RuntimeError):
    """A module's forward could not be turned into a `Graph`."""


class MissingPackageError(TinyBPError, ImportError):
    """An optional package that this entry point needs is not installed. The message names the extra."""


class ReplayError(TinyBPError, RuntimeError):
    """A replayed block did not do what its first run did, or a value that it needs was changed in place."""


class UnsupportedModuleError(TinyBPError, TypeError):
    """The object cannot be trained with height-compressed backpropagation."""


class HCBWarning(UserWarning):
    """Part of a module trains without a plan, or under a coarser one. The message names the part and the reason."""
