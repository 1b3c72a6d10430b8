"""Make a training step run out of memory, by an error at a chosen run of a block.

The engine runs blocks through the `RunnableBlock` protocol: while `Faults` is entered, every block that a run sweeps
is wrapped. The package has no code for this.
"""

from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Any

import torch

from tinybp_lightning.runtime.torch.replay.blocks import RunnableBlock
from tinybp_lightning.runtime.torch.replay.engine import Run

__all__ = ["Faults", "Place", "out_of_memory"]


class Place(Enum):
    """Where a fault occurs: in a block's first run, in a replay, or in a gradient hook (`Faults.hook`)."""

    FORWARD = "forward"
    REPLAY = "replay"
    BACKWARD = "backward"


def out_of_memory() -> BaseException:
    """Return an error like the CUDA allocator's."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. (injected)")


class Faults:
    """Raises once for each `arm`, at the place that was armed. It is a context manager.

    **Arguments:** `make`: makes the exception.
    """

    def __init__(self, make: Callable[[], BaseException] = out_of_memory) -> None:
        self._make = make
        self._left: dict[Place, int] = {}
        self._sweep: Callable[..., Any] = Run.sweep
        self.num_raised = 0

    def arm(self, place: Place, *, after: int = 0) -> None:
        """Raise at `place`, in the run that follows `after` other runs."""
        self._left[place] = after

    def disarm(self) -> None:
        """Forget all armed places."""
        self._left.clear()

    def strike(self, place: Place) -> None:
        """Count a run at `place`, and raise if it is the armed one."""
        if place not in self._left:
            return
        self._left[place] -= 1
        if self._left[place] < 0:
            del self._left[place]
            self.num_raised += 1
            raise self._make()

    def hook(self, _: torch.Tensor) -> None:
        """Strike in the backward; for `Tensor.register_hook`."""
        self.strike(Place.BACKWARD)

    def __enter__(self) -> "Faults":
        original, faults = self._sweep, self

        def sweep(self: Run, step: RunnableBlock, state: list[Any]) -> list[Any]:
            return original(self, _FaultyStep(step, faults), state)

        Run.sweep = sweep
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        Run.sweep = self._sweep


class _FaultyStep:
    """A step whose runs may raise."""

    def __init__(self, step: RunnableBlock, faults: Faults) -> None:
        self._step = step
        self._faults = faults

    @property
    def name(self) -> str:
        return self._step.name

    @property
    def is_random(self) -> bool:
        return self._step.is_random

    @property
    def has_regions(self) -> bool:
        return self._step.has_regions

    @property
    def is_out_of_place(self) -> bool:
        return self._step.is_out_of_place

    def first(self, state: list[Any]) -> list[Any]:
        self._faults.strike(Place.FORWARD)
        return self._step.first(state)

    def again(self, state: list[Any]) -> list[Any]:
        self._faults.strike(Place.REPLAY)
        return self._step.again(state)
