"""The frozen graph of one forward pass, its frontiers, cuts and blocks, and the chain that is cut from it."""

from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.cuts.narrow import BlockSpan, Granularity, choose_cuts, cut_blocks
from tinybp_lightning.graph.frontier import CutObstacle, FrontierProfile, Life, frontier_profile
from tinybp_lightning.graph.ids import BlockId, BoundaryId, NodeId, OptionId, StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node, Storage, StorageKind, Value
from tinybp_lightning.graph.signature import block_signature, graph_signature, layout_signature
from tinybp_lightning.graph.verify import verify_chain, verify_graph

__all__ = [
    "Block",
    "BlockId",
    "BlockSpan",
    "Boundary",
    "BoundaryId",
    "Chain",
    "CutObstacle",
    "FrontierProfile",
    "Granularity",
    "Graph",
    "Life",
    "Node",
    "NodeId",
    "OptionId",
    "SavedSet",
    "Storage",
    "StorageId",
    "StorageKind",
    "Value",
    "ValueId",
    "block_signature",
    "choose_cuts",
    "cut_blocks",
    "frontier_profile",
    "graph_signature",
    "layout_signature",
    "verify_chain",
    "verify_graph",
]
