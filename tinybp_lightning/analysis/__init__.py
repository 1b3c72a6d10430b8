"""What a graph costs: its shape, what is in the way of compressing it, lower bounds on memory, and the report."""

from tinybp_lightning.analysis.bounds import Bottleneck, Phase, WidestOp, peak_bottleneck, peak_lower_bound, widest_op
from tinybp_lightning.analysis.diagnosis import SKINNY_RATIO, Diagnosis, LongSkip, WidestPoint, diagnose
from tinybp_lightning.analysis.estimate import OPERATIONS_PER_S, BlockSeconds, count_operations, estimate_chain
from tinybp_lightning.analysis.report import BlockGroup, GraphReport, format_bytes, report_graph

__all__ = [
    "OPERATIONS_PER_S",
    "SKINNY_RATIO",
    "BlockGroup",
    "BlockSeconds",
    "Bottleneck",
    "Diagnosis",
    "GraphReport",
    "LongSkip",
    "Phase",
    "WidestOp",
    "WidestPoint",
    "count_operations",
    "diagnose",
    "estimate_chain",
    "format_bytes",
    "peak_bottleneck",
    "peak_lower_bound",
    "report_graph",
    "widest_op",
]
