"""Height-compressed backpropagation: the same loss and gradients in less memory, under a byte budget.

`import tinybp_lightning as tbp` is light: the first name that needs torch loads it. The import also registers
`Trainer(strategy="hcb")` with `lightning` and `pytorch_lightning`, whether they are imported before or after it.
"""

from typing import TYPE_CHECKING, Any

from tinybp_lightning.config import HCBConfig
from tinybp_lightning.errors import (
    BudgetError,
    BudgetTooSmallError,
    CaptureError,
    ConfigError,
    HCBWarning,
    ReplayError,
    TinyBPError,
    UnsupportedModuleError,
)
from tinybp_lightning.integrations._shared import import_hook

if TYPE_CHECKING:
    from tinybp_lightning.capture.torch import capture_graph
    from tinybp_lightning.capture.torch.ambient import register_ambient
    from tinybp_lightning.integrations.lightning_unified import HCBStrategy
    from tinybp_lightning.runtime.torch import attach, hcb, keep, restore, run_step
    from tinybp_lightning.runtime.torch.explanation import Explanation, explain
    from tinybp_lightning.schedule import Pareto, pareto, plan, simulate

__all__ = [
    "BudgetError",
    "BudgetTooSmallError",
    "CaptureError",
    "ConfigError",
    "Explanation",
    "HCBConfig",
    "HCBStrategy",
    "HCBWarning",
    "Pareto",
    "ReplayError",
    "TinyBPError",
    "UnsupportedModuleError",
    "attach",
    "capture_graph",
    "explain",
    "hcb",
    "keep",
    "pareto",
    "plan",
    "register_ambient",
    "restore",
    "run_step",
    "simulate",
]

__version__ = "0.1.0.dev0"

# Where the other names of `__all__` are defined; `schedule` comes first because `plan` must not load torch.
_HOMES = ("schedule", "capture.torch", "capture.torch.ambient", "runtime.torch", "runtime.torch.explanation")


def __getattr__(name: str) -> Any:
    import importlib  # noqa: PLC0415 - only for names that are not loaded yet

    if name == "HCBStrategy":
        from tinybp_lightning.integrations import resolve_strategy  # noqa: PLC0415 - loads Lightning

        return resolve_strategy()
    for home in _HOMES if name in __all__ else ():
        module = importlib.import_module(f"{__name__}.{home}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_hook.install()
