"""What does every test start from? One thread per process, no network, no screen, and fixed seeds.

The environment is set before any test module imports a framework, and subprocesses inherit it.
"""

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order, and two test processes do not fight for cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TINYBP_CACHE"] = tempfile.mkdtemp(prefix="plans-")  # for fixtures that several tests share; see below
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest

# How long a case takes says how busy the machine is, and nothing about the code.
_PATIENT = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# The same cases on every machine, unless new ones are asked for.
hypothesis.settings.register_profile("seeded", _PATIENT, derandomize=True)
hypothesis.settings.register_profile("random", _PATIENT, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "seeded"))
atexit.register(shutil.rmtree, os.environ["TINYBP_CACHE"])
_SEED = 20251


@pytest.fixture(autouse=True, scope="module")
def _only_ones_own_garbage() -> None:
    """Take what imports and earlier modules left alive out of garbage collections.

    One takes more than half a second with them, and the package asks for one after each error of the device's memory.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _plans_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's plan cache out of tests, and each test's plans out of the others."""
    monkeypatch.setenv("TINYBP_CACHE", str(tmp_path_factory.mktemp("plans")))


@pytest.fixture(autouse=True)
def _no_trace_left_open() -> Iterator[None]:
    """Close the trace of a step that a test ended with: the next test may open one of its own."""
    yield
    step_monitor = sys.modules.get("tinybp_lightning.runtime.torch.measure.step_monitor")
    if step_monitor is not None:
        step_monitor.stop_tracing()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed every generator, so that a test's numbers do not depend on which tests ran before it."""
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002 - libraries under test draw from the global generator
    torch = sys.modules.get("torch")  # core tests must be able to run without it
    if torch is not None:
        torch.manual_seed(_SEED)
