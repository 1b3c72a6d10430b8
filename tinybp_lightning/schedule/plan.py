"""Which schedule is fastest under a byte budget? The planner: one pure function, and an object for many budgets.

# Note [Monotone by construction]
The candidates for a budget are: the baselines, the smallest tree, and the dynamic program's schedule for every number
of slots up to a margin above the budget; those whose exactly simulated peak fits. Slot sizes depend on the chain alone:
a coarse table spans all budgets, each finer one the lowest quarter of the one before; a budget uses the finest table
that spans it and all finer ones, and always the table with helpers, where there is one, with what it gives for some
budgets near the smallest. So every candidate for a budget is one for any larger budget, and time never rises with it. A
table is sorted by time: walking it down from the margin, the first schedule that fits is its best. Where a chain is so
short that all schedules are searched, the plan is the optimum, which never rises with the budget either.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.schedule.actions import Backward, Forward, ForwardSave, Schedule
from tinybp_lightning.schedule.arguments import check_budget, check_chain
from tinybp_lightning.schedule.baselines import every_sqrt_n, keep_all, per_block
from tinybp_lightning.schedule.certificate import Certificate, certify, fastest_possible_s, unpriced
from tinybp_lightning.schedule.exact import faster_schedule, is_searchable
from tinybp_lightning.schedule.floor import Floor, Thrifty
from tinybp_lightning.schedule.grid import Grid, slot_bytes, storable_boundaries
from tinybp_lightning.schedule.sharing import Sharing, share_segments
from tinybp_lightning.schedule.simulate import Timeline, simulate
from tinybp_lightning.schedule.tables import Tables
from tinybp_lightning.schedule.tight import helped_grid, tight_schedules
from tinybp_lightning.schedule.tree import IntervalTree

__all__ = ["Plan", "Planner", "plan", "smallest_budget"]

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


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule, what it costs, and how far from the best possible it can be at most: `gap`."""

    schedule: Schedule
    budget_bytes: int
    peak_bytes: int
    total_s: float
    recompute_s: float
    certificate: Certificate

    @property
    def lower_bound_s(self) -> float:
        """No legal schedule within `budget_bytes` (offload aside) takes less time."""
        # The bound sums in another order than the clock: keep the last bit from making the gap negative.
        return min(self.certificate.lower_bound_s, self.total_s)

    @property
    def gap(self) -> float:
        """How much slower than the best possible the plan is at most, as a share: 0.01 is one percent."""
        return self.total_s / self.lower_bound_s - 1 if self.lower_bound_s else 0.0


def plan(chain: Chain, *, budget_bytes: int) -> Plan:
    """Return the fastest schedule found whose exact peak is at most `budget_bytes`.

    **Arguments:** `budget_bytes`: limit for everything the chain counts, its workspace included.

    **Returns:** a legal plan; deterministic, and never slower than the plan for a smaller budget.

    **Raises:** `BudgetTooSmallError` that names the smallest feasible budget and what sets it; `ConfigError` for what
    is no chain; `BudgetError` for what is no number of bytes.
    """
    check_budget(budget_bytes)
    return Planner(chain).plan(budget_bytes=budget_bytes)


def smallest_budget(chain: Chain) -> tuple[int, Plan]:
    """Return the smallest feasible budget in bytes, and the plan that meets it.

    **Raises:** `ConfigError` for what is no chain.
    """
    planner = Planner(chain)
    return planner.smallest_bytes, planner.smallest_plan()


@dataclass(frozen=True, slots=True)
class _Candidate:
    schedule: Schedule
    timeline: Timeline

    @property
    def cost(self) -> tuple[float, int]:
        return self.timeline.total_s, self.timeline.peak_bytes


class Planner:
    """Plans one chain for many budgets; the tables are filled once and grow with the largest budget asked for."""

    def __init__(self, chain: Chain) -> None:
        check_chain(chain)
        self._chain = chain
        self._fastest = self._candidate(_keep_fastest(chain))
        self._tables = Tables(chain, cuts=storable_boundaries(chain, limit=_MAX_CUTS))
        self._known: dict[tuple[int, int], _Candidate] = {}
        self._searched: dict[int, _Candidate] = {}

    @property
    def chain(self) -> Chain:
        """The chain that is planned."""
        return self._chain

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that `plan` accepts."""
        return self._smallest.timeline.peak_bytes

    @property
    def largest_bytes(self) -> int:
        """The budget above which no plan gets faster: every block keeps the option with the fastest backward."""
        return self._fastest.timeline.peak_bytes

    def plan(self, *, budget_bytes: int) -> Plan:
        """Return the fastest schedule found within `budget_bytes`, certified; see the function `plan`."""
        best = self._best(budget_bytes)
        if is_searchable(self._chain):
            certificate = unpriced(self._chain, budget_bytes=budget_bytes)
            return self._plan_of(best, budget_bytes, replace(certificate, searched_bound_s=best.timeline.total_s))
        # What a byte is worth about here: it starts the search for the certificate's prices.
        less_bytes = max(self.smallest_bytes, budget_bytes - budget_bytes // 16)
        slower_s = self._best(less_bytes).timeline.total_s - best.timeline.total_s
        certificate = certify(
            self._chain,
            best.schedule,
            best.timeline,
            budget_bytes=budget_bytes,
            seconds_per_byte=slower_s / max(1, budget_bytes - less_bytes),
        )
        return self._plan_of(best, budget_bytes, certificate)

    def schedule(self, *, budget_bytes: int) -> Schedule:
        """Return the schedule of the plan for `budget_bytes`, without the work of certifying it."""
        return self._best(budget_bytes).schedule

    def smallest_plan(self) -> Plan:
        """Return the plan for the smallest budget; its certificate says only what no budget at all could beat."""
        budget_bytes = self.smallest_bytes
        return self._plan_of(self._best(budget_bytes), budget_bytes, unpriced(self._chain, budget_bytes=budget_bytes))

    def _best(self, budget_bytes: int) -> "_Candidate":
        check_budget(budget_bytes, may_be_negative=True)
        if budget_bytes < self.smallest_bytes:
            raise self._too_small(budget_bytes)
        candidates = [c for c in self._fixed if c.timeline.peak_bytes <= budget_bytes]
        best = min(candidates, key=lambda c: c.cost)
        if best.timeline.total_s <= self._plain_s:
            return best
        if not is_searchable(self._chain):
            return self._search(budget_bytes, best)
        if budget_bytes not in self._searched:
            self._searched[budget_bytes] = self._optimum(budget_bytes, self._search(budget_bytes, best))
        return self._searched[budget_bytes]

    def _optimum(self, budget_bytes: int, best: "_Candidate") -> "_Candidate":
        """Return a faster candidate than `best` if any schedule at all is faster."""
        faster = faster_schedule(self._chain, budget_bytes=budget_bytes, known_s=best.timeline.total_s)
        return best if faster is None else self._candidate(faster)

    def _plan_of(self, best: "_Candidate", budget_bytes: int, certificate: Certificate) -> Plan:
        return Plan(
            schedule=best.schedule,
            budget_bytes=budget_bytes,
            peak_bytes=best.timeline.peak_bytes,
            total_s=best.timeline.total_s,
            recompute_s=best.timeline.recompute_s,
            certificate=certificate,
        )

    @cached_property
    def _plain_s(self) -> float:
        return fastest_possible_s(self._chain)

    @cached_property
    def _floor(self) -> Floor:
        return Floor(self._tables)

    @cached_property
    def _smallest(self) -> _Candidate:
        """The candidate with the smallest peak; on a short chain helpers can reach below the smallest tree."""
        known = [self._smallest_tree, *self._tight[:1]]
        steps = self._helped.steps(self._floor.smallest_bytes) if self._helped else []
        if self._helped and steps:
            known.append(self._at(self._helped, steps[-1][0]))
        return min(known, key=lambda c: c.timeline.peak_bytes)

    @cached_property
    def _smallest_tree(self) -> _Candidate:
        left_bytes = self._floor.smallest_bytes
        grid = self._grids[-1]
        tree = grid.tree(left_bytes)
        assert isinstance(tree, IntervalTree)
        thrifty = Thrifty(self._floor, tree, unit_bytes=grid.unit_bytes)
        return self._candidate(thrifty.schedule(left_bytes))

    @cached_property
    def _fixed(self) -> list[_Candidate]:
        """Candidates that do not depend on the budget."""
        known = [self._candidate(method(self._chain)) for method in (keep_all, per_block, every_sqrt_n)]
        return [self._fastest, *known, self._smallest_tree, self._smallest]

    def _candidate(self, schedule: Schedule) -> _Candidate:
        return _Candidate(schedule, simulate(self._chain, schedule))

    @cached_property
    def _grids(self) -> list[Grid]:
        """The tables for this chain, coarsest first, down to slots of one byte or to the smallest budget."""
        sharing = share_segments(self._tables)
        affordable = min(_WORK / (sharing.work + 1), _MAX_CELLS / (sharing.num_rows + 1))
        num_slots = int(np.clip(affordable, 64, _MAX_SLOTS))
        grids = [self._grid(sharing, -(-self.largest_bytes // num_slots), num_slots)]
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
        return helped_grid(self._chain, tree_bytes=self._floor.smallest_bytes, largest_bytes=self.largest_bytes)

    @cached_property
    def _tight(self) -> list[_Candidate]:
        """Schedules with helpers for the smallest budget and some above it, to the byte: roundings weigh most there."""
        return [self._candidate(schedule) for schedule in tight_schedules(self._helped)] if self._helped else []

    def _search(self, budget_bytes: int, best: _Candidate) -> _Candidate:
        """Walk the tables down from the margin. See Note [Monotone by construction]."""
        left_bytes = budget_bytes - self._chain.workspace_bytes
        for grid in reversed(self._grids):
            best = self._walk(grid, budget_bytes, best)
            if grid.spans(left_bytes):
                break
        if self._helped:
            best = self._walk(self._helped, budget_bytes, best)
        tight = [c for c in self._tight if c.timeline.peak_bytes <= budget_bytes]
        return min([best, *tight], key=lambda c: c.cost)

    def _walk(self, grid: "Grid", budget_bytes: int, best: _Candidate) -> _Candidate:
        for slots, seconds in grid.steps(budget_bytes - self._chain.workspace_bytes):
            if seconds > best.timeline.total_s * (1 + _TIME_TOLERANCE):
                break
            candidate = self._at(grid, slots)
            if candidate.timeline.peak_bytes <= budget_bytes and candidate.cost < best.cost:
                best = candidate
        return best

    def _at(self, grid: "Grid", slots: int) -> _Candidate:
        key = (id(grid), slots)
        if key not in self._known:
            self._known[key] = self._candidate(grid.schedule(slots))
        return self._known[key]

    def _too_small(self, budget_bytes: int) -> BudgetTooSmallError:
        timeline, schedule = self._smallest.timeline, self._smallest.schedule
        action = schedule.actions[timeline.peak_action]
        if timeline.peak_in_tail:
            bottleneck, phase = "the code after the last block", "tail"
        else:
            assert isinstance(action, Forward | ForwardSave | Backward), f"`{action}` alone makes no peak"
            block = action.block
            bottleneck = self._chain.blocks[block].name
            phase = "backward" if isinstance(action, Backward) else "forward"
        return BudgetTooSmallError(
            f"`budget_bytes={budget_bytes}` cannot be met: the smallest plan for this step needs "
            f"{self.smallest_bytes} bytes ({bottleneck}, {phase}). Raise the budget or lower the batch size.",
            budget_bytes=budget_bytes,
            smallest_bytes=self.smallest_bytes,
            bottleneck=bottleneck,
        )


def _keep_fastest(chain: Chain) -> Schedule:
    """Keep every block with the option whose backward is fastest: no schedule takes less time."""
    fastest = [min(range(len(b.options)), key=lambda o: (b.options[o].backward_s, o)) for b in chain.blocks]
    saves = [ForwardSave(BlockId(b), OptionId(o)) for b, o in enumerate(fastest)]
    backwards = [Backward(BlockId(b), OptionId(o)) for b, o in enumerate(fastest)]
    return Schedule(num_blocks=len(fastest), actions=(*saves, *reversed(backwards)))
