"""How coarse may the table be, and where may a plan store? The dynamic program's grids of bytes and of boundaries."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.planner.states import Tables

__all__ = ["Grid", "Tree", "slot_bytes", "storable_boundaries"]

_UNITS_TRIED = 2000
_MAX_WINDOW = 4
_SLOPE_SHARE = 8
"""What a byte is worth is taken over this part of a budget."""


class Tree(Protocol):
    """A filled table: the least seconds for every number of slots, and a schedule for each."""

    @property
    def num_slots(self) -> int:
        """The most slots it is filled for."""
        ...

    @property
    def seconds(self) -> NDArray[np.float32] | NDArray[np.float64]:
        """The least seconds of a whole step for 0, 1, 2, … slots."""
        ...

    def schedule(self, slots: int) -> Schedule:
        """Return the fastest schedule for `slots`."""
        ...


class Grid:
    """One slot size: its table, filled as far as the largest budget asked for.

    **Arguments:** `fill`: makes the table for a number of slots. `step`: try schedules for every so many slots only.
    """

    def __init__(self, fill: Callable[[int], Tree], *, unit_bytes: int, num_slots: int, step: int = 1) -> None:
        self._step = step
        self._fill = fill
        self.unit_bytes = unit_bytes
        self.span_bytes = unit_bytes * num_slots
        self._max_slots = num_slots
        self._tree: Tree | None = None

    def spans(self, left_bytes: int) -> bool:
        """Whether the table goes on past the margin above `left_bytes`."""
        return self._wanted(left_bytes) <= self._max_slots

    def tree(self, left_bytes: int) -> Tree:
        """Return the table, filled at least up to the margin above `left_bytes`, or to its end."""
        num_slots = min(self._max_slots, self._wanted(left_bytes))
        if self._tree is None or num_slots > self._tree.num_slots:
            self._tree = self._fill(num_slots)
        return self._tree

    def steps(self, left_bytes: int) -> list[tuple[int, float]]:
        """Return slots and seconds of the schedules worth trying, fastest first: the fewest slots for each time."""
        step = self._step
        slots = np.arange(0, self._wanted(left_bytes) + 1, step)
        seconds = self.tree(left_bytes).seconds[slots[slots <= self.tree(left_bytes).num_slots]]
        rises = np.concatenate([[True], seconds[1:] < seconds[:-1]])
        starts = np.flatnonzero(np.isfinite(seconds) & rises)
        return [(int(slots[k]), float(seconds[k])) for k in reversed(starts)]

    def seconds_per_byte(self, left_bytes: int) -> float:
        """Return about how many seconds one more byte than `left_bytes` saves; 0 where fewer bytes have no schedule."""
        last = min(left_bytes // self.unit_bytes, self.tree(left_bytes).num_slots)
        seconds = self.tree(left_bytes).seconds[: last + 1]
        first = max(int(np.isfinite(seconds).argmax()), last - last // _SLOPE_SHARE)
        if first == last or not np.isfinite(seconds[last]):
            return 0.0
        return float(seconds[first] - seconds[last]) / ((last - first) * self.unit_bytes)

    def schedule(self, slots: int) -> Schedule:
        """Return the table's schedule for `slots`, which `steps` named."""
        assert self._tree is not None
        return self._tree.schedule(slots)

    def _wanted(self, left_bytes: int) -> int:
        margin = 0 if self.unit_bytes == 1 else 4 + left_bytes // (50 * self.unit_bytes)
        return left_bytes // self.unit_bytes + margin


def slot_bytes(tables: Tables, *, wanted_bytes: int, whole_bytes: int = 0) -> int:
    """Return a slot size of `wanted_bytes` to a quarter more, one that the sizes in the chain are close to whole in.

    **Arguments:** `whole_bytes`: a size that has to be just below whole, if such a slot size is there; 0 for none.
    """
    if wanted_bytes <= 1:
        return 1
    held = [keep.held_bytes for state in tables.states for keep in state.keeps]
    held += [int(state.split_held_bytes[0]) for state in tables.states if len(state.split_held_bytes)]
    sizes, counts = np.unique(np.array(held, np.int64), return_counts=True)
    units = np.unique(np.linspace(wanted_bytes, wanted_bytes + wanted_bytes // 4, _UNITS_TRIED).astype(np.int64))
    if whole_bytes:
        numbers = np.arange(max(1, whole_bytes // int(units[-1])), whole_bytes // int(units[0]) + 2)
        whole = -(-whole_bytes // numbers)
        near = whole[(units[0] <= whole) & (whole <= units[-1])]
        units = near if len(near) else units
    error = (2 * sizes + units[:, None]) // (2 * units[:, None]) - sizes / units[:, None]
    return int(units[(np.abs(error) * counts).sum(axis=1).argmin()])


def storable_boundaries(chain: Chain, *, limit: int) -> tuple[int, ...]:
    """Return the interior boundaries where a plan may store: all of them on short chains, else the narrow ones.

    **Arguments:** `limit`: the most cuts. A window widens until those that are narrowest in theirs, ties included, are
    few enough; where all are alike, every second or third one is as good.
    """
    num_blocks = len(chain.blocks)
    size = [sum(chain.storage_bytes[s] for s in boundary.storages) for boundary in chain.boundaries]
    cuts = tuple(range(1, num_blocks))
    for window in range(1, _MAX_WINDOW + 1):
        if len(cuts) > limit:
            cuts = tuple(i for i in range(1, num_blocks) if size[i] <= min(size[max(1, i - window) : i + window + 1]))
    return cuts[:: -(-len(cuts) // limit) or 1]
