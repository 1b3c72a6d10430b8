"""Turn a `torch.nn.Module`'s forward into a framework-free `Graph` and into callable pieces of itself."""

from tinybp_lightning.capture.torch.pieces import Piece, Program, cut_program
from tinybp_lightning.capture.torch.record import record_graph
from tinybp_lightning.capture.torch.whole import capture_graph

__all__ = ["Piece", "Program", "capture_graph", "cut_program", "record_graph"]
