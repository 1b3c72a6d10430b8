"""Run each measurement of a benchmark in a process of its own, and report its failure in one line.

A crash, a signal and a timeout are outcomes like any other. The log contains what the process printed. A process whose
starter is gone, however it ended, ends itself: it is started as `python -m benchmarks.apart`, which waits for the end
of its standard input.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from recipes.launch import error_line

__all__ = ["fork_server", "run_apart", "run_forked"]

_ROOT = Path(__file__).resolve().parent.parent


def run_apart(module: str, arguments: Sequence[str], log: Path, *, timeout_s: float) -> str:
    """Run `python -m module` with `arguments`, with its output in `log`, and on one thread so that sums have one order.

    **Returns:** why it failed, in one line; empty if it ended with exit code 0.
    """
    with log.open("w") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.apart", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=os.environ | _environment(),
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
    return _why_failed(exit_code, log)


def _why_failed(exit_code: int, log: Path) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return "" if exit_code == 0 else error_line(log.read_text()) or f"ended with exit code {exit_code}"


def fork_server(modules: Sequence[str]) -> ForkServerContext:
    """Return a context whose processes begin with `modules` imported, and on one thread; it has no process yet.

    For hundreds of short measurements, each of which would spend half of its time on imports.
    """
    os.environ.update(_environment())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def run_forked(
    context: ForkServerContext,
    target: Callable[..., object],
    arguments: Sequence[object],
    log: Path,
    *,
    timeout_s: float,
) -> str:
    """Run `target(*arguments)` in a process of `context`, with its output in `log`.

    **Returns:** why it failed, in one line; empty if it ended with exit code 0.
    """
    process = context.Process(target=_forked, args=(target, tuple(arguments), log))
    log.write_text("")
    process.start()
    assert process.pid is not None
    process.join(timeout_s)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"timed out after {timeout_s:g} s"
    return _why_failed(process.exitcode, log)


def _forked(target: Callable[..., object], arguments: tuple[object, ...], log: Path) -> None:
    os.setsid()  # a group of its own, which is ended as a whole
    with log.open("w") as log_file:
        os.dup2(log_file.fileno(), sys.stdout.fileno())
        os.dup2(log_file.fileno(), sys.stderr.fileno())
    starter = multiprocessing.parent_process()
    assert starter is not None
    threading.Thread(target=_end_after, args=(starter.join,), daemon=True).start()
    target(*arguments)


def _end_after(starter_ends: Callable[[], object]) -> None:
    starter_ends()
    os.killpg(0, signal.SIGKILL)


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": _python_path(),
        "HF_HUB_OFFLINE": "1",
        # for benchmarks that use deterministic kernels
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    }


def _python_path() -> str:
    """Return the `PYTHONPATH` with which a child finds `benchmarks` and `recipes` from any working directory."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _standard_input_ends() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is written to it: it ends with the process at its other end


if __name__ == "__main__":
    threading.Thread(target=_end_after, args=(_standard_input_ends,), daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
