"""Height-compressed backpropagation: the same loss and gradients in less memory, under a byte budget.

`import tinybp_lightning as tbp` is light: torch is loaded with the first name that needs it. It also makes
`Trainer(strategy="hcb")` known to whichever Lightning is imported, before or after.
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
from tinybp_lightning.integrations import _import_hook

if TYPE_CHECKING:
    from tinybp_lightning.capture.torch import capture_graph
    from tinybp_lightning.runtime.torch import attach, hcb, keep, restore, run_step
    from tinybp_lightning.runtime.torch.explanation import Explanation, explain
    from tinybp_lightning.schedule import Pareto, pareto, plan, simulate

    HCBStrategy: Any

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
    "restore",
    "run_step",
    "simulate",
]

__version__ = "0.1.0.dev0"

_LAZY = {
    "Explanation": "tinybp_lightning.runtime.torch.explanation",
    "Pareto": "tinybp_lightning.schedule",
    "attach": "tinybp_lightning.runtime.torch",
    "capture_graph": "tinybp_lightning.capture.torch",
    "explain": "tinybp_lightning.runtime.torch.explanation",
    "hcb": "tinybp_lightning.runtime.torch",
    "keep": "tinybp_lightning.runtime.torch",
    "pareto": "tinybp_lightning.schedule",
    "plan": "tinybp_lightning.schedule",
    "restore": "tinybp_lightning.runtime.torch",
    "run_step": "tinybp_lightning.runtime.torch",
    "simulate": "tinybp_lightning.schedule",
}


def __getattr__(name: str) -> Any:
    import importlib  # noqa: PLC0415 - only names that are not there yet come here

    if name == "HCBStrategy":
        from tinybp_lightning.integrations import resolve_strategy  # noqa: PLC0415 - loads Lightning

        return resolve_strategy()
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


_import_hook.install()
