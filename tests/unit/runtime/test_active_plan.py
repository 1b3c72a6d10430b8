"""The first step flies something small that is quickly found, and fast where there is room."""

import pytest

from benchmarks.chains import load_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.runtime.torch.active_plan import small_schedule
from tinybp_lightning.schedule import Planner, every_sqrt_n, per_block, simulate


@pytest.fixture(scope="module")
def chain() -> Chain:
    return load_chain("gpt2_8")


def test_a_known_method_that_leaves_most_of_the_budget_is_flown_and_nothing_is_planned(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("tinybp_lightning.runtime.torch.active_plan.Planner")
    fast = min((per_block(chain), every_sqrt_n(chain)), key=lambda s: simulate(chain, s).total_s)
    assert small_schedule(chain, budget_bytes=3 * simulate(chain, fast).peak_bytes) == fast


def test_without_room_the_smallest_plan_is_flown(chain: Chain) -> None:
    smallest_bytes = min(simulate(chain, method(chain)).peak_bytes for method in (per_block, every_sqrt_n))
    schedule = small_schedule(chain, budget_bytes=3 * smallest_bytes - 1)
    assert schedule == Planner(chain).smallest_plan().schedule
    assert simulate(chain, schedule).peak_bytes == Planner(chain).smallest_bytes
