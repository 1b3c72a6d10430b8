"""Adapters to trainers. They attach the runtime to a trainer's module and decide nothing about memory.

To import this package loads neither torch nor Lightning. A new trainer is a new module here; it is added to `ADAPTERS`
only if it has a registry to fill.
"""

import importlib
import importlib.util
import sys
from typing import Any

from tinybp_lightning.errors import MissingPackageError
from tinybp_lightning.integrations._shared.import_hook import ADAPTERS

__all__ = ["resolve_strategy"]


def resolve_strategy() -> type[Any]:
    """Import and return the `HCBStrategy` class of the Lightning that is imported, or else of the first one installed.

    The class trees are separate: a program that uses both Lightnings imports its class from
    `integrations.lightning_unified` or `integrations.lightning_classic`.

    **Raises:** `MissingPackageError` when neither package is installed.
    """
    imported = [adapter for adapter in ADAPTERS if sys.modules.get(adapter.package) is not None]
    for adapter in imported if len(imported) == 1 else ADAPTERS:
        root = adapter.package.partition(".")[0]
        # Neither look-up runs any code of the package.
        if sys.modules.get(root) is not None or importlib.util.find_spec(root) is not None:
            return importlib.import_module(adapter.module).HCBStrategy
    raise MissingPackageError(
        "`HCBStrategy` needs `lightning` or `pytorch_lightning`, and neither is installed. "
        "Install one (`pip install 'tinybp-lightning[lightning]'`), or use `tinybp_lightning.hcb(model)` without it."
    )
