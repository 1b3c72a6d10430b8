"""Compute the key of a plan: the program and its cut, the device, the software, and what the user asked for.

Two steps with equal keys may share measured costs and a plan. What the key leaves out (the weights' values, the
learning rate, other processes on the device) changes neither, or the traced first step sees it.
"""

import functools
import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from tinybp_lightning.capture.torch.ambient import Settings
from tinybp_lightning.capture.torch.pieces import Program
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.graph.signature import graph_signature, layout_signature

__all__ = ["ProgramKey", "plan_key", "program_key"]


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """What a plan depends on in a program, hashed; `layout` is equal for programs that differ only in sizes."""

    graph: str
    code: str
    cut: str
    layout: str


def program_key(program: Program) -> ProgramKey:
    """Return the hashes of `program`."""
    return ProgramKey(
        graph=graph_signature(program.graph),
        # The graph's hash leaves out constants, which the code has, and names, which error messages show.
        code=_digest("".join(piece.module.code for piece in program.pieces)),
        cut=_digest(repr([(piece.span.start, piece.span.stop, piece.span.name) for piece in program.pieces])),
        layout=layout_signature(program.graph),
    )


def plan_key(
    program: ProgramKey,
    config: HCBConfig,
    *,
    device: torch.device,
    settings: Settings,
    has_gradients: bool,
) -> dict[str, str]:
    """Return what a plan for `program` depends on, by name; `has_gradients`: there are some as the step begins."""
    budget = config.budget
    return {
        "graph": program.graph,
        "code": program.code,
        "cut": program.cut,
        "device": _device_name(device),
        "torch": torch.__version__,
        "tinybp_lightning": _source_digest(),
        "budget": f"{budget.kind.value} {budget.size_bytes} {budget.fraction}",
        "executor": config.executor,
        "costs": config.costs,
        "settings": repr(settings),
        "has_gradients": str(has_gradients),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        _, total_bytes = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {total_bytes} bytes, CUDA {torch.version.cuda}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {platform.machine()} {capability}, {torch.get_num_threads()} threads"


@functools.cache
def _source_digest() -> str:
    """Hash this package's source, because the version does not change between releases."""
    root = Path(__file__).parents[3]
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
