"""The ids that all stages share; each is an index into a tuple of its owner."""

from typing import NewType

__all__ = ["BlockId", "BoundaryId", "NodeId", "OptionId", "StorageId", "ValueId"]

NodeId = NewType("NodeId", int)
ValueId = NewType("ValueId", int)
StorageId = NewType("StorageId", int)
BlockId = NewType("BlockId", int)
BoundaryId = NewType("BoundaryId", int)
OptionId = NewType("OptionId", int)
