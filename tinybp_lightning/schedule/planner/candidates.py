"""Which schedules may answer a budget? Baselines, interval trees of many sizes, and schedules with helpers.

They come from *sources*: a few schedules, or a table (`grid`) that has one for every number of slots. A source's
*reach* is the largest peak of anything it offers. Where no schedule within the reach can be as fast as one that is
known to fit (`quick`), the source is not asked, and its table not filled.

# Note [Monotone by construction]
Sources and their reach depend on the chain alone, and a budget asks every source, or one that cannot help is passed
over: a coarse table spans all budgets, each finer one the lowest quarter of the one before; a budget asks the finest
table that spans it and all finer ones. So every candidate for a budget is one for any larger budget, and time never
rises with it. A table is sorted by time: walking it down from a margin above the budget, the first schedule that fits
is its best. Where a chain is so short that all schedules are searched, the plan is the optimum, which never rises with
the budget either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.schedule.actions import Backward, ForwardSave, Schedule
from tinybp_lightning.schedule.baselines import every_sqrt_n, keep_all, per_block
from tinybp_lightning.schedule.planner.exact import faster_schedule, is_searchable
from tinybp_lightning.schedule.planner.grid import Grid, slot_bytes, storable_boundaries
from tinybp_lightning.schedule.planner.memory_floor import Floor, Thrifty
from tinybp_lightning.schedule.planner.quick import QuickBound
from tinybp_lightning.schedule.planner.sharing import Sharing, share_segments
from tinybp_lightning.schedule.planner.states import Tables
from tinybp_lightning.schedule.planner.tight import helped_grid, helped_span_bytes, tight_schedules
from tinybp_lightning.schedule.planner.tree import IntervalTree
from tinybp_lightning.schedule.simulator import Timeline, simulate

__all__ = ["Candidate", "Candidates", "LeastSeconds"]

LeastSeconds = Callable[[int], float]
"""Seconds below which no schedule within a budget goes, by the budget in bytes."""

_WORK = 4e8
"""Elementary steps of the dynamic program that take about a second; the number of slots follows from it."""
_MAX_SLOTS = 2048
_MAX_STEPS = 512
_MANY_BLOCKS = 150
_MAX_CELLS = 4e7
_MAX_CUTS = 200
_FINER = 4
_TIME_TOLERANCE = 1e-5
"""The table's times are float32 sums; candidates this close are compared by their exact times."""
_SURELY = 1 + 1e-9
"""A bound this much above is above whatever the order of its sum."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule, and what the exact simulator says of it."""

    schedule: Schedule
    timeline: Timeline

    @property
    def cost(self) -> tuple[float, int]:
        """Seconds, then bytes: the least is best."""
        return self.timeline.total_s, self.timeline.peak_bytes


class Candidates:
    """All candidates of one chain; tables are filled once, when first asked, as far as the largest budget asked for."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._quick = QuickBound(chain)
        self._tables = Tables(chain, cuts=storable_boundaries(chain, limit=_MAX_CUTS))
        self._known: dict[tuple[int, int], Candidate] = {}
        self._searched: dict[int, Candidate] = {}

    def first(self, budget_bytes: int) -> Candidate | None:
        """Return the fastest candidate of the sources that reach furthest; `None` if none of theirs fits."""
        if budget_bytes < self._tree_bytes:
            return None
        return self._walk(self._spanning(budget_bytes)[0], budget_bytes, self._baseline(budget_bytes))

    def best(self, budget_bytes: int, *, least_s: LeastSeconds | None = None) -> Candidate | None:
        """Return the fastest candidate within `budget_bytes`; `None` if not even the smallest fits.

        **Arguments:** `least_s`: a bound for budgets up to this one, by which more sources can be passed over.
        """
        # The smallest tree fits there, and what has an even smaller peak has to be made before its peak is known.
        if budget_bytes < self._tree_bytes and budget_bytes < self.smallest.timeline.peak_bytes:
            return None
        best = self._baseline(budget_bytes)
        if best is not None and best.timeline.total_s <= self._plain_s:
            return best
        if not is_searchable(self._chain):
            return self._search(budget_bytes, best, least_s)
        if budget_bytes not in self._searched:
            self._searched[budget_bytes] = self._optimum(budget_bytes, self._search(budget_bytes, best, least_s))
        return self._searched[budget_bytes]

    def seconds_per_byte(self, budget_bytes: int) -> float:
        """Return about how many seconds one more byte would save; 0 where no table says."""
        return self._spanning(budget_bytes)[0].seconds_per_byte(budget_bytes - self._chain.workspace_bytes)

    @cached_property
    def fastest(self) -> Candidate:
        """Every block keeps the option with the fastest backward: no schedule takes less time."""
        blocks = self._chain.blocks
        fastest = [min(range(len(b.options)), key=lambda o: (b.options[o].backward_s, o)) for b in blocks]
        saves = [ForwardSave(BlockId(b), OptionId(o)) for b, o in enumerate(fastest)]
        backwards = [Backward(BlockId(b), OptionId(o)) for b, o in enumerate(fastest)]
        return self._candidate(Schedule(num_blocks=len(fastest), actions=(*saves, *reversed(backwards))))

    @cached_property
    def smallest(self) -> Candidate:
        """The candidate with the smallest peak; on a short chain helpers can reach below the smallest tree."""
        known = [self._smallest_tree, *self._tight[:1]]
        steps = self._helped.steps(self._floor.smallest_bytes) if self._helped else []
        if self._helped and steps:
            known.append(self._at(self._helped, steps[-1][0]))
        return min(known, key=lambda c: c.timeline.peak_bytes)

    def _search(self, budget_bytes: int, best: Candidate | None, least_s: LeastSeconds | None) -> Candidate:
        """Ask the sources, those first that reach furthest. See Note [Monotone by construction]."""

        def may_help(reach_bytes: int | None) -> bool:
            if best is None or reach_bytes is None or reach_bytes > left_bytes:
                return True
            least = [
                bound(reach_bytes + self._chain.workspace_bytes) for bound in (self._quick.value_s, least_s) if bound
            ]
            return max(least) <= best.timeline.total_s * _SURELY

        workspace_bytes = self._chain.workspace_bytes
        left_bytes = budget_bytes - workspace_bytes
        for grid in self._spanning(budget_bytes):
            if may_help(grid.span_bytes):
                best = self._walk(grid, budget_bytes, best)
        reach_bytes = helped_span_bytes(self._chain, tree_bytes=self._floor.smallest_bytes)
        if may_help(reach_bytes) and self._helped:
            best = self._walk(self._helped, budget_bytes, best, reach_bytes=reach_bytes)
            best = _better(best, self._tight, budget_bytes)
        if may_help(self._floor.smallest_bytes):
            best = _better(best, [self._smallest_tree, self.smallest], budget_bytes)
        assert best is not None, "the smallest candidate fits"
        return best

    def _spanning(self, budget_bytes: int) -> list[Grid]:
        """The finest table that spans a budget, and all finer ones."""
        left_bytes = budget_bytes - self._chain.workspace_bytes
        coarser = [k for k, grid in enumerate(self._grids) if grid.spans(left_bytes)]
        return self._grids[coarser[-1] if coarser else 0 :]

    def _walk(
        self, grid: Grid, budget_bytes: int, best: Candidate | None, *, reach_bytes: int | None = None
    ) -> Candidate | None:
        """Walk a table down from the margin; what does not fit into its span, or `reach_bytes`, is not its to offer."""
        workspace_bytes = self._chain.workspace_bytes
        most_bytes = min(budget_bytes, (grid.span_bytes if reach_bytes is None else reach_bytes) + workspace_bytes)
        for slots, seconds in grid.steps(budget_bytes - workspace_bytes):
            if best is not None and seconds > best.timeline.total_s * (1 + _TIME_TOLERANCE):
                break
            best = _better(best, [self._at(grid, slots)], most_bytes)
        return best

    def _baseline(self, budget_bytes: int) -> Candidate | None:
        return _better(None, [self.fastest, *self._baselines], budget_bytes)

    def _optimum(self, budget_bytes: int, best: Candidate) -> Candidate:
        """Return a faster candidate than `best` if any schedule at all is faster."""
        faster = faster_schedule(self._chain, budget_bytes=budget_bytes, known_s=best.timeline.total_s)
        return best if faster is None else self._candidate(faster)

    def _at(self, grid: Grid, slots: int) -> Candidate:
        key = (id(grid), slots)
        if key not in self._known:
            self._known[key] = self._candidate(grid.schedule(slots))
        return self._known[key]

    def _candidate(self, schedule: Schedule) -> Candidate:
        return Candidate(schedule, simulate(self._chain, schedule))

    # ---- sources -----------------------------------------------------------------------------------------------

    @cached_property
    def _plain_s(self) -> float:
        return self.fastest.timeline.total_s

    @cached_property
    def _baselines(self) -> list[Candidate]:
        return [self._candidate(method(self._chain)) for method in (keep_all, per_block, every_sqrt_n)]

    @cached_property
    def _floor(self) -> Floor:
        return Floor(self._tables)

    @property
    def _tree_bytes(self) -> int:
        """A budget that some interval tree fits into."""
        return self._floor.smallest_bytes + self._chain.workspace_bytes

    @cached_property
    def _smallest_tree(self) -> Candidate:
        left_bytes = self._floor.smallest_bytes
        grid = self._grids[-1]
        tree = grid.tree(left_bytes)
        assert isinstance(tree, IntervalTree)
        thrifty = Thrifty(self._floor, tree, unit_bytes=grid.unit_bytes)
        return self._candidate(thrifty.schedule(left_bytes))

    @cached_property
    def _grids(self) -> list[Grid]:
        """The tables for this chain, coarsest first, down to slots of one byte or to the smallest budget."""
        sharing = share_segments(self._tables)
        affordable = min(_WORK / (sharing.work + 1), _MAX_CELLS / (sharing.num_rows + 1))
        num_slots = int(np.clip(affordable, 64, _MAX_SLOTS))
        grids = [self._grid(sharing, -(-self.fastest.timeline.peak_bytes // num_slots), num_slots)]
        while grids[-1].unit_bytes > 1 and grids[-1].span_bytes > _FINER * self._floor.smallest_bytes:
            grids.append(self._grid(sharing, -(-grids[-1].unit_bytes // _FINER), num_slots))
        return grids

    def _grid(self, sharing: Sharing, wanted_bytes: int, num_slots: int) -> Grid:
        unit_bytes = slot_bytes(self._tables, wanted_bytes=wanted_bytes)

        def fill(num_slots: int) -> IntervalTree:
            return IntervalTree(self._tables, sharing, unit_bytes=unit_bytes, num_slots=num_slots)

        step = 1 if len(self._chain.blocks) <= _MANY_BLOCKS else max(1, num_slots // _MAX_STEPS)
        return Grid(fill, unit_bytes=unit_bytes, num_slots=num_slots, step=step)

    @cached_property
    def _helped(self) -> Grid | None:
        """One more table, of schedules with helpers, for a chain that is short or made of equal layers."""
        largest_bytes = self.fastest.timeline.peak_bytes
        return helped_grid(self._chain, tree_bytes=self._floor.smallest_bytes, largest_bytes=largest_bytes)

    @cached_property
    def _tight(self) -> list[Candidate]:
        """Schedules with helpers for the smallest budget and some above it, to the byte: roundings weigh most there."""
        return [self._candidate(schedule) for schedule in tight_schedules(self._helped)] if self._helped else []


def _better(best: Candidate | None, others: list[Candidate], budget_bytes: int) -> Candidate | None:
    """Return the best of `best`, which is known to fit, and those of `others` that do."""
    fitting = [c for c in others if c.timeline.peak_bytes <= budget_bytes]
    return min([*([best] if best else []), *fitting], key=lambda c: c.cost, default=None)
