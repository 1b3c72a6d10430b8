"""What an executor decides: how a traced forward is cut, what runs its pieces, and which options the pieces have."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from tinybp_lightning.capture.torch.pieces import Program
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs

__all__ = ["Call", "Capture", "Cut", "Executor", "Forecast", "Preparation"]

Call = Callable[[list[Any]], Sequence[Any]]
"""One of a piece's `calls`: takes its arguments as one list, which it empties, and returns what the piece makes."""


@dataclass(frozen=True, slots=True)
class Capture:
    """A traced forward to cut: `module`, and its record `graph`.

    `budget_share`: returns about which share the budget is of so many bytes of saved activations.
    `may_move_parameters`: nobody sees in which order parameters get their gradients.
    """

    module: fx.GraphModule
    graph: Graph
    budget_share: Callable[[int], float]
    may_move_parameters: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A traced forward in pieces; `original` is its record, if calls were moved so that parameters' hooks notice."""

    program: Program
    original: Graph | None = None


@dataclass(frozen=True, slots=True)
class Preparation:
    """What preparing a program's pieces takes.

    `externals`: returns values that preparing may change in place. `on_piece(done, total)` shows progress.
    """

    program: Program
    externals: Callable[[], NonBoundaryInputs]
    devices: Sequence[torch.device]
    on_piece: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What an option of a piece will save and repeat, before it can run.

    `saved_bytes`: what it saves beside what the piece takes and returns. `saved_arguments`, `saved_results`: positions
    of those that are saved too. `repeated_share`: of the forward's time, what backward repeats beyond option 0.
    """

    saved_bytes: int
    saved_arguments: tuple[int, ...]
    saved_results: tuple[int, ...]
    repeated_share: float


class Executor(Protocol):
    """Runs pieces in one way. It holds no state: what it prepares is in the program that it returns.

    By default pieces run the user's own code, which needs no preparation and has one option. A piece whose calls are
    other code says so (`Piece.is_compiled`): its first run works on copies of what the forward changes.
    """

    def cut(self, capture: Capture) -> Cut:
        """Cut a traced forward, and perhaps bring its calls into another legal order."""
        ...

    def prepare(self, asked: Preparation) -> Program:
        """Return the program ready to run by option 0; the same object if there is nothing to prepare."""
        return asked.program

    def unprepared(self, program: Program, options: Collection[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        """Return those of `options`, pairs of a piece's position and an option's number, that cannot run yet."""
        return frozenset((i, o) for i, o in options if not self.is_ready(program.pieces[i].calls[o]))

    def prepare_options(self, asked: Preparation, wanted: Collection[tuple[int, int]]) -> None:
        """Make the options in `wanted` (see `unprepared`) runnable, for all equal pieces."""
        assert not wanted, "every option can run"

    def forecast(self, call: Call) -> Forecast | None:
        """Return the forecast of one of a piece's `calls`; `None` for option 0 and for what was prepared at once."""
        return None

    def is_ready(self, call: Call) -> bool:
        """Return whether one of a piece's `calls` can run."""
        return True
