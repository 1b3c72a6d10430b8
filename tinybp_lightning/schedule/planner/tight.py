"""What do schedules with helpers add to interval trees? A table of them, for a long chain of its merged one.

Helpers pay where bytes are short (`helped` says why), so the table spans little more than the smallest budgets, but all
of them on a short chain; for the smallest of all, schedules are made to the byte. The planner is the only one who asks.
"""

import numpy as np

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.grid import Grid, slot_bytes
from tinybp_lightning.schedule.planner.groups import group_starts, neediest_bytes, without_small
from tinybp_lightning.schedule.planner.helped import HelperTree, helper_rows
from tinybp_lightning.schedule.planner.helped_floor import HelperFloor, ThriftyHelper
from tinybp_lightning.schedule.planner.layered import LayeredTree, layered_cells, layered_work
from tinybp_lightning.schedule.planner.layers import Layers, find_layers, move_signatures
from tinybp_lightning.schedule.planner.merged import Merged, merge
from tinybp_lightning.schedule.planner.states import Tables

__all__ = ["helped_grid", "helped_span_bytes", "tight_schedules"]

_SHORT_BLOCKS = 16
_SHORT_SLOTS = 512
_HELPED_BLOCKS = 72
_HELPED_SLOTS = 600
_HELPED_CELLS = 4e7
_MERGED_BLOCKS = 330
_MERGED_SLOTS = 128
_MERGED_WORK = 6e9
"""About how many additions the table of a merged chain may take: three seconds, since few slots have finite times."""
_MERGED_CELLS = 1e8
"""Times kept: 400 MB."""
_LEAST_SLOTS = 48
_HELPED_SPAN = 1.5
"""The table spans budgets up to so many times the smallest tree's."""
_WIDEST_UNIT = 1.25
"""Its slots are up to so many times as large as wanted (`slot_bytes`)."""


def helped_grid(chain: Chain, *, tree_bytes: int, largest_bytes: int) -> Grid | None:
    """Return the table of schedules with helpers; `None` for a long chain that is not made of equal layers.

    **Arguments:** `tree_bytes`: what the smallest interval tree needs, workspace left out; `largest_bytes`: the budget
    above which no plan gets faster.
    """
    num_blocks = len(chain.blocks)
    if num_blocks > _HELPED_BLOCKS:
        return _merged_grid(chain)
    tables = Tables(chain, cuts=tuple(range(1, num_blocks)), passing=True)
    if num_blocks <= _SHORT_BLOCKS:
        return _grid(tables, unit_bytes=max(1, -(-largest_bytes // _SHORT_SLOTS)), num_slots=_SHORT_SLOTS)
    num_slots = int(np.clip(_HELPED_CELLS / helper_rows(tables), 64, _HELPED_SLOTS))
    unit_bytes = slot_bytes(tables, wanted_bytes=int(_HELPED_SPAN * tree_bytes) // num_slots)
    return _grid(tables, unit_bytes=unit_bytes, num_slots=num_slots)


def helped_span_bytes(chain: Chain, *, tree_bytes: int) -> int | None:
    """Return up to which bytes, workspace left out, helpers are looked for; `None` on a short chain: at any.

    **Arguments:** `tree_bytes`: what the smallest interval tree needs.
    """
    return None if len(chain.blocks) <= _SHORT_BLOCKS else int(_WIDEST_UNIT * _HELPED_SPAN * tree_bytes)


def tight_schedules(grid: Grid) -> list[Schedule]:
    """Return schedules for the smallest budget and some above it, which keep them to the byte.

    **Arguments:** `grid`: of `helped_grid`. There are none for a merged chain, whose bytes are estimates.
    """
    tree = grid.tree(grid.span_bytes)
    if not isinstance(tree, HelperTree):
        return []
    thrifty = ThriftyHelper(HelperFloor(tree.tables), tree, unit_bytes=grid.unit_bytes)
    return [thrifty.schedule(left_bytes) for left_bytes in thrifty.steps(grid.span_bytes)]


class _MergedTree:
    """The table of a merged chain, with schedules of the chain itself."""

    def __init__(self, merged: Merged, tree: LayeredTree) -> None:
        self._merged = merged
        self._tree = tree
        self.num_slots = tree.num_slots
        self.seconds = tree.seconds

    def schedule(self, slots: int) -> Schedule:
        """Return the fastest schedule for `slots`, in the table's rounded bytes."""
        return self._merged.expand(self._tree.schedule(slots))


def _merged_grid(chain: Chain) -> Grid | None:
    """Return the table of a long chain, with neighbouring blocks as one, so that few enough are left."""
    merged = merge(chain, group_starts(chain, most_groups=_MERGED_BLOCKS))
    num_blocks = len(merged.chain.blocks)
    if num_blocks > _MERGED_BLOCKS:
        return None
    for planned in (merged.chain, without_small(merged.chain)):
        # Layers are more alike without what hardly weighs in; then that is left to the rounding of slots.
        tables = Tables(planned, cuts=tuple(range(1, num_blocks)), passing=True)
        layers = find_layers(move_signatures(tables))
        affordable = min(_MERGED_WORK / layered_work(tables, layers), _MERGED_CELLS / layered_cells(tables, layers))
        num_slots = min(_MERGED_SLOTS, int(affordable))
        if num_slots >= _LEAST_SLOTS:
            return _layered_grid(merged, tables, layers, num_slots=num_slots)
    return None


def _layered_grid(merged: Merged, tables: Tables, layers: Layers, *, num_slots: int) -> Grid:
    # No schedule takes less than the neediest block: whole slots for it leave most bytes to the smallest budget.
    least_bytes = neediest_bytes(merged.chain)
    unit_bytes = slot_bytes(tables, wanted_bytes=int(_HELPED_SPAN * least_bytes) // num_slots, whole_bytes=least_bytes)

    def fill(_: int) -> _MergedTree:
        # All of it at once: the few slots of the smallest budgets are most of the work.
        return _MergedTree(merged, LayeredTree(tables, layers, unit_bytes=unit_bytes, num_slots=num_slots))

    return Grid(fill, unit_bytes=unit_bytes, num_slots=num_slots)


def _grid(tables: Tables, *, unit_bytes: int, num_slots: int) -> Grid:
    def fill(num_slots: int) -> HelperTree:
        return HelperTree(tables, unit_bytes=unit_bytes, num_slots=num_slots)

    return Grid(fill, unit_bytes=unit_bytes, num_slots=num_slots)
