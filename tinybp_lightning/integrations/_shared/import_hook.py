"""Register our strategies with Lightning, whether it is imported before or after this package.

A finder on `sys.meta_path` waits for `lightning.pytorch` and `pytorch_lightning`. When one has been imported, its
adapter registers the `hcb…` names. Lightning reads no entry-point group before the Trainer resolves its strategy, so
the import of this package is the only route. This module itself imports neither torch nor Lightning.
"""

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tinybp_lightning.errors import HCBWarning

__all__ = ["ADAPTERS", "Adapter", "RegisteringFinder", "install"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A Lightning namespace (`package`) and the `module` of ours whose import registers strategies there."""

    package: str
    module: str


ADAPTERS = (
    Adapter("lightning.pytorch", "tinybp_lightning.integrations.lightning_unified"),
    Adapter("pytorch_lightning", "tinybp_lightning.integrations.lightning_classic"),
)


class RegisteringFinder(MetaPathFinder):
    """Gives the awaited packages a loader that registers our strategies after the package has run."""

    def __init__(self, adapters: Iterable[Adapter]) -> None:
        # Nobody holds the lock during an import: another thread could hold the import's lock and wait for this one.
        self._lock = threading.Lock()
        self._awaited = {adapter.package: adapter for adapter in adapters}
        self._searching = threading.local()

    def install(self) -> None:
        """Wait on `sys.meta_path` for the packages that are not imported, and register with those that are."""
        with self._lock:
            awaited = tuple(self._awaited.values())
            if awaited and self not in sys.meta_path:
                sys.meta_path.insert(0, self)
        for adapter in awaited:
            if sys.modules.get(adapter.package) is not None:
                self.register(adapter)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Return the spec of an awaited package, with its loader wrapped; `None` for any other name."""
        adapter = self._awaited.get(fullname)
        # Another hook of this kind would ask this one again while this one asks it.
        if adapter is None or getattr(self._searching, "on", False):
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        self._searching.on = True
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._searching.on = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, lambda: self.register(adapter))
        return spec

    def register(self, adapter: Adapter) -> None:
        """Import the adapter, which registers its strategies. A failure warns and leaves Lightning as it is."""
        with self._lock:
            if self._awaited.pop(adapter.package, None) is None:
                return
            if not self._awaited and self in sys.meta_path:
                sys.meta_path.remove(self)
        try:
            importlib.import_module(adapter.module)
        # No error in our adapter may break the user's `import lightning`.
        except Exception as error:  # noqa: BLE001 - reported below
            warnings.warn(
                f"the `hcb` strategies could not be registered in `{adapter.package}` "
                f"({type(error).__name__}: {error}): `Trainer(strategy='hcb')` is unknown there. "
                "Check the installed Lightning version, or use `tinybp_lightning.hcb(model)`.",
                HCBWarning,
                stacklevel=2,
            )


class _RegisteringLoader(Loader):
    """Runs the package's own loader, then registers; the module's attributes name the package's own loader."""

    def __init__(self, loader: Loader, after_exec: Callable[[], None]) -> None:
        self._loader, self._after_exec = loader, after_exec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after_exec()

    def __getattr__(self, name: str) -> Any:
        # A `find_spec` without an import (availability checks, resource readers) uses the package's own loader.
        return getattr(self._loader, name)


install = RegisteringFinder(ADAPTERS).install
"""Registers with every namespace, now or when it is imported. It may be called again, and from several threads."""
