"""Turn the forward of a `torch.nn.Module` into a framework-free `Graph` and into callable pieces."""

from tinybp_lightning.capture.torch.pieces import Piece, Program, cut_program
from tinybp_lightning.capture.torch.record import capture_graph, record_graph

__all__ = ["Piece", "Program", "capture_graph", "cut_program", "record_graph"]
