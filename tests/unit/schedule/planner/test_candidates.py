"""Sources that cannot help are passed over, and that changes no plan; the bounds that say so hold."""

import random
from itertools import pairwise

import pytest

from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import random_chain, uniform_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import Plan, Planner, certify, plan
from tinybp_lightning.schedule.bounds import certificate
from tinybp_lightning.schedule.planner import candidates
from tinybp_lightning.schedule.planner.quick import QuickBound
from tinybp_lightning.schedule.simulator import simulate


def _budgets(chain: Chain, count: int) -> list[int]:
    planner = Planner(chain)
    low, high = planner.smallest_bytes, planner.largest_bytes
    return sorted({low + (high - low) * k // count for k in range(count + 1)})


@pytest.mark.parametrize("seed", range(30))
def test_the_quick_bound_is_never_above_the_fastest_schedule(seed: int) -> None:
    chain = random_chain(random.Random(seed), 4)
    quick = QuickBound(chain)
    budgets = _budgets(chain, 6)
    for budget_bytes in budgets:
        best = fastest(chain, budget_bytes)
        assert best is not None
        assert quick.value_s(budget_bytes) <= best[0] * (1 + 1e-9)
    values = [quick.value_s(b) for b in budgets]
    assert all(a >= b - 1e-9 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(certificate.fastest_possible_s(chain))


def test_the_quick_bound_says_what_has_to_be_replayed() -> None:
    # A replay takes a second. Kept, a block weighs two bytes and its input, which has none for the first block.
    chain = uniform_chain(20)
    plain_s = certificate.fastest_possible_s(chain)
    taken_bytes = chain.tail_peak_bytes + chain.workspace_bytes
    assert QuickBound(chain).value_s(taken_bytes) == pytest.approx(plain_s + 20)
    assert QuickBound(chain).value_s(taken_bytes + 3 * 8 - 1) == pytest.approx(plain_s + 12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_long", [False, True])
def test_passing_sources_over_changes_no_plan(seed: int, is_long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = random_chain(random.Random(seed), 20)
    if is_long:
        monkeypatch.setattr(certificate, "_LONG_BLOCKS", 12)
    budgets = _budgets(chain, 8)
    found = [plan(chain, budget_bytes=b) for b in budgets]
    monkeypatch.setattr(candidates, "_SURELY", float("inf"))
    every = [plan(chain, budget_bytes=b) for b in budgets]
    assert [(p.total_s, p.peak_bytes) for p in found] == [(p.total_s, p.peak_bytes) for p in every]


def test_a_budget_with_room_asks_for_no_helpers_and_not_for_the_smallest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(name: str) -> None:
        real = getattr(candidates, name)
        monkeypatch.setattr(candidates, name, lambda *a, **k: asked.append(name) or real(*a, **k))

    for name in ("helped_grid", "tight_schedules", "Thrifty"):
        note(name)
    chain = uniform_chain(40)
    planner = Planner(chain)
    roomy = planner.plan(budget_bytes=planner.largest_bytes * 3 // 4)
    assert roomy.recompute_s > 0
    assert asked == []
    planner.plan(budget_bytes=planner.smallest_bytes)
    assert set(asked) == {"helped_grid", "tight_schedules", "Thrifty"}


@pytest.mark.parametrize("seed", range(8))
def test_prices_prove_a_bound_for_smaller_budgets_too(seed: int) -> None:
    chain = random_chain(random.Random(seed), 20)
    budgets = _budgets(chain, 8)
    plans = [plan(chain, budget_bytes=b) for b in budgets]
    some = False
    for larger in plans[2:]:
        proof = _priced(chain, larger)
        for smaller in plans:
            if smaller.budget_bytes <= larger.budget_bytes:
                assert proof.least_s(smaller.budget_bytes) <= smaller.total_s * (1 + 1e-9)
                some |= proof.least_s(smaller.budget_bytes) > proof.priced_bound_s
    assert some
    with pytest.raises(AssertionError, match="larger budget"):
        _priced(chain, plans[0]).least_s(plans[0].budget_bytes + 1)


def _priced(chain: Chain, found: Plan) -> certificate.Certificate:
    timeline = simulate(chain, found.schedule)
    return certify(chain, found.schedule, timeline, budget_bytes=found.budget_bytes, seconds_per_byte=0.1)
