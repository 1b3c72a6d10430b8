"""Run `ranks.py` in two processes that form a gloo group."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
WORLD_SIZE = 2


@dataclass(frozen=True, slots=True)
class Rank:
    """What one process saw. `order`: words for what happened, with `step` where a step begins."""

    same: bool
    replayed: list[int]
    order: list[str]
    names: list[str]

    @property
    def steps(self) -> list[list[str]]:
        """The words of each step."""
        starts = [i for i, word in enumerate(self.order) if word == "step"]
        return [self.order[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(self.order)], strict=True)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(cases: Sequence[str], folder: Path) -> dict[str, list[Rank]]:
    """Run `cases`, one after another, on every rank; return what each rank saw.

    A process takes longer to start than to train, hence several cases each.

    Raises `AssertionError` with the output of a process that fails.
    """
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(WORLD_SIZE),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), ",".join(cases), str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(WORLD_SIZE)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                environment = {**common, "RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for code, log in zip(codes, logs, strict=True):
        assert code == 0, log.read_text()[-5000:]
    return {
        case: [Rank(**json.loads((folder / f"{case}.{rank}.json").read_text())) for rank in range(WORLD_SIZE)]
        for case in cases
    }
