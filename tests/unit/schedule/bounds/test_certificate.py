"""The bounds are never above the best of all schedules, whatever the prices, and near the plan where it matters."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.graph.strategies_chain import chains
from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import random_chain, transformer_chain, uniform_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import Planner, certify, keep_all, plan, revolve, simulate
from tinybp_lightning.schedule.bounds.certificate import fastest_possible_s
from tinybp_lightning.schedule.bounds.dp_bound import dp_bound_s
from tinybp_lightning.schedule.bounds.lagrangian import LagrangianBound
from tinybp_lightning.schedule.bounds.live_sets import Resolution
from tinybp_lightning.schedule.bounds.relaxation import relax

_ROUNDING = 1 + 1e-6


def _best_s(chain: Chain, budget_bytes: int) -> float:
    best = fastest(chain, budget_bytes)
    assert best is not None
    return best[0]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_no_prices_and_no_slots_give_more_than_brute_force(seed: int, num_blocks: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks, max_options=3)
    generator = np.random.default_rng(seed)
    planner = Planner(chain)
    for budget_bytes in {planner.smallest_bytes, (planner.smallest_bytes + planner.largest_bytes) // 2}:
        relaxed, best_s = relax(chain, budget_bytes=budget_bytes), _best_s(chain, budget_bytes)
        bounds = [dp_bound_s(relaxed, Resolution(num_slots, 16), limit_s=best_s) for num_slots in (2, 9, 400)]
        for scale in (0.03, 0.3, 3.0):
            prices = generator.random(num_blocks + 2) * (generator.random(num_blocks + 2) < 0.5) * scale
            bounds.append(LagrangianBound(relaxed).price(prices).value_s)
        found = certify(chain, planner.plan(budget_bytes=budget_bytes), planner=planner)
        assert max(*bounds, found.lower_bound_s) <= best_s * _ROUNDING


@settings(deadline=None, max_examples=80)
@given(chains(max_blocks=8), st.data())
def test_never_above_the_plan(chain: Chain, data: st.DataObject) -> None:
    planner = Planner(chain)
    budget_bytes = data.draw(st.integers(planner.smallest_bytes, planner.largest_bytes))
    prices = data.draw(st.lists(st.floats(0, 2), min_size=len(chain.blocks) + 2, max_size=len(chain.blocks) + 2))
    found = planner.plan(budget_bytes=budget_bytes)
    relaxed = relax(chain, budget_bytes=budget_bytes)
    assert LagrangianBound(relaxed).price(np.array(prices)).value_s <= found.total_s * _ROUNDING + 1e-9
    certificate = certify(chain, found, planner=planner)
    assert max(certificate.lagrangian_bound_s, certificate.dp_bound_s) <= found.total_s * _ROUNDING
    assert certificate.lower_bound_s >= fastest_possible_s(chain) / _ROUNDING
    assert certificate.gap >= 0


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_never_above_revolve(num_slots: int) -> None:
    chain = uniform_chain(12)
    timeline = simulate(chain, revolve(chain, num_slots=num_slots, keep_spine=True))
    relaxed = relax(chain, budget_bytes=timeline.peak_bytes)
    assert dp_bound_s(relaxed, Resolution(64, 8), limit_s=timeline.total_s) <= timeline.total_s


@pytest.mark.parametrize("percent", [70, 50, 30, 15])
def test_close_to_the_plan_of_a_transformer(percent: int) -> None:
    chain = transformer_chain(10)
    plain_bytes = simulate(chain, keep_all(chain)).peak_bytes
    found = plan(chain, budget_bytes=plain_bytes * percent // 100)
    assert found.total_s > fastest_possible_s(chain) * 1.03
    assert certify(chain, found).gap < 0.005


def test_prices_prove_the_bound() -> None:
    chain = transformer_chain(4)
    planner = Planner(chain)
    found = planner.plan(budget_bytes=planner.largest_bytes // 2)
    relaxed = relax(chain, budget_bytes=found.budget_bytes)
    certificate = certify(chain, found, planner=planner)
    priced = LagrangianBound(relaxed).price(np.array(certificate.prices))
    assert priced.value_s == certificate.lagrangian_bound_s


def test_supergradient_bounds_every_other_price() -> None:
    chain = transformer_chain(3)
    lagrangian = LagrangianBound(relax(chain, budget_bytes=40 * 2**20))
    generator = np.random.default_rng(3)
    prices = [generator.random(len(chain.blocks) + 2) * 1e-6 for _ in range(6)]
    priced = [lagrangian.price(p) for p in prices]
    for here, p in zip(priced, prices, strict=True):
        for there, q in zip(priced, prices, strict=True):
            assert there.value_s <= here.value_s + here.excess_bytes[1:] @ (q - p)[1:] + 1e-4


def test_dp_bound_counts_whole_boundaries_where_prices_mix() -> None:
    planner = Planner(transformer_chain(4))
    found = planner.plan(budget_bytes=planner.smallest_bytes)
    certificate = certify(planner.chain, found, planner=planner)
    assert certificate.lagrangian_bound_s * 1.05 < certificate.dp_bound_s <= found.total_s


def test_nothing_fits_is_no_bound() -> None:
    chain = uniform_chain(3)
    assert dp_bound_s(relax(chain, budget_bytes=2), Resolution(8, 8), limit_s=100.0) == float("inf")


def test_certificate_of_plain_training_is_tight() -> None:
    chain = transformer_chain(2)
    found = plan(chain, budget_bytes=simulate(chain, keep_all(chain)).peak_bytes)
    assert certify(chain, found).lower_bound_s == pytest.approx(found.total_s)
