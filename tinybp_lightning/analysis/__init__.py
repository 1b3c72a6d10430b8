"""What a graph costs: its shape, the obstacles to compressing it, estimated costs, and the report."""

from tinybp_lightning.analysis.diagnosis import (
    SKINNY_RATIO,
    Diagnosis,
    LongSkip,
    WidestOp,
    WidestPoint,
    diagnose,
    widest_op,
)
from tinybp_lightning.analysis.estimate import OPERATIONS_PER_S, BlockSeconds, count_operations, estimate_chain
from tinybp_lightning.analysis.report import BlockGroup, GraphReport, format_bytes, report_graph

__all__ = [
    "OPERATIONS_PER_S",
    "SKINNY_RATIO",
    "BlockGroup",
    "BlockSeconds",
    "Diagnosis",
    "GraphReport",
    "LongSkip",
    "WidestOp",
    "WidestPoint",
    "count_operations",
    "diagnose",
    "estimate_chain",
    "format_bytes",
    "report_graph",
    "widest_op",
]
