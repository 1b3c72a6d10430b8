"""Run each measurement of a benchmark in a process of its own, and report its failure in one line.

A crash, a signal and a timeout are outcomes like any other. The log contains what the process printed. A process whose
starter is gone, however it ended, ends itself: it is started as `python -m benchmarks.apart`, which waits for the end
of its standard input.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from recipes.launch import error_line

__all__ = ["run_apart"]

_ROOT = Path(__file__).resolve().parent.parent


def run_apart(module: str, arguments: Sequence[str], log: Path, *, timeout_s: float) -> str:
    """Run `python -m module` with `arguments`, with its output in `log`, and on one thread so that sums have one order.

    **Returns:** why it failed, in one line; empty if it ended with exit code 0.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for benchmarks that use deterministic kernels
    with log.open("w") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.apart", module, *arguments],
            stdin=subprocess.PIPE,
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
                os.killpg(process.pid, signal.SIGKILL)  # this also ends the compiler's worker processes
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return "" if exit_code == 0 else error_line(log.read_text()) or f"ended with exit code {exit_code}"


def _python_path() -> str:
    """Return the `PYTHONPATH` with which a child finds `benchmarks` and `recipes` from any working directory."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end_with_starter() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is written to it: it ends with the process at its other end
    os.killpg(0, signal.SIGKILL)  # the group is this process's own (`start_new_session`)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
