"""Describe a network of the zoo: how to build it, and what its training step is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

__all__ = ["Architecture", "Batch", "Blocks", "Phase", "Workload", "own_loss"]

Batch = Mapping[str, Tensor]


class Blocks(Enum):
    """What the replayed blocks are: pieces of one traced graph, or calls of submodules."""

    GRAPH = "graph"
    MODULE = "module"


@dataclass(frozen=True, slots=True)
class Phase:
    """One forward, backward and optimizer step. Only the submodule `trains` is trained ("" for the whole network)."""

    loss: Callable[[nn.Module, Batch], Tensor]
    trains: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """A network in training mode, one batch for it, and the phases of a training step."""

    module: nn.Module
    batch: Batch
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One network of the zoo.

    **Arguments:** `build(seed)`: makes the workload; equal seeds make equal weights and batches. `deterministic`:
    whether two plain trainings agree bit for bit. `blocks`: what its blocks are when it is traced, so that a graph
    that falls back to module steps is noticed. `is_fast`: one of those that the tests run by default.
    """

    name: str
    build: Callable[[int], Workload]
    deterministic: bool = True
    blocks: Blocks = Blocks.GRAPH
    is_fast: bool = False


def own_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a transformers model computes from labels."""
    return module(**batch).loss
