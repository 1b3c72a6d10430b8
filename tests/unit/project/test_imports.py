"""What does an import load? The core loads no framework, and the front door stays light."""

import json
import subprocess
import sys

import pytest

_FRAMEWORKS = (
    "accelerate",
    "flax",
    "jax",
    "jaxlib",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "torch",
    "transformers",
)


def _modules_loaded_by(statement: str) -> set[str]:
    """Return the top-level names of all modules loaded by `statement` in a fresh interpreter."""
    program = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "tinybp_lightning",
        "tinybp_lightning.analysis",
        "tinybp_lightning.errors",
        "tinybp_lightning.graph",
        "tinybp_lightning.schedule",
    ],
)
def test_core_import_loads_no_framework(module: str) -> None:
    loaded = _modules_loaded_by(f"import {module}")
    assert "tinybp_lightning" in loaded
    assert loaded.isdisjoint(_FRAMEWORKS)


def test_every_core_submodule_loads_no_framework() -> None:
    loaded = _modules_loaded_by(
        "import importlib, pkgutil\n"
        "for core in ('analysis', 'graph', 'schedule'):\n"
        "    package = importlib.import_module(f'tinybp_lightning.{core}')\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
    )
    assert "tinybp_lightning" in loaded
    assert loaded.isdisjoint(_FRAMEWORKS)


def test_probe_sees_a_framework_that_is_loaded() -> None:
    assert "torch" in _modules_loaded_by("import torch")


def test_import_warns_nothing_and_prints_nothing() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import tinybp_lightning"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (finished.stdout, finished.stderr) == ("", "")
