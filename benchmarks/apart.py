"""How does a benchmark outlive what it measures? Each measurement in a process of its own, whose end is told in a line.

A crash, a signal and a timeout are outcomes like any other; what the process printed is in its log.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.launch import error_line

__all__ = ["run_apart"]

_ROOT = Path(__file__).resolve().parent.parent


def run_apart(module: str, arguments: Sequence[str], log: Path, *, timeout_s: float) -> str:
    """Run `python -m module` with `arguments`, one thread to sum in one order, its output in `log`.

    **Returns:** why it failed, in one line; empty where it ended with exit code 0.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for those that ask for deterministic kernels
    with log.open("w") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            exit_code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"timed out after {timeout_s:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # compilers have workers of their own
                process.wait()
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return "" if exit_code == 0 else error_line(log.read_text()) or f"ended with exit code {exit_code}"


def _python_path() -> str:
    """Where a child finds `benchmarks` and `recipes`, wherever this process was started from."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
