"""Which Lightning's class is `HCBStrategy`?"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from tinybp_lightning import integrations
from tinybp_lightning.errors import MissingPackageError, TinyBPError

UNIFIED, CLASSIC = "lightning.pytorch", "pytorch_lightning"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters whose class is their package's name, and neither Lightning imported."""
    for adapter in integrations.ADAPTERS:
        module: Any = ModuleType(adapter.module)
        module.HCBStrategy = adapter.package
        monkeypatch.setitem(sys.modules, adapter.module, module)
        monkeypatch.delitem(sys.modules, adapter.package, raising=False)
        monkeypatch.delitem(sys.modules, adapter.package.partition(".")[0], raising=False)


def install(monkeypatch: pytest.MonkeyPatch, *roots: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in roots else None)


@pytest.mark.parametrize(
    ("installed", "imported", "expected"),
    [
        (["lightning", "pytorch_lightning"], [], UNIFIED),
        (["lightning", "pytorch_lightning"], [UNIFIED], UNIFIED),
        (["lightning", "pytorch_lightning"], [CLASSIC], CLASSIC),
        (["lightning", "pytorch_lightning"], [UNIFIED, CLASSIC], UNIFIED),
        (["pytorch_lightning"], [], CLASSIC),
        (["lightning"], [], UNIFIED),
    ],
)
def test_the_imported_one_else_the_installed_one(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], imported: list[str], expected: str
) -> None:
    install(monkeypatch, *installed)
    for package in imported:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    assert integrations.resolve_strategy() == expected


def test_neither_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(MissingPackageError, match="`lightning` or `pytorch_lightning`") as caught:
        integrations.resolve_strategy()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, TinyBPError)
