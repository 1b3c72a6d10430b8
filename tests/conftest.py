"""What does every test start from? One thread per process, no network, no screen, and fixed seeds.

The environment is set before any test module imports a framework, and subprocesses inherit it.
"""

import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order, and two test processes do not fight for cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest

_SEED = 20251


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed every generator, so that a test's numbers do not depend on which tests ran before it."""
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002 - libraries under test draw from the global generator
    torch = sys.modules.get("torch")  # core tests must be able to run without it
    if torch is not None:
        torch.manual_seed(_SEED)
