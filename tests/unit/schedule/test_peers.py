"""Known methods that choose what to keep: their order literally, and none of them faster than the plan at its peak."""

import itertools
import random

import pytest

from tests.unit.schedule.chains_by_hand import random_chain, transformer_chain, uniform_chain
from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import (
    Planner,
    Schedule,
    every_k,
    every_sqrt_n,
    keep_all,
    keep_some,
    per_block,
    saved_knapsack,
    selective,
    simulate,
    to_text,
    verify_schedule,
)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (keep_some(uniform_chain(3), kept=[0, 1, 2], stored=()), "K0 K1 K2 B2 B1 B0"),
        (keep_some(uniform_chain(5), kept=[1], stored=[3]), "F0 K1 S2 F2 S3 F3 F4 K3 D3 K4 B4 B3 K2 D2 B2 B1 K0 B0"),
        (saved_knapsack(uniform_chain(3), saved_share=0.0), "F0 F1 F2 K0 K1 K2 B2 B1 B0"),
        (saved_knapsack(uniform_chain(3), saved_share=1.0), "K0 K1 K2 B2 B1 B0"),
        (selective(uniform_chain(4), signatures=(), k=2), "F0 F1 S2 F2 F3 K2 D2 K3 B3 B2 K0 K1 B1 B0"),
    ],
)
def test_order_literally(schedule: Schedule, text: str) -> None:
    assert to_text(schedule) == text
    verify_schedule(uniform_chain(schedule.num_blocks), schedule)


def test_keep_some_with_nothing_kept_is_per_block() -> None:
    chain = uniform_chain(5)
    assert keep_some(chain, kept=(), stored=range(5)) == per_block(chain)


def test_saving_less_bytes_can_leave_the_peak_where_it_was() -> None:
    # One giant replay: what a cap on saved bytes does not see.
    chain = uniform_chain(8)
    nothing_saved = simulate(chain, saved_knapsack(chain, saved_share=0.0))
    assert nothing_saved.peak_bytes >= simulate(chain, keep_all(chain)).peak_bytes
    assert max(nothing_saved.num_forwards) == 2


def test_selective_keeps_the_kinds_it_is_told() -> None:
    chain = transformer_chain(3)
    forwards = simulate(chain, selective(chain, signatures=["attention"], k=4)).num_forwards
    assert {block.signature for block, num in zip(chain.blocks, forwards, strict=True) if num == 1} == {"attention"}


@pytest.mark.parametrize("saved_share", [-0.1, 1.1, float("nan")])
def test_refuses_a_share_that_is_none(saved_share: float) -> None:
    with pytest.raises(ConfigError, match=f"`saved_share={saved_share}`"):
        saved_knapsack(uniform_chain(2), saved_share=saved_share)


def test_refuses_empty_regions() -> None:
    with pytest.raises(ConfigError, match="`k=0`"):
        selective(uniform_chain(2), signatures=(), k=0)


def _peers(chain: Chain) -> list[Schedule]:
    kinds = sorted({block.signature for block in chain.blocks})[:4]
    chosen = [c for r in range(len(kinds) + 1) for c in itertools.combinations(kinds, r)]
    return [
        keep_all(chain),
        per_block(chain),
        every_sqrt_n(chain),
        every_k(chain, k=4),
        *(saved_knapsack(chain, saved_share=k / 8) for k in range(9)),
        *(selective(chain, signatures=signatures, k=k) for signatures in chosen[:8] for k in (2, 4)),
    ]


@pytest.mark.parametrize(
    "chain",
    [transformer_chain(2), transformer_chain(5), *(random_chain(random.Random(s), n) for s in (0, 1) for n in (6, 12))],
    ids=["t2", "t5", "r6-0", "r12-0", "r6-1", "r12-1"],
)
def test_no_peer_is_faster_than_the_plan_at_its_peak(chain: Chain) -> None:
    planner = Planner(chain)
    for peer in _peers(chain):
        timeline = simulate(chain, peer)
        found = simulate(chain, planner.plan(budget_bytes=timeline.peak_bytes).schedule)
        assert found.peak_bytes <= timeline.peak_bytes
        # A sum in another order may differ in its last bit.
        assert found.total_s <= timeline.total_s + 1e-9
