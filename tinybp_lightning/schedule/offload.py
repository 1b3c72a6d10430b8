"""Plan copies of stored boundaries to host memory. The simulator plays such schedules; the runtime does not yet.

The search starts from plans for *larger* budgets, which recompute less, and from plans for the chain in which stored
boundaries weigh less. For each it puts copies where compute hides them, or copies all boundaries; it then moves single
copies of the best schedule while that helps. The exact simulator judges all of them, the plan without offload too.
Only boundaries move; saved sets stay. No lower bound covers schedules with offload.

# Note [The chain with boundaries away]
In `with_boundaries_away(chain)` a stored boundary weighs little or nothing. What is not stored still counts: a run
counts the boundary it starts from, and a saved set the boundary storages it aliases, as bytes of its own. A schedule
for that chain is legal on the true one, where the simulator finds what it costs.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from tinybp_lightning.errors import BudgetTooSmallError, ConfigError
from tinybp_lightning.graph.chain import Block, Chain, SavedSet
from tinybp_lightning.graph.ids import BoundaryId, StorageId
from tinybp_lightning.schedule.actions import (
    Action,
    Backward,
    Drop,
    Forward,
    ForwardSave,
    Offload,
    Reload,
    Schedule,
    Store,
)
from tinybp_lightning.schedule.arguments import check_budget, check_link
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import Machine, simulate

__all__ = ["Away", "Gap", "OffloadPlan", "find_gaps", "open_slots", "plan_offload", "weave", "with_boundaries_away"]

_STEPS = 16
"""How many schedules of one source are tried, from the fastest down."""
_STAYING_SHARES = (1.0, 0.5, 0.25)
"""What stored boundaries weigh for the planner; the slower the link, the nearer to 1 is best."""
_NEAR = 4
"""How many slots around its place and before its read a boundary's return is tried at."""
_MOST_ACTIONS = 100_000
"""Actions the simulator may play for moving single copies of the best schedule (a few seconds)."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Boundary `boundary` is stored and not read from slot `start` to slot `stop`; slot `k` is before action `k`."""

    boundary: int
    start: int
    stop: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Away:
    """A gap that is used: offloaded at its start, reloaded at slot `back`, which is after the start."""

    gap: Gap
    back: int


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
    """A schedule with some of its gaps used, and what it costs.

    `start_s[k]` and `peak_bytes[k]` are those of `actions[k]`, the copies right before it included. `excess_bytes` is
    the sum over actions of what exceeds the budget: 0 for a schedule that keeps it.
    """

    actions: tuple[Action, ...]
    aways: tuple[Away, ...]
    total_s: float
    excess_bytes: int
    start_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]

    @property
    def cost(self) -> tuple[int, float, int]:
        """What exceeds the budget, then seconds, then bytes moved: the least is best."""
        return self.excess_bytes, self.total_s, sum(one.gap.size_bytes for one in self.aways)


def plan_offload(planner: Planner, *, budget_bytes: int, link_bytes_per_s: float) -> OffloadPlan:
    """Return the fastest schedule found within `budget_bytes` that may offload boundaries to host memory.

    **Arguments:** `planner`: that of the chain; `link_bytes_per_s`: measured bandwidth in each direction.

    **Returns:** a legal schedule, deterministic, and never slower than `planner.plan` for the same budget. The budget
    may be below `planner.smallest_bytes`.

    **Raises:** `ConfigError` for a bandwidth that is not above 0, or a `planner` that is not one; `BudgetError` for a
    budget that is not a number of bytes; `BudgetTooSmallError` if nothing that was tried fits.
    """
    if not isinstance(planner, Planner):
        raise ConfigError(
            f"`planner` is a `{type(planner).__name__}`: pass `Planner(chain)`, which plans without offload."
        )
    check_budget(budget_bytes)
    check_link(link_bytes_per_s)
    search = _Search(planner, budget_bytes, link_bytes_per_s)
    for staying_share in _STAYING_SHARES:
        search.descend(_source(planner, budget_bytes, staying_share))
    if search.best is None:
        assert search.smallest is not None, "every source gives a schedule"
        raise _too_small(planner.chain, budget_bytes, search.smallest)
    best = search.moved(search.best)
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
        if budget_bytes >= planner.smallest_bytes:  # nothing slower than the plan without offload is of interest
            self.best = self._played(planner.plan(budget_bytes=budget_bytes).schedule.actions, ())
        self.smallest = self.best

    def descend(self, source: Callable[[float], Schedule]) -> None:
        """Find about the fastest schedule of `source` that fits, from `source(1.0)`, its fastest, down."""
        for k in reversed(range(_STEPS + 1)):
            plain = self._played(source(k / _STEPS).actions, ())
            if self.best is not None and plain.total_s >= self.best.total_s:
                return
            fitted = plain if plain.excess_bytes == 0 else self._fit(plain)
            if self.smallest is None or max(fitted.peak_bytes) < max(self.smallest.peak_bytes):
                self.smallest = fitted
            # If its copies make it slow, one that moves less may be faster.
            if not fitted.excess_bytes and (self.best is None or fitted.cost < self.best.cost):
                self.best = fitted
                return

    def _fit(self, plain: _Fitted) -> _Fitted:
        """Move the boundaries whose copies compute hides, or all of them if the budget needs that."""
        gaps = find_gaps(self._chain, plain.actions)
        hidden = _hide_copies(gaps, plain, open_slots(self._chain, plain.actions), self._link_bytes_per_s)
        found = self._played(plain.actions, hidden)
        if not found.excess_bytes:
            return found
        return min(found, self._played(plain.actions, [Away(gap, gap.stop) for gap in gaps]), key=lambda f: f.cost)

    def moved(self, found: _Fitted) -> _Fitted:
        """Change one copy at a time while that helps: leave it out, or bring the boundary back sooner or later."""
        gaps, is_open = find_gaps(self._chain, found.actions), open_slots(self._chain, found.actions)
        num_plays, improved = _MOST_ACTIONS // len(found.actions), True
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
        """Play the schedule with `aways`; it must be legal without them."""
        ordered = tuple(sorted(aways, key=lambda one: (one.gap.start, one.gap.boundary)))
        woven, place = weave(actions, ordered)
        machine = self._machine
        machine.reset()
        starts, peaks = list[float](), list[int]()
        for index in range(len(woven)):
            starts.append(machine.start()[1])
            machine.play(woven, index)
            peak = machine.action_peak_bytes
            if machine.at_tail:
                machine.tail()
                peak = max(peak, machine.action_peak_bytes)
            peaks.append(peak)
        firsts = [0, *(k + 1 for k in place[:-1])]
        return _Fitted(
            actions,
            ordered,
            total_s=machine.now_s,
            excess_bytes=sum(max(0, peak - self._budget_bytes) for peak in peaks),
            start_s=tuple(starts[k] for k in place),
            peak_bytes=tuple(max(peaks[first : k + 1]) for first, k in zip(firsts, place, strict=True)),
        )


def _choices(gap: Gap, aways: Sequence[Away], is_open: Sequence[bool]) -> list[int | None]:
    """Return what else a gap could be: unused, or its boundary back at a slot near the present one or the read."""
    now = next((one.back for one in aways if one.gap == gap), None)
    slots = [k for k in range(gap.start + 1, gap.stop + 1) if is_open[k]]
    near = slots[-_NEAR:] if now is None else sorted({*slots[-_NEAR:], *(k for k in slots if abs(k - now) <= _NEAR)})
    return [choice for choice in (None, *near) if choice != now]


def _source(planner: Planner, budget_bytes: int, staying_share: float) -> Callable[[float], Schedule]:
    """Return where schedules come from: a function of how fast they shall be, from 0 to 1."""
    if staying_share < 1:
        planner = Planner(with_boundaries_away(planner.chain, staying_share=staying_share))
    highest = planner.largest_bytes
    lowest = min(highest, max(budget_bytes, planner.smallest_bytes))
    return lambda share: planner.plan(budget_bytes=round(lowest * (highest / max(1, lowest)) ** share)).schedule


def _too_small(chain: Chain, budget_bytes: int, smallest: _Fitted) -> BudgetTooSmallError:
    peak_bytes = max(smallest.peak_bytes)
    action = smallest.actions[smallest.peak_bytes.index(peak_bytes)]
    where = chain.blocks[action.block].name if isinstance(action, Forward | ForwardSave | Backward) else f"{action}"
    return BudgetTooSmallError(
        f"`budget_bytes={budget_bytes}` cannot be met with offload: the smallest schedule found needs {peak_bytes} "
        f"bytes ({where}). Raise the budget or lower the batch size.",
        budget_bytes=budget_bytes,
        smallest_bytes=peak_bytes,
        bottleneck=where,
    )


def find_gaps(chain: Chain, actions: Sequence[Action]) -> tuple[Gap, ...]:
    """Return by start the gaps, of boundaries that have bytes, with an action in them; nothing is offloaded yet."""
    is_open = open_slots(chain, actions)
    cursor, swept, used = None, 0, dict[int, int]()
    gaps: list[Gap] = []
    for index, action in enumerate(actions):
        match action:
            case Forward(block) | ForwardSave(block):
                if block != cursor and block in used:
                    size_bytes = sum(chain.storage_bytes[s] for s in chain.boundaries[block].storages)
                    gaps.append(Gap(block, is_open.index(True, used[block] + 1), index, size_bytes))
                    used[block] = index
                swept += swept < len(chain.blocks)
                # A replay that stops early leaves no cursor, and the backward that follows takes it anyway.
                cursor = block + 1
            case Backward():
                cursor = None
            case Store(boundary):
                used[boundary] = index
            case Drop(boundary):
                used.pop(boundary, None)
            case Offload() | Reload():
                raise AssertionError(f"`{action}`: gaps are looked for before anything is offloaded")
            case _:
                assert_never(action)
    return tuple(sorted((g for g in gaps if g.start < g.stop and g.size_bytes), key=lambda g: (g.start, g.boundary)))


def open_slots(chain: Chain, actions: Sequence[Action]) -> list[bool]:
    """Return for every slot whether it takes an action: none between a replay that stops early and its reader."""
    is_open = [True] * (len(actions) + 1)
    waiting: int | None = None
    num_swept = 0
    for index, action in enumerate(actions):
        match action:
            case ForwardSave(block) if num_swept >= len(chain.blocks):
                waiting = block
                continue
            case Forward() | ForwardSave():
                num_swept += 1
            case Drop() if waiting is not None:
                continue
            case Backward(block) if waiting == block:
                first = index
                while isinstance(actions[first - 1], Drop):
                    first -= 1
                is_open[first : index + 1] = [False] * (index + 1 - first)
            case Backward() | Drop() | Store() | Offload() | Reload():
                pass
            case _:
                assert_never(action)
        waiting = None
    return is_open


def weave(actions: Sequence[Action], aways: Iterable[Away]) -> tuple[tuple[Action, ...], tuple[int, ...]]:
    """Return the schedule with the `Offload` and `Reload` of each of `aways`, and where each old action stands now."""
    offloads, reloads = dict[int, list[Away]](), dict[int, list[Away]]()
    for away in aways:
        offloads.setdefault(away.gap.start, []).append(away)
        reloads.setdefault(away.back, []).append(away)
    woven, place = list[Action](), list[int]()
    for slot, action in enumerate(actions):
        woven += [Offload(BoundaryId(one.gap.boundary)) for one in offloads.get(slot, ())]
        # The link brings back one after the other: what is read first comes first.
        soonest = sorted(reloads.get(slot, ()), key=lambda one: (one.gap.stop, one.gap.boundary))
        woven += [Reload(BoundaryId(one.gap.boundary)) for one in soonest]
        place.append(len(woven))
        woven.append(action)
    return tuple(woven), tuple(place)


def _hide_copies(
    gaps: Sequence[Gap], plain: _Fitted, is_open: Sequence[bool], link_bytes_per_s: float
) -> tuple[Away, ...]:
    """Return the gaps in which both copies fit beside compute, each boundary brought back as late as hides its copy."""
    start_s = plain.start_s
    out_free_s, leaving = 0.0, list[tuple[Gap, float]]()
    for gap in gaps:
        copy_s = gap.size_bytes / link_bytes_per_s
        end_s = max(out_free_s, start_s[gap.start]) + copy_s
        if end_s + copy_s <= start_s[gap.stop]:
            out_free_s = end_s
            leaving.append((gap, end_s))
    aways, back_s = list[Away](), float("inf")
    for gap, left_s in sorted(leaving, key=lambda one: -one[0].stop):
        begin_s = min(back_s, start_s[gap.stop]) - gap.size_bytes / link_bytes_per_s
        back = min(gap.stop, bisect_right(start_s, begin_s) - 1)
        while back > gap.start and not is_open[back]:
            back -= 1
        # A slot before the copy out has ended would make compute wait for it.
        if back > gap.start and start_s[back] >= left_s:
            aways.append(Away(gap, back))
            back_s = begin_s
    return tuple(aways)


def with_boundaries_away(chain: Chain, *, staying_share: float) -> Chain:
    """Return the chain of Note [The chain with boundaries away]: what is stored weighs `staying_share` of its bytes."""
    staying = tuple(int(staying_share * size) for size in chain.storage_bytes)
    spared = tuple(size - stays for size, stays in zip(chain.storage_bytes, staying, strict=True))

    def of(storages: Sequence[StorageId]) -> int:
        return sum(spared[s] for s in storages)

    def option_away(option: SavedSet, input_bytes: int) -> SavedSet:
        alias_bytes = of(option.storages)
        replay_peak_bytes = option.replay_peak_bytes + alias_bytes + input_bytes
        return replace(
            option,
            saved_bytes=option.saved_bytes + alias_bytes,
            save_peak_bytes=max(option.save_peak_bytes + alias_bytes + input_bytes, replay_peak_bytes),
            replay_peak_bytes=replay_peak_bytes,
        )

    blocks = list[Block]()
    *inputs_bytes, last_bytes = (of(boundary.storages) for boundary in chain.boundaries)
    for block, input_bytes in zip(chain.blocks, inputs_bytes, strict=True):
        options = tuple(option_away(option, input_bytes) for option in block.options)
        blocks.append(replace(block, forward_peak_bytes=block.forward_peak_bytes + input_bytes, options=options))
    tail_peak_bytes = chain.tail_peak_bytes + last_bytes
    return replace(chain, storage_bytes=staying, blocks=tuple(blocks), tail_peak_bytes=tail_peak_bytes)
