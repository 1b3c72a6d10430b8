"""Choose the fastest schedule within a byte budget: one pure function, and an object that plans for many budgets.

# Note [Monotone by construction]
Every candidate is a schedule that depends on the chain alone: four baselines, the feasible schedule for the smallest
budget, and the schedules of one table, one for each number of memory units. Of the first five a budget takes the
fastest whose exact simulated peak fits. More units take less time, so of the table it takes the most units whose peak
fits. A bisection over fixed numbers finds them: what fits a budget fits a larger one, so where the searches of two
budgets part, the larger one goes up. So a plan is never slower than that for a smaller budget (proof P2).
"""

from dataclasses import dataclass
from functools import cached_property

from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.schedule.actions import Backward, Forward, ForwardSave, Schedule
from tinybp_lightning.schedule.arguments import check_budget, check_chain
from tinybp_lightning.schedule.baselines import every_sqrt_n, keep_all, per_block
from tinybp_lightning.schedule.planner.memory_floor import MinMemory, feasible_schedule
from tinybp_lightning.schedule.planner.states import StateModel, storable_boundaries
from tinybp_lightning.schedule.planner.table import RowIndex, Table, fitting_unit_bytes, share_rows
from tinybp_lightning.schedule.simulator import Timeline, simulate

__all__ = ["Plan", "Planner", "plan", "smallest_budget"]

_WORK = 1e9
"""Elementary steps of the dynamic program that take a few seconds; they limit the units of a long chain."""
_MAX_UNITS = 4096
_ENOUGH_UNITS = 400
"""Units of the smallest budget beyond which finer ones change no plan."""
_MAX_CUTS = 200
_MARGIN = 50
"""The table may overrate peaks by this part of a budget."""
_TRIED_ABOVE = 8
"""Peaks are not quite monotone in the units: so many more are tried beyond the most that the search found to fit."""
_TIME_TOLERANCE = 1e-5
"""The table's times are float32 sums: only a relative difference above this tells two schedules apart."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule for a budget, and what the simulator says that it costs."""

    schedule: Schedule
    budget_bytes: int
    peak_bytes: int
    total_s: float
    recompute_s: float


def plan(chain: Chain, *, budget_bytes: int) -> Plan:
    """Return the fastest schedule found whose exact peak is at most `budget_bytes`.

    **Arguments:** `budget_bytes`: limit for everything the chain counts, its unmodelled bytes included.

    **Returns:** a legal plan; deterministic, and never slower than the plan for a smaller budget.

    **Raises:** `BudgetTooSmallError` that names the smallest feasible budget and what sets it; `ConfigError` if `chain`
    is not a `Chain`; `BudgetError` if `budget_bytes` is not a number of bytes.
    """
    check_budget(budget_bytes)
    return Planner(chain).plan(budget_bytes=budget_bytes)


def smallest_budget(chain: Chain) -> tuple[int, Plan]:
    """Return the smallest feasible budget in bytes, and the plan that meets it.

    **Raises:** `ConfigError` if `chain` is not a `Chain`.
    """
    planner = Planner(chain)
    return planner.smallest_bytes, planner.smallest_plan()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A schedule, and what the exact simulator says of it."""

    schedule: Schedule
    timeline: Timeline

    @property
    def cost(self) -> tuple[float, int]:
        """Seconds, then bytes: the least is best."""
        return self.timeline.total_s, self.timeline.peak_bytes


class Planner:
    """Plans one chain for many budgets; the table grows with the largest budget asked for."""

    def __init__(self, chain: Chain) -> None:
        check_chain(chain)
        self.chain = chain
        self._table: Table | None = None
        self._of_units: dict[int, _Candidate] = {}

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that `plan` accepts."""
        return self._smallest.timeline.peak_bytes

    @property
    def largest_bytes(self) -> int:
        """The budget above which no plan gets faster: every block keeps the option with the fastest backward."""
        return self._fastest.timeline.peak_bytes

    def plan(self, *, budget_bytes: int) -> Plan:
        """Return the fastest schedule found within `budget_bytes`; see the function `plan`."""
        check_budget(budget_bytes, may_be_negative=True)
        best = self._best(budget_bytes)
        if best is None:
            raise _too_small(self.chain, self._smallest, budget_bytes)
        timeline = best.timeline
        return Plan(best.schedule, budget_bytes, timeline.peak_bytes, timeline.total_s, timeline.recompute_s)

    def smallest_plan(self) -> Plan:
        """Return the plan for the smallest budget."""
        return self.plan(budget_bytes=self.smallest_bytes)

    def _best(self, budget_bytes: int) -> _Candidate | None:
        """Return the best candidate that fits. See Note [Monotone by construction]."""
        fitting = [c for c in self._baselines if c.timeline.peak_bytes <= budget_bytes]
        best = min(fitting, key=lambda c: c.cost, default=None)
        if best is self._fastest:
            return best
        left_bytes = budget_bytes - self.chain.unmodelled_bytes
        # The true peak of the smallest candidate may be below the least need, which counts some storages twice.
        if left_bytes < self._min_memory.smallest_bytes and budget_bytes < self.smallest_bytes:
            return best
        of_table = self._of_table(left_bytes, budget_bytes)
        found = [c for c in (best, of_table, self._smallest) if c is not None]
        return min(found, key=lambda c: c.cost)

    def _of_table(self, left_bytes: int, budget_bytes: int) -> _Candidate | None:
        """Return the table's schedule for the most units whose peak fits. See Note [Monotone by construction]."""
        unit_bytes = self._unit_bytes
        wanted = left_bytes // unit_bytes + (0 if unit_bytes == 1 else 4 + left_bytes // (_MARGIN * unit_bytes))
        most = min(self._max_units, wanted)
        steps = self._steps(self._filled(most), most)

        def fits(num_units: int) -> bool:
            if num_units > most:
                return False
            is_empty = steps[num_units] < 0
            return is_empty or self._candidate_of(steps[num_units]).timeline.peak_bytes <= budget_bytes

        found = 0
        for bit in reversed(range(self._max_units.bit_length())):
            found += (1 << bit) if fits(found + (1 << bit)) else 0
        above = range(min(most, found + _TRIED_ABOVE), found, -1)
        found = next((units for units in above if fits(units)), found)
        return self._candidate_of(steps[found]) if steps[found] >= 0 else None

    def _steps(self, table: Table, most: int) -> list[int]:
        """For each number of units, the fewest that take about the same time; -1 where nothing fits."""
        steps, least_s = list[int](), float("inf")
        for units, seconds in enumerate(table.seconds[: most + 1].tolist()):
            is_faster = seconds < least_s * (1 - _TIME_TOLERANCE) or (least_s == float("inf") and seconds < least_s)
            least_s = seconds if is_faster else least_s
            steps.append(units if is_faster else steps[-1] if steps else -1)
        return steps

    def _filled(self, num_units: int) -> Table:
        """Return the table, filled at least for `num_units`."""
        if self._table is None or self._table.num_units < num_units:
            self._table = Table(self._model, self._row_index, unit_bytes=self._unit_bytes, num_units=num_units)
        return self._table

    def _candidate_of(self, num_units: int) -> _Candidate:
        if num_units not in self._of_units:
            assert self._table is not None
            self._of_units[num_units] = self._candidate(self._table.schedule(num_units))
        return self._of_units[num_units]

    def _candidate(self, schedule: Schedule) -> _Candidate:
        return _Candidate(schedule, simulate(self.chain, schedule))

    @cached_property
    def _model(self) -> StateModel:
        return StateModel(self.chain, cuts=storable_boundaries(self.chain, limit=_MAX_CUTS))

    @cached_property
    def _row_index(self) -> RowIndex:
        return share_rows(self._model)

    @cached_property
    def _unit_bytes(self) -> int:
        most_units = min(_MAX_UNITS, max(64, int(_WORK / (self._row_index.num_splits + 1))))
        fine_bytes = self._min_memory.smallest_bytes // _ENOUGH_UNITS
        return fitting_unit_bytes(self._model, wanted_bytes=max(1, self.largest_bytes // most_units, fine_bytes))

    @cached_property
    def _max_units(self) -> int:
        """How many units the largest budget has."""
        return -(-self.largest_bytes // self._unit_bytes)

    @cached_property
    def _min_memory(self) -> MinMemory:
        return MinMemory(self._model, self._row_index)

    @cached_property
    def _smallest(self) -> _Candidate:
        """The candidate with the smallest peak: the feasible schedule, unless a baseline stores where it may not."""
        left_bytes = self._min_memory.smallest_bytes
        table = self._filled(-(-left_bytes // self._unit_bytes))
        feasible = self._candidate(feasible_schedule(self._min_memory, table, left_bytes=left_bytes))
        return min([feasible, *self._baselines], key=lambda c: (c.timeline.peak_bytes, c.timeline.total_s))

    @cached_property
    def _fastest(self) -> _Candidate:
        """Every block keeps the option with the fastest backward: no schedule takes less time."""
        blocks = self.chain.blocks
        fastest = [min(range(len(b.options)), key=lambda o: (b.options[o].backward_s, o)) for b in blocks]
        saves = [ForwardSave(BlockId(b), OptionId(o)) for b, o in enumerate(fastest)]
        backwards = [Backward(BlockId(b), OptionId(o)) for b, o in enumerate(fastest)]
        return self._candidate(Schedule(num_blocks=len(fastest), actions=(*saves, *reversed(backwards))))

    @cached_property
    def _baselines(self) -> list[_Candidate]:
        known = [self._candidate(method(self.chain)) for method in (keep_all, per_block, every_sqrt_n)]
        return [self._fastest, *known]


def _too_small(chain: Chain, smallest: _Candidate, budget_bytes: int) -> BudgetTooSmallError:
    timeline = smallest.timeline
    action = smallest.schedule.actions[timeline.peak_action]
    if timeline.peak_in_tail:
        bottleneck, phase = "the code after the last block", "tail"
    else:
        assert isinstance(action, Forward | ForwardSave | Backward), f"`{action}` alone makes no peak"
        bottleneck = chain.blocks[action.block].name
        phase = "backward" if isinstance(action, Backward) else "forward"
    return BudgetTooSmallError(
        f"`budget_bytes={budget_bytes}` cannot be met: the smallest plan for this step needs "
        f"{timeline.peak_bytes} bytes ({bottleneck}, {phase}). Raise the budget or lower the batch size.",
        budget_bytes=budget_bytes,
        smallest_bytes=timeline.peak_bytes,
        bottleneck=bottleneck,
    )
