"""Run every piece by the user's own kernels, bit for bit as in plain training."""

from collections.abc import Callable, Collection, Hashable, Sequence

import torch
from torch import fx

from tinybp_lightning.capture.torch.pieces import Piece, Program, cut_program, reorder
from tinybp_lightning.graph.cuts.narrow import Granularity
from tinybp_lightning.graph.cuts.products import has_room_for_products, saved_bytes
from tinybp_lightning.graph.cuts.reorder import delay_ops
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.torch.executors.executor import Call, Cut, Forecast
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs

__all__ = ["EagerExecutor"]


class EagerExecutor:
    """The pieces as they were cut: nothing to prepare, and one option each."""

    def cut(
        self,
        module: fx.GraphModule,
        graph: Graph,
        *,
        budget_share: Callable[[int], float],
        may_move_parameters: bool,
    ) -> Cut:
        """Cut finely; where the budget has room for the results of compute-heavy ops, a cut keeps each of them."""
        if not has_room_for_products(budget_share(saved_bytes(graph))):
            return Cut(cut_program(module, graph, granularity=Granularity.FINE))
        moved, original = delay_ops(graph, may_move_parameters=False), None
        if may_move_parameters:
            further = delay_ops(graph, may_move_parameters=True)
            if further != moved:
                moved, original = further, graph
        return Cut(cut_program(module, reorder(module, moved), granularity=Granularity.PRODUCTS), original)

    def prepare(
        self,
        program: Program,
        externals: Callable[[], NonBoundaryInputs],
        devices: Sequence[torch.device],
        on_piece: Callable[[int, int], None],
    ) -> Program:
        """Return `program`: its calls are the user's own."""
        return program

    def unprepared(self, program: Program, options: Collection[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        """Return nothing: option 0 can always run."""
        return frozenset()

    def prepare_options(
        self,
        program: Program,
        externals: Callable[[], NonBoundaryInputs],
        devices: Sequence[torch.device],
        wanted: Collection[tuple[int, int]],
        on_piece: Callable[[int, int], None],
    ) -> None:
        """Refuse: there are no further options."""
        assert not wanted, "eager pieces have one option"

    def forecast(self, call: Call) -> Forecast | None:
        """Return nothing: every call can be measured."""
        return None

    def is_ready(self, call: Call) -> bool:
        """Return True."""
        return True

    def code_of(self, piece: Piece) -> Hashable:
        """Return nothing: pieces of one signature run the same kernels."""
        return None
