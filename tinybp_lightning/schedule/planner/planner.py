"""Which schedule is fastest under a byte budget? The planner: one pure function, and an object for many budgets.

What it chooses from, and why time never rises with the budget, is in `candidates`.
"""

from dataclasses import dataclass

from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Backward, Forward, ForwardSave, Schedule
from tinybp_lightning.schedule.arguments import check_budget, check_chain
from tinybp_lightning.schedule.planner.candidates import Candidate, Candidates

__all__ = ["Plan", "Planner", "plan", "smallest_budget"]


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


class Planner:
    """Plans one chain for many budgets; the tables are filled once and grow with the largest budget asked for."""

    def __init__(self, chain: Chain) -> None:
        check_chain(chain)
        self._chain = chain
        self._candidates = Candidates(chain)

    @property
    def chain(self) -> Chain:
        """The chain that is planned."""
        return self._chain

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that `plan` accepts."""
        return self._candidates.smallest.timeline.peak_bytes

    @property
    def largest_bytes(self) -> int:
        """The budget above which no plan gets faster: every block keeps the option with the fastest backward."""
        return self._candidates.fastest.timeline.peak_bytes

    def plan(self, *, budget_bytes: int) -> Plan:
        """Return the fastest schedule found within `budget_bytes`; see the function `plan`."""
        check_budget(budget_bytes, may_be_negative=True)
        return _plan_of(self._best(budget_bytes), budget_bytes)

    def schedule(self, *, budget_bytes: int) -> Schedule:
        """Return the schedule of the plan for `budget_bytes`."""
        return self._best(budget_bytes).schedule

    def smallest_plan(self) -> Plan:
        """Return the plan for the smallest budget."""
        return self.plan(budget_bytes=self.smallest_bytes)

    def _best(self, budget_bytes: int) -> Candidate:
        check_budget(budget_bytes, may_be_negative=True)
        best = self._candidates.best(budget_bytes)
        if best is None:
            raise _too_small(self._chain, self._candidates.smallest, budget_bytes)
        return best


def _plan_of(best: Candidate, budget_bytes: int) -> Plan:
    return Plan(
        schedule=best.schedule,
        budget_bytes=budget_bytes,
        peak_bytes=best.timeline.peak_bytes,
        total_s=best.timeline.total_s,
        recompute_s=best.timeline.recompute_s,
    )


def _too_small(chain: Chain, smallest: Candidate, budget_bytes: int) -> BudgetTooSmallError:
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
