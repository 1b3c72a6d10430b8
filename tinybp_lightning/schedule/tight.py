"""What do schedules with helpers add to interval trees? A table of them for a chain that is not long.

Helpers pay where bytes are short (`helped` says why), so the table spans little more than the smallest budgets, but all
of them on a short chain; for the smallest of all, schedules are made to the byte. The planner is the only one who asks.
"""

import numpy as np

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.grid import Grid, slot_bytes
from tinybp_lightning.schedule.helped import HelperTree, helper_rows
from tinybp_lightning.schedule.helped_floor import HelperFloor, ThriftyHelper
from tinybp_lightning.schedule.tables import Tables

__all__ = ["helped_grid", "tight_schedules"]

_SHORT_BLOCKS = 16
_SHORT_SLOTS = 512
_HELPED_BLOCKS = 72
_HELPED_SLOTS = 600
_HELPED_CELLS = 4e7
_HELPED_SPAN = 1.5
"""The table spans budgets up to so many times the smallest tree's."""


def helped_grid(chain: Chain, *, tree_bytes: int, largest_bytes: int) -> Grid | None:
    """Return the table of schedules with helpers; `None` for a long chain.

    **Arguments:** `tree_bytes`: what the smallest interval tree needs, workspace left out; `largest_bytes`: the budget
    above which no plan gets faster.
    """
    num_blocks = len(chain.blocks)
    if num_blocks > _HELPED_BLOCKS:
        return None
    tables = Tables(chain, cuts=tuple(range(1, num_blocks)), passing=True)
    if num_blocks <= _SHORT_BLOCKS:
        return _grid(tables, unit_bytes=max(1, -(-largest_bytes // _SHORT_SLOTS)), num_slots=_SHORT_SLOTS)
    num_slots = int(np.clip(_HELPED_CELLS / helper_rows(tables), 64, _HELPED_SLOTS))
    unit_bytes = slot_bytes(tables, wanted_bytes=int(_HELPED_SPAN * tree_bytes) // num_slots)
    return _grid(tables, unit_bytes=unit_bytes, num_slots=num_slots)


def tight_schedules(grid: Grid) -> list[Schedule]:
    """Return schedules for the smallest budget and some above it, which keep them to the byte.

    **Arguments:** `grid`: of `helped_grid`.
    """
    tree = grid.tree(grid.span_bytes)
    assert isinstance(tree, HelperTree)
    thrifty = ThriftyHelper(HelperFloor(tree.tables), tree, unit_bytes=grid.unit_bytes)
    return [thrifty.schedule(left_bytes) for left_bytes in thrifty.steps(grid.span_bytes)]


def _grid(tables: Tables, *, unit_bytes: int, num_slots: int) -> Grid:
    def fill(num_slots: int) -> HelperTree:
        return HelperTree(tables, unit_bytes=unit_bytes, num_slots=num_slots)

    return Grid(fill, unit_bytes=unit_bytes, num_slots=num_slots)
