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
_TIGHT = 0.005
"""A bound this near needs no second one,"""
_TIGHT_LONG = 0.015
_MANY_BLOCKS = 48
"""nor one this near on a chain of more blocks, where the second can take ten seconds."""
_NEARLY_FULL = 0.97
_SLOPE_SHARE = 8
"""What a byte is worth is taken over this part of a budget."""
_WORK = 1e7
"""About how many elementary steps of `bound` the search may take: a second or two."""
_STRIDES = 50
_LONG_BLOCKS = 400
"""Beyond this many blocks one evaluation takes seconds and its record hundreds of MiB: no search, and prices are those
of the coarse chain. The dynamic-programming bound is asked only where bytes are tight, with few slots.
"""
_LOOSE = 0.02
_LOWER = 0.9
_NEAR = 0.03
_TIGHT_BUDGET = 1.5
"""Where a plan takes so many times the fastest step prices are loose: a long chain asks the other bound first, and
them only if that one is not `_NEAR`.
"""
_COARSE_BLOCKS = 72
"""Beyond this many blocks the dynamic-programming bound looks at a coarse chain first: it can afford more held sets."""
_CAPPED_BLOCKS = 150
"""And beyond this many at the whole chain only if the coarse one is too long."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """No legal schedule without offload within `budget_bytes` takes less than `lower_bound_s`.

    `total_s` is the time of the plan that was certified. `prices` prove `lagrangian_bound_s`: it is
    `LagrangianBound(relax(chain, budget_bytes=...)).price(prices).value_s`, and with all prices 0 the time of a step
    that recomputes nothing. For a long chain it is the bound of its coarse one, each block of which has the prices of
    all that it stands for (`coarse_spans`). `dp_bound_s` is 0 where `certify` did not ask for that bound.
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

    **Returns:** a certificate whose bound is never above the time of the best legal schedule.
    """
    budget_bytes = plan.budget_bytes
    num_blocks = len(chain.blocks)
    plain_s = fastest_possible_s(chain)
    certificate = Certificate(budget_bytes, plan.total_s, plain_s, 0.0, (0.0,) * (num_blocks + 2))
    if plan.total_s <= plain_s * (1 + _CLOSE):
        return certificate
    relaxed = relax(chain, budget_bytes=budget_bytes)
    is_long = num_blocks > _LONG_BLOCKS
    if is_long and plan.total_s > _TIGHT_BUDGET * plain_s:
        dp_s = _dp_bound_s(relaxed, budget_bytes=budget_bytes, limit_s=plan.total_s)
        certificate = replace(certificate, dp_bound_s=dp_s)
        if dp_s >= plan.total_s * (1 - _NEAR):
            return certificate
    seconds_per_byte = _seconds_per_byte(planner or Planner(chain), plan)
    first = _first_prices(chain, plan, seconds_per_byte)
    if is_long:
        lagrangian_s, scale = _try_scales(chain, budget_bytes, first, plan.total_s)
        prices = scale * first
    else:
        lagrangian = LagrangianBound(relaxed, stride=max(1, num_blocks // _STRIDES))
        num_steps = int(np.clip(_WORK / num_blocks**3, 3, 30))
        lagrangian_s, prices = _search(lagrangian, first, plan.total_s, num_steps=num_steps)
    if lagrangian_s > plain_s:
        certificate = replace(certificate, lagrangian_bound_s=lagrangian_s, prices=tuple(prices.tolist()))
    near = _TIGHT if num_blocks <= _MANY_BLOCKS else _TIGHT_LONG
    if not is_long and lagrangian_s < plan.total_s * (1 - near):
        dp_s = _dp_bound_s(relaxed, budget_bytes=budget_bytes, limit_s=plan.total_s)
        certificate = replace(certificate, dp_bound_s=dp_s)
    return certificate


def _seconds_per_byte(planner: Planner, plan: Plan) -> float:
    """Return about how much time one more byte saves, from the plan for a budget that is an eighth smaller."""
    smaller_bytes = max(planner.smallest_bytes, plan.budget_bytes - plan.budget_bytes // _SLOPE_SHARE)
    if smaller_bytes >= plan.budget_bytes:
        return 0.0
    smaller = planner.plan(budget_bytes=smaller_bytes)
    return max(0.0, smaller.total_s - plan.total_s) / (plan.budget_bytes - smaller_bytes)


def _dp_bound_s(relaxed: RelaxedChain, *, budget_bytes: int, limit_s: float) -> float:
    """Return the dynamic-programming bound of the chain or its coarse one; 0 where it would take too long."""
    chains = [relaxed]
    if relaxed.num_blocks > _COARSE_BLOCKS:
        chains.insert(0, relax(coarsen(relaxed.chain), budget_bytes=budget_bytes))
    dp_s = 0.0
    for asked in chains:
        resolution = affordable(asked)
        if resolution:
            dp_s = max(dp_s, dp_bound_s(asked, resolution, limit_s=limit_s))
            if relaxed.num_blocks > _CAPPED_BLOCKS or dp_s >= limit_s * (1 - _TIGHT):
                break
    return dp_s


def _search(chain: LagrangianBound, first: _Floats, target_s: float, *, num_steps: int) -> tuple[float, _Floats]:
    """Return the best value and its prices in `num_steps` steps towards `target_s`."""
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


def _try_scales(chain: Chain, budget_bytes: int, first: _Floats, target_s: float) -> tuple[float, float]:
    """Return the coarse chain's bound at the better of two scales of the first prices, and the scale.

    The second is asked only where the first is loose.
    """
    spans = coarse_spans(chain)
    lagrangian = LagrangianBound(
        relax(coarsen(chain), budget_bytes=budget_bytes), stride=max(1, len(spans) // _STRIDES)
    )
    summed = np.array([0.0, *(first[start + 1 : end + 1].sum() for start, end in spans), first[-1]])
    value_s = lagrangian.value_s(summed)
    if value_s >= target_s * (1 - _LOOSE):
        return value_s, 1.0
    lower_s = lagrangian.value_s(_LOWER * summed)
    return (lower_s, _LOWER) if lower_s > value_s else (value_s, 1.0)


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
