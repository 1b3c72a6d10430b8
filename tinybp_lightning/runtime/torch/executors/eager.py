"""Run every piece by the user's own kernels, bit for bit as in plain training."""

from collections.abc import Callable

from torch import fx

from tinybp_lightning.capture.torch.pieces import cut_program, reorder
from tinybp_lightning.graph.cuts.narrow import Granularity
from tinybp_lightning.graph.cuts.products import has_room_for_products, saved_bytes
from tinybp_lightning.graph.cuts.reorder import delay_ops
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.runtime.torch.executors.executor import Cut, Executor

__all__ = ["EagerExecutor"]


class EagerExecutor(Executor):
    """The pieces as they were cut."""

    def cut(
        self,
        module: fx.GraphModule,
        graph: Graph,
        *,
        budget_share: Callable[[int], float],
        may_move_parameters: bool,
    ) -> Cut:
        """Cut finely; if the budget can hold the results of compute-heavy ops, cut so that a plan can keep each."""
        if not has_room_for_products(budget_share(saved_bytes(graph))):
            return Cut(cut_program(module, graph, granularity=Granularity.FINE))
        moved, original = delay_ops(graph, may_move_parameters=False), None
        if may_move_parameters:
            further = delay_ops(graph, may_move_parameters=True)
            if further != moved:
                moved, original = further, graph
        return Cut(cut_program(module, reorder(module, moved), granularity=Granularity.PRODUCTS), original)
