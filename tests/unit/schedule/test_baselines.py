"""Known methods: their replay order literally, their counts of forwards, and Revolve's published optimum."""

from math import comb

import pytest

from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import (
    Schedule,
    every_k,
    every_sqrt_n,
    keep_all,
    per_block,
    revolve,
    revolve_cost,
    simulate,
    to_text,
    verify_schedule,
)


def _forwards(chain: Chain, schedule: Schedule) -> int:
    return sum(simulate(chain, schedule).num_forwards)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (keep_all(uniform_chain(3)), "K0 K1 K2 B2 B1 B0"),
        (per_block(uniform_chain(3)), "F0 S1 F1 S2 F2 K2 D2 B2 K1 D1 B1 K0 B0"),
        (every_k(uniform_chain(5), k=2), "F0 F1 S2 F2 F3 K4 B4 K2 D2 K3 B3 B2 K0 K1 B1 B0"),
        (every_sqrt_n(uniform_chain(4)), "F0 F1 K2 K3 B3 B2 K0 K1 B1 B0"),
        (revolve(uniform_chain(3), num_slots=1), "F0 F1 F2 F0 F1 K2 B2 F0 K1 B1 K0 B0"),
        (revolve(uniform_chain(4), num_slots=2), "F0 F1 F2 F3 F0 S1 F1 F2 K3 B3 F1 K2 B2 K1 D1 B1 K0 B0"),
        (revolve(uniform_chain(4), num_slots=2, keep_spine=True), "F0 S1 F1 F2 F3 F1 F2 K3 B3 F1 K2 B2 K1 D1 B1 K0 B0"),
    ],
)
def test_order_literally(schedule: Schedule, text: str) -> None:
    assert to_text(schedule) == text
    verify_schedule(uniform_chain(schedule.num_blocks), schedule)


@pytest.mark.parametrize(("num_blocks", "num_slots", "num_forwards"), [(16, 2, 77), (32, 3, 157), (64, 6, 284)])
def test_revolve_counts(num_blocks: int, num_slots: int, num_forwards: int) -> None:
    chain = uniform_chain(num_blocks)
    assert 2 * num_blocks + revolve_cost(num_blocks, num_slots) == num_forwards
    assert _forwards(chain, revolve(chain, num_slots=num_slots)) == num_forwards
    assert _forwards(chain, revolve(chain, num_slots=num_slots, keep_spine=True)) < num_forwards


@pytest.mark.parametrize("num_slots", range(1, 7))
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 16, 33])
def test_revolve_holds_no_more_boundaries_than_slots(num_blocks: int, num_slots: int) -> None:
    chain = uniform_chain(num_blocks)
    timeline = simulate(chain, revolve(chain, num_slots=num_slots))
    # Stored boundaries beside the input, the cursor, and one block's saved set and output or gradient.
    assert timeline.peak_bytes <= (num_slots - 1) + 1 + 3
    assert sum(timeline.num_forwards) == 2 * num_blocks + revolve_cost(num_blocks, num_slots)


@pytest.mark.parametrize(("repetitions", "num_slots"), [(2, 3), (3, 2), (3, 4), (5, 3)])
def test_revolve_cost_is_the_binomial_of_griewank_and_walther(repetitions: int, num_slots: int) -> None:
    # n = C(s + r, s) blocks need r n - C(s + r, s + 1) forwards in all; each block's own replay is one of them.
    num_blocks = comb(num_slots + repetitions, num_slots)
    total = repetitions * num_blocks - comb(num_slots + repetitions, num_slots + 1)
    assert revolve_cost(num_blocks, num_slots) == total


@pytest.mark.parametrize("num_slots", [2, 10])
def test_long_chains_need_no_recursion(num_slots: int) -> None:
    chain = uniform_chain(400)
    schedule = revolve(chain, num_slots=num_slots, keep_spine=True)
    verify_schedule(chain, schedule)


@pytest.mark.parametrize(("num_blocks", "k", "num_forwards"), [(16, 4, 28), (10, 3, 19), (5, 9, 5), (1, 1, 1)])
def test_every_k_runs_all_but_the_last_segment_twice(num_blocks: int, k: int, num_forwards: int) -> None:
    chain = uniform_chain(num_blocks)
    assert _forwards(chain, every_k(chain, k=k)) == num_forwards


@pytest.mark.parametrize("num_blocks", [1, 2, 17])
def test_per_block_runs_every_block_twice(num_blocks: int) -> None:
    chain = uniform_chain(num_blocks)
    assert simulate(chain, per_block(chain)).num_forwards == (2,) * num_blocks


def test_refuses_no_slots_and_empty_segments() -> None:
    with pytest.raises(ConfigError, match="`num_slots=0`"):
        revolve(uniform_chain(2), num_slots=0)
    with pytest.raises(ConfigError, match="`k=0`"):
        every_k(uniform_chain(2), k=0)
