"""Does registration follow the import of the awaited package, in any order, without ever breaking that import?"""

import importlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.integrations._shared.import_hook import ADAPTERS, Adapter, RegisteringFinder

PACKAGE = "hook_test_package"
ADAPTER = Adapter(f"{PACKAGE}.inner", "hook_test_adapter")


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with `inner`, and an adapter that registers there, once it is complete."""
    inner = tmp_path / PACKAGE / "inner"
    inner.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("finished = False\nimport sys\nfinished = True\n")
    (inner / "strategies.py").write_text("registry = []\n")
    (tmp_path / "hook_test_adapter.py").write_text(
        f"from {PACKAGE} import inner\n"
        f"from {PACKAGE}.inner.strategies import registry\n"
        "assert inner.finished\nregistry.append('hcb')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    meta_path = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = meta_path
    for name in [name for name in sys.modules if name.startswith("hook_test_")]:
        del sys.modules[name]


def registrations() -> list[str]:
    return importlib.import_module(f"{ADAPTER.package}.strategies").registry


@pytest.mark.parametrize("imported_first", [True, False], ids=["package first", "hook first"])
def test_registers_once_whatever_the_order(imported_first: bool) -> None:
    finder = RegisteringFinder([ADAPTER])
    steps = [lambda: importlib.import_module(ADAPTER.package), finder.install]
    for step in steps if imported_first else reversed(steps):
        step()
    finder.install()
    assert registrations() == ["hcb"]


def test_an_adapter_imported_first_registers_once() -> None:
    RegisteringFinder([ADAPTER]).install()
    importlib.import_module(ADAPTER.module)
    assert registrations() == ["hcb"]


def test_waits_without_importing_anything() -> None:
    RegisteringFinder([ADAPTER]).install()
    assert not [name for name in sys.modules if name.startswith("hook_test_")]


def test_leaves_the_meta_path_when_nothing_is_awaited() -> None:
    other = Adapter("hook_test_never", ADAPTER.module)
    alone, waiting = RegisteringFinder([ADAPTER]), RegisteringFinder([ADAPTER, other])
    alone.install()
    waiting.install()
    importlib.import_module(ADAPTER.package)
    assert alone not in sys.meta_path
    assert waiting in sys.meta_path


def test_two_hooks_of_this_kind_do_not_search_each_other_forever() -> None:
    finders = [RegisteringFinder([ADAPTER]), RegisteringFinder([ADAPTER])]
    for finder in finders:
        finder.install()
    assert registrations() == ["hcb"]


def test_the_module_keeps_its_own_loader() -> None:
    RegisteringFinder([ADAPTER]).install()
    spec = importlib.util.find_spec(ADAPTER.package)
    assert isinstance(spec, ModuleSpec)
    assert isinstance(spec.loader, Loader)
    assert importlib.util.module_from_spec(spec).__path__
    source: Any = spec.loader
    assert source.get_source(ADAPTER.package).startswith("finished")
    module = importlib.import_module(ADAPTER.package)
    assert module.__spec__ is not None
    assert module.__loader__ is module.__spec__.loader
    assert type(module.__loader__) is SourceFileLoader


def test_reload_does_not_register_again() -> None:
    RegisteringFinder([ADAPTER]).install()
    importlib.reload(importlib.import_module(ADAPTER.package))
    assert registrations() == ["hcb"]


def test_a_missing_package_stays_missing() -> None:
    RegisteringFinder([Adapter("hook_test_absent", ADAPTER.module)]).install()
    with pytest.raises(ModuleNotFoundError, match="hook_test_absent"):
        importlib.import_module("hook_test_absent")


@pytest.mark.parametrize("imported_first", [True, False], ids=["package first", "hook first"])
def test_a_failed_registration_warns_with_its_cause_and_the_import_goes_on(
    packages: Path, imported_first: bool
) -> None:
    (packages / "hook_test_adapter.py").write_text("raise ImportError('cannot import name X')")
    finder = RegisteringFinder([ADAPTER])
    steps = [lambda: importlib.import_module(ADAPTER.package), finder.install]
    first, second = steps if imported_first else reversed(steps)
    first()
    with pytest.warns(HCBWarning, match=rf"`{ADAPTER.package}` \(ImportError: cannot import name X\)"):
        second()
    finder.install()
    assert importlib.import_module(ADAPTER.package).finished


def test_a_package_that_breaks_is_awaited_again(packages: Path) -> None:
    source = packages / PACKAGE / "inner" / "__init__.py"
    whole = source.read_text()
    finder = RegisteringFinder([ADAPTER])
    finder.install()
    source.write_text("raise RuntimeError('broken install')")
    with pytest.raises(RuntimeError, match="broken install"):
        importlib.import_module(ADAPTER.package)
    source.write_text(whole + "# repaired\n")
    importlib.invalidate_caches()
    assert registrations() == ["hcb"]


def test_threads_that_install_and_import_together_register_once() -> None:
    finder = RegisteringFinder([ADAPTER])
    start = threading.Barrier(8)

    def install_and_import() -> None:
        start.wait()
        finder.install()
        importlib.import_module(ADAPTER.package)
        finder.install()

    threads = [threading.Thread(target=install_and_import) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert registrations() == ["hcb"]


ORDER = """
import importlib, sys
{imports}
registry = importlib.import_module("{package}.strategies").StrategyRegistry
print(*sorted(name for name in registry if name.startswith("hcb")))
"""


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.package)
@pytest.mark.parametrize("first", ["ours", "Lightning", "adapter"])
def test_import_order_in_a_fresh_process(adapter: Adapter, first: str) -> None:
    ours, theirs = "import tinybp_lightning", f"import {adapter.package}"
    imports = {"ours": [ours, theirs], "Lightning": [theirs, ours], "adapter": [f"import {adapter.module}"]}
    script = ORDER.format(imports="\n".join(imports[first]), package=adapter.package)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    names = ["hcb", "hcb_ddp", "hcb_ddp_find_unused_parameters_true", "hcb_ddp_notebook", "hcb_ddp_spawn", "hcb_single"]
    assert done.stdout.split() == names


def test_the_hook_loads_no_framework() -> None:
    script = (
        "import sys\nfrom tinybp_lightning.integrations._shared import import_hook\nimport_hook.install()\n"
        "print([name for name in ('torch', 'lightning', 'pytorch_lightning', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
