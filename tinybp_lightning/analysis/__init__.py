"""What a graph costs: its shape, what is in the way of compressing it, lower bounds on memory, and the report."""

from tinybp_lightning.analysis.bounds import Bottleneck, Phase, WidestOp, peak_bottleneck, peak_lower_bound, widest_op
from tinybp_lightning.analysis.diagnosis import SKINNY_RATIO, Diagnosis, LongSkip, WidestPoint, diagnose
from tinybp_lightning.analysis.estimate import estimate_chain
from tinybp_lightning.analysis.report import BlockGroup, GraphReport, format_bytes, report_graph

__all__ = [
    "SKINNY_RATIO",
    "BlockGroup",
    "Bottleneck",
    "Diagnosis",
    "GraphReport",
    "LongSkip",
    "Phase",
    "WidestOp",
    "WidestPoint",
    "diagnose",
    "estimate_chain",
    "format_bytes",
    "peak_bottleneck",
    "peak_lower_bound",
    "report_graph",
    "widest_op",
]
