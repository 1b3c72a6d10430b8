"""Bound how far a plan can be from the best one: the better of the Lagrangian and the dynamic-programming bound.

Polyak's subgradient steps find good prices for the Lagrangian bound. The first prices come from the plan: the moments
at which it nearly fills the budget share the seconds that one more byte would save. Every further step moves along the
supergradient by `(plan - value) / |supergradient|^2`. Bad prices make the bound loose, never wrong.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import Backward
from tinybp_lightning.schedule.bounds.dp_bound import dp_bound_s
from tinybp_lightning.schedule.bounds.lagrangian import LagrangianBound
from tinybp_lightning.schedule.bounds.live_sets import affordable
from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain, coarse_spans, coarsen, relax
from tinybp_lightning.schedule.planner.planner import Plan, Planner
from tinybp_lightning.schedule.simulator import simulate

__all__ = ["Certificate", "certify", "fastest_possible_s"]

_Floats = NDArray[np.float64]
_CLOSE = 1e-4
"""A bound this near the plan, relative to it, is not improved further."""
_NEAR = 0.01
"""A Lagrangian bound this near the plan needs no dynamic-programming bound beside it."""
_COARSE_BLOCKS = 100
"""Both bounds of a chain of more blocks are those of its coarse chain."""
_WORK = 1e7
"""About how many elementary steps the search for prices may take: a second or two."""
_LEAST_STEPS, _MOST_STEPS = 3, 30
"""The limits on the steps of that search, however long or short the chain."""
_STRIDES = 50
"""The stride of `LagrangianBound` is this part of the chain."""
_NEARLY_FULL = 0.97
"""The first prices are on the moments at which the plan fills this share of the budget."""
_SLOPE_SHARE = 8
"""What a byte is worth is taken from a plan whose budget is smaller by this part."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """No legal schedule without offload within `budget_bytes` takes less than `lower_bound_s`.

    `total_s` is the time of the plan that was certified. `prices` prove `lagrangian_bound_s`: it is
    `LagrangianBound(relax(chain, budget_bytes=...)).price(prices).value_s` up to the stride, and with all prices 0 the
    time of a step that recomputes nothing. For a long chain, `chain` is its coarse one here. `dp_bound_s` is 0 where
    `certify` did not ask for that bound.
    """

    budget_bytes: int
    total_s: float
    lagrangian_bound_s: float
    dp_bound_s: float
    prices: tuple[float, ...]

    @property
    def lower_bound_s(self) -> float:
        """The better of the two bounds."""
        # The bounds sum in another order than the simulator: the last bit must not make the gap negative.
        return min(self.total_s, max(self.lagrangian_bound_s, self.dp_bound_s))

    @property
    def gap(self) -> float:
        """How much slower than the best possible the plan is at most, as a share: 0.01 is one percent."""
        return self.total_s / self.lower_bound_s - 1 if self.lower_bound_s else 0.0


def certify(chain: Chain, plan: Plan, *, planner: Planner | None = None) -> Certificate:
    """Return a lower bound on the time of every schedule within the budget of `plan`.

    **Arguments:** `planner`: of `chain`, where there is one: its tables then need not be filled again.
    """
    spans = coarse_spans(chain) if len(chain.blocks) > _COARSE_BLOCKS else None
    num_blocks = len(spans) if spans else len(chain.blocks)
    plain_s = fastest_possible_s(chain)
    certificate = Certificate(plan.budget_bytes, plan.total_s, plain_s, 0.0, (0.0,) * (num_blocks + 2))
    if plan.total_s <= plain_s * (1 + _CLOSE):
        return certificate
    relaxed = relax(coarsen(chain) if spans else chain, budget_bytes=plan.budget_bytes)
    first = _first_prices(chain, plan, _seconds_per_byte(planner or Planner(chain), plan))
    if spans:
        first = np.array([0.0, *(first[start + 1 : end + 1].sum() for start, end in spans), first[-1]])
    lagrangian_s, prices = _search(relaxed, first, plan.total_s)
    if lagrangian_s > plain_s:
        certificate = replace(certificate, lagrangian_bound_s=lagrangian_s, prices=tuple(prices.tolist()))
    resolution = affordable(relaxed) if lagrangian_s < plan.total_s * (1 - _NEAR) else None
    if resolution:
        certificate = replace(certificate, dp_bound_s=dp_bound_s(relaxed, resolution, limit_s=plan.total_s))
    return certificate


def _seconds_per_byte(planner: Planner, plan: Plan) -> float:
    """Return about how much time one more byte saves, from the plan for a budget that is an eighth smaller."""
    smaller_bytes = max(planner.smallest_bytes, plan.budget_bytes - plan.budget_bytes // _SLOPE_SHARE)
    if smaller_bytes >= plan.budget_bytes:
        return 0.0
    smaller = planner.plan(budget_bytes=smaller_bytes)
    return max(0.0, smaller.total_s - plan.total_s) / (plan.budget_bytes - smaller_bytes)


def _search(relaxed: RelaxedChain, first: _Floats, target_s: float) -> tuple[float, _Floats]:
    """Return the best value that was found towards `target_s`, and its prices."""
    chain = LagrangianBound(relaxed, stride=max(1, relaxed.num_blocks // _STRIDES))
    num_steps = int(np.clip(_WORK / relaxed.num_blocks**3, _LEAST_STEPS, _MOST_STEPS))
    prices, best_s, best = first, -np.inf, first
    step, num_stalled = 1.0, 0
    for _ in range(num_steps):
        priced = chain.price(prices)
        num_stalled = 0 if priced.value_s > best_s else num_stalled + 1
        if priced.value_s > best_s:
            best_s, best = priced.value_s, prices
        if num_stalled == 3:
            step, num_stalled = step * 0.6, 0
        excess = np.where((prices <= 0) & (priced.excess_bytes < 0), 0.0, priced.excess_bytes)
        excess[0] = 0.0
        missing_s, norm = target_s - priced.value_s, float(excess @ excess)
        if missing_s <= _CLOSE * target_s or norm == 0:
            break
        prices = np.maximum(0.0, prices + step * missing_s / norm * excess)
    return float(best_s), best


def fastest_possible_s(chain: Chain) -> float:
    """Return the time of a step without recomputation: every block once, with its fastest backward."""
    backward_s = sum(min(option.backward_s for option in block.options) for block in chain.blocks)
    return sum(block.forward_s for block in chain.blocks) + backward_s


def _first_prices(chain: Chain, plan: Plan, seconds_per_byte: float) -> _Floats:
    """Share `seconds_per_byte` out among the moments at which the plan nearly fills the budget."""
    timeline = simulate(chain, plan.schedule)
    peaks = np.zeros(len(chain.blocks) + 2)
    peaks[-1] = timeline.tail.peak_bytes
    for action, moment in zip(plan.schedule.actions, timeline.moments, strict=True):
        if isinstance(action, Backward):
            peaks[action.block + 1] = moment.peak_bytes
    full = peaks >= _NEARLY_FULL * plan.budget_bytes
    full[0] = False
    return np.where(full, seconds_per_byte / max(1, int(full.sum())), 0.0)
