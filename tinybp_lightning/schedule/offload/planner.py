"""How much faster is a step that may also move boundaries to host memory? A search with the exact simulator.

A boundary in host memory costs no device bytes and no recomputation, only a copy that runs beside compute. So a
schedule made for a *larger* budget, which recomputes less, may keep this one once its boundaries are away. The search
starts from such schedules: the planner's plans for larger budgets, plans for the chain in which stored boundaries weigh
less, and one level of recomputation with boundaries stored and as many saved sets as fit. For each it puts copies where
compute hides them, brings boundaries back later where bytes are missing, and moves single copies while that helps.
Everything is deterministic; the plan without offload is one of the candidates.

Only boundaries move, as the vocabulary has it; saved sets stay. There is no lower bound with offload: the certificate
of a `Plan` speaks of schedules without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinybp_lightning.errors import BudgetTooSmallError, ConfigError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Action, Backward, Forward, ForwardSave, Schedule
from tinybp_lightning.schedule.arguments import check_budget, check_link
from tinybp_lightning.schedule.baselines import keep_some, knapsack_blocks
from tinybp_lightning.schedule.offload.windows import (
    Away,
    Gap,
    Played,
    find_gaps,
    hide_copies,
    open_slots,
    play,
    weave,
    with_boundaries_away,
)
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import Machine, simulate

__all__ = ["OffloadPlan", "plan_offload"]

_STEPS = 8
"""How many schedules of one source are tried from the fastest down, before the search between two of them."""
_BISECTIONS = 5
_ROUNDS = 40
"""How often boundaries are brought back later to make room."""
_STAYING_SHARES = (1.0, 0.5, 0.25)
"""What stored boundaries weigh for the planner; the slower the link, the nearer to 1 is best."""
_STRIDES = (1, 2, 4)
"""Blocks from one stored boundary to the next in schedules of one level."""
_NEAR = 4
"""How many slots around its place and before its read a boundary's return is tried at."""
_SHORT = 1000
"""Actions times gaps of a schedule whose single copies are moved even if nothing fits yet."""
_ACTIONS_EACH, _ACTIONS_AT_LAST = 10_000, 100_000
"""Actions the simulator may play for moving single copies: of one schedule, and of the best one (a few seconds)."""


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """A schedule that may offload, and what it costs with this link.

    `wait_s` is the part of `total_s` that compute waits for copies; `moved_bytes` what the offloads name, each way.
    """

    schedule: Schedule
    budget_bytes: int
    link_bytes_per_s: float
    peak_bytes: int
    total_s: float
    recompute_s: float
    wait_s: float
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class _Fitted:
    actions: tuple[Action, ...]
    aways: tuple[Away, ...]
    played: Played

    @property
    def cost(self) -> tuple[int, float, int]:
        return self.played.excess_bytes, self.played.total_s, sum(one.gap.size_bytes for one in self.aways)


def plan_offload(planner: Planner, *, budget_bytes: int, link_bytes_per_s: float) -> OffloadPlan:
    """Return the fastest schedule found within `budget_bytes` that may offload boundaries to host memory.

    **Arguments:** `planner`: that of the chain; `link_bytes_per_s`: measured bandwidth in each direction.

    **Returns:** a legal schedule, deterministic, and never slower than `planner.plan` for the same budget. The budget
    may be below `planner.smallest_bytes`.

    **Raises:** `ConfigError` for a bandwidth that is not above 0, or what is no planner; `BudgetError` for a budget
    that is no number of bytes; `BudgetTooSmallError` if nothing that was tried fits.
    """
    if not isinstance(planner, Planner):
        raise ConfigError(
            f"`planner` is a `{type(planner).__name__}`: pass `Planner(chain)`, which plans without offload."
        )
    check_budget(budget_bytes)
    check_link(link_bytes_per_s)
    search = _Search(planner, budget_bytes, link_bytes_per_s)
    if budget_bytes >= planner.smallest_bytes:
        search.start(planner.plan(budget_bytes=budget_bytes).schedule)
    for source in _sources(planner, budget_bytes):
        search.descend(source)
    if search.best is None:
        assert search.smallest is not None, "every source gives a schedule"
        raise _too_small(planner.chain, budget_bytes, search.smallest)
    best = search.moved(search.best, _ACTIONS_AT_LAST)
    schedule = Schedule(num_blocks=len(planner.chain.blocks), actions=weave(best.actions, best.aways)[0])
    timeline = simulate(planner.chain, schedule, link_bytes_per_s=link_bytes_per_s)
    return OffloadPlan(
        schedule=schedule,
        budget_bytes=budget_bytes,
        link_bytes_per_s=link_bytes_per_s,
        peak_bytes=timeline.peak_bytes,
        total_s=timeline.total_s,
        recompute_s=timeline.recompute_s,
        wait_s=timeline.wait_s,
        moved_bytes=sum(one.gap.size_bytes for one in best.aways),
    )


class _Search:
    """Fits schedules into the budget one after the other and remembers the fastest."""

    def __init__(self, planner: Planner, budget_bytes: int, link_bytes_per_s: float) -> None:
        self._chain = planner.chain
        self._budget_bytes = budget_bytes
        self._link_bytes_per_s = link_bytes_per_s
        self._machine = Machine(planner.chain, link_bytes_per_s=link_bytes_per_s)
        self.best: _Fitted | None = None
        self.smallest: _Fitted | None = None

    def start(self, schedule: Schedule) -> None:
        """Begin with a schedule that fits without offload: nothing slower is of interest."""
        self.best = self.smallest = self._played(schedule.actions, ())

    def descend(self, source: Callable[[float], Schedule]) -> None:
        """Find about the fastest schedule of `source` that fits, from `source(1.0)`, its fastest, down."""
        step = next((k for k in reversed(range(_STEPS + 1)) if self._is_enough(source(k / _STEPS))), None)
        if step is None or step == _STEPS:
            return
        low, high = step / _STEPS, (step + 1) / _STEPS
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._is_enough(source(middle)) else (low, middle)

    def _is_enough(self, schedule: Schedule) -> bool:
        """Whether no slower schedule of the source is of interest: this one fits, or is no faster than the best."""
        plain = self._played(schedule.actions, ())
        if self.best is not None and plain.played.total_s >= self.best.played.total_s:
            return True
        fitted = plain if plain.played.excess_bytes == 0 else self._fit(plain)
        if self.smallest is None or _peak_bytes(fitted) < _peak_bytes(self.smallest):
            self.smallest = fitted
        if fitted.played.excess_bytes or (self.best is not None and fitted.cost >= self.best.cost):
            return False  # also if its copies make it slow: one that moves less may be faster
        self.best = fitted
        return True

    def _fit(self, plain: _Fitted) -> _Fitted:
        """Send boundaries away until the budget is kept, or it is plain that this does not do."""
        gaps, is_open = find_gaps(self._chain, plain.actions), open_slots(self._chain, plain.actions)
        hidden = hide_copies(gaps, plain.played.start_s, is_open, link_bytes_per_s=self._link_bytes_per_s)
        found = self._made_room(self._played(plain.actions, hidden), is_open)
        if found.played.excess_bytes:
            found = min(found, self._played(plain.actions, [Away(gap, gap.stop) for gap in gaps]), key=_cost)
        is_short = len(plain.actions) * len(gaps) <= _SHORT
        if is_short or (found.played.total_s > plain.played.total_s and not found.played.excess_bytes):
            found = self.moved(found, _ACTIONS_EACH)
        return found

    def _made_room(self, found: _Fitted, is_open: Sequence[bool]) -> _Fitted:
        """Bring boundaries back later while bytes are missing and somebody can wait; what is read last waits first."""
        for _ in range(_ROUNDS):
            waits = dict[Gap, int]()
            for slot, peak_bytes in enumerate(found.played.peak_bytes):
                missing_bytes = peak_bytes - self._budget_bytes
                back_early = [one for one in found.aways if waits.get(one.gap, one.back) <= slot < one.gap.stop]
                for one in sorted(back_early, key=lambda one: -one.gap.stop):
                    if missing_bytes <= 0:
                        break
                    waits[one.gap] = next(k for k in range(slot + 1, one.gap.stop + 1) if is_open[k])
                    missing_bytes -= one.gap.size_bytes
            if not waits:
                break
            later = [Away(one.gap, waits.get(one.gap, one.back)) for one in found.aways]
            found = self._played(found.actions, later)
        return found

    def moved(self, found: _Fitted, num_actions: int) -> _Fitted:
        """Change one copy at a time while that helps: leave it out, or bring the boundary back sooner or later."""
        gaps, is_open = find_gaps(self._chain, found.actions), open_slots(self._chain, found.actions)
        num_plays, improved = num_actions // len(found.actions), True
        while improved and num_plays > 0:
            improved = False
            for gap in gaps:
                others = [one for one in found.aways if one.gap != gap]
                for back in _choices(gap, found.aways, is_open):
                    tried = others if back is None else [*others, Away(gap, back)]
                    candidate = self._played(found.actions, tried)
                    num_plays -= 1
                    if candidate.cost < found.cost:
                        found, improved = candidate, True
                if num_plays <= 0:
                    break
        return found

    def _played(self, actions: tuple[Action, ...], aways: Sequence[Away]) -> _Fitted:
        ordered = tuple(sorted(aways, key=lambda one: (one.gap.start, one.gap.boundary)))
        return _Fitted(actions, ordered, play(self._machine, actions, ordered, budget_bytes=self._budget_bytes))


def _choices(gap: Gap, aways: Sequence[Away], is_open: Sequence[bool]) -> list[int | None]:
    """Return what else a gap could be: unused, or its boundary back at a slot near the present one or the read."""
    now = next((one.back for one in aways if one.gap == gap), None)
    slots = [k for k in range(gap.start + 1, gap.stop + 1) if is_open[k]]
    near = slots[-_NEAR:] if now is None else sorted({*slots[-_NEAR:], *(k for k in slots if abs(k - now) <= _NEAR)})
    return [choice for choice in (None, *near) if choice != now]


def _sources(planner: Planner, budget_bytes: int) -> list[Callable[[float], Schedule]]:
    """Return where schedules come from: each a function of how fast they shall be, from 0 to 1."""
    chain = planner.chain

    def planned(staying_share: float) -> Callable[[float], Schedule]:
        other = planner if staying_share == 1 else Planner(with_boundaries_away(chain, staying_share=staying_share))
        highest = other.largest_bytes
        lowest = min(highest, max(budget_bytes, other.smallest_bytes))
        return lambda share: other.plan(budget_bytes=round(lowest * (highest / max(1, lowest)) ** share)).schedule

    def kept(k: int) -> Callable[[float], Schedule]:
        stored = range(0, len(chain.blocks), k)
        return lambda share: keep_some(chain, kept=knapsack_blocks(chain, saved_share=share), stored=stored)

    return [*map(planned, _STAYING_SHARES), *(kept(k) for k in _STRIDES if k <= len(chain.blocks))]


def _cost(fitted: _Fitted) -> tuple[int, float, int]:
    return fitted.cost


def _peak_bytes(fitted: _Fitted) -> int:
    return max(fitted.played.peak_bytes)


def _too_small(chain: Chain, budget_bytes: int, smallest: _Fitted) -> BudgetTooSmallError:
    peak_bytes = _peak_bytes(smallest)
    action = smallest.actions[smallest.played.peak_bytes.index(peak_bytes)]
    where = chain.blocks[action.block].name if isinstance(action, Forward | ForwardSave | Backward) else f"{action}"
    return BudgetTooSmallError(
        f"`budget_bytes={budget_bytes}` cannot be met with offload: the smallest schedule found needs {peak_bytes} "
        f"bytes ({where}). Raise the budget or lower the batch size.",
        budget_bytes=budget_bytes,
        smallest_bytes=peak_bytes,
        bottleneck=where,
    )
