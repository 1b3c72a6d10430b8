"""Run every piece by the user's own kernels, bit for bit as in plain training."""

from tinybp_lightning.capture.torch.pieces import cut_program, reorder
from tinybp_lightning.graph.cuts.narrow import Granularity
from tinybp_lightning.graph.cuts.products import has_room_for_products, saved_bytes
from tinybp_lightning.graph.cuts.reorder import delay_ops
from tinybp_lightning.runtime.torch.executors.executor import Capture, Cut, Executor

__all__ = ["EagerExecutor"]


class EagerExecutor(Executor):
    """The pieces as they were cut."""

    def cut(self, capture: Capture) -> Cut:
        """Cut finely; if the budget can hold the results of compute-heavy ops, cut so that a plan can keep each."""
        module, graph = capture.module, capture.graph
        if not has_room_for_products(capture.budget_share(saved_bytes(graph))):
            return Cut(cut_program(module, graph, granularity=Granularity.FINE))
        moved, original = delay_ops(graph, may_move_parameters=False), None
        if capture.may_move_parameters:
            further = delay_ops(graph, may_move_parameters=True)
            if further != moved:
                moved, original = further, graph
        return Cut(cut_program(module, reorder(module, moved), granularity=Granularity.PRODUCTS), original)
