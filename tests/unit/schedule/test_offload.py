"""Schedules that offload: legal, within the budget, never slower than without, near the best of all schedules."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.graph.strategies_chain import chains
from tests.unit.schedule.brute_force_offload import fastest_with_offload
from tests.unit.schedule.chains_by_hand import random_chain, transformer_chain, uniform_chain
from tinybp_lightning.errors import BudgetTooSmallError, ConfigError
from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId, verify_chain
from tinybp_lightning.schedule import (
    Planner,
    Schedule,
    from_text,
    plan_offload,
    simulate,
    to_text,
    verify_schedule,
)
from tinybp_lightning.schedule.offload import Away, find_gaps, open_slots, weave, with_boundaries_away


def _check(chain: Chain, planner: Planner, budget_bytes: int, link_bytes_per_s: float) -> float:
    found = plan_offload(planner, budget_bytes=budget_bytes, link_bytes_per_s=link_bytes_per_s)
    verify_schedule(chain, found.schedule)
    timeline = simulate(chain, found.schedule, link_bytes_per_s=link_bytes_per_s)
    assert timeline.peak_bytes == found.peak_bytes <= budget_bytes
    assert (timeline.total_s, timeline.recompute_s) == (found.total_s, found.recompute_s)
    assert timeline.wait_s == found.wait_s
    return found.total_s


@pytest.mark.parametrize(("num_blocks", "seed"), [*((3, seed) for seed in range(8)), *((4, seed) for seed in range(3))])
@pytest.mark.parametrize("spare_bytes", [0, 1])
def test_near_brute_force(num_blocks: int, seed: int, spare_bytes: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks, max_options=1)
    planner = Planner(chain)
    budget_bytes = planner.smallest_bytes + spare_bytes
    found_s = _check(chain, planner, budget_bytes, 4.0)
    best_s = fastest_with_offload(chain, budget_bytes, 4.0, limit_s=found_s)
    assert best_s is not None
    assert best_s <= found_s <= 1.02 * best_s


@pytest.mark.parametrize(("budget_bytes", "without_s", "with_s"), [(4, 14, 12), (5, 12, 11), (6, 11, 11), (7, 10, 10)])
def test_equals_brute_force_on_a_uniform_chain(budget_bytes: int, without_s: float, with_s: float) -> None:
    chain = uniform_chain(4)
    planner = Planner(chain)
    assert planner.plan(budget_bytes=budget_bytes).total_s == without_s
    assert _check(chain, planner, budget_bytes, 2.0) == with_s
    assert fastest_with_offload(chain, budget_bytes, 2.0, limit_s=without_s) == with_s


@settings(deadline=None, max_examples=40)
@given(chains(max_blocks=6), st.data())
def test_any_chain_any_budget_any_link(chain: Chain, data: st.DataObject) -> None:
    planner = Planner(chain)
    budget_bytes = data.draw(st.integers(planner.smallest_bytes, planner.largest_bytes))
    link_bytes_per_s = data.draw(st.sampled_from([0.25, 1.0, 2.0, 16.0]))
    found_s = _check(chain, planner, budget_bytes, link_bytes_per_s)
    assert found_s <= planner.plan(budget_bytes=budget_bytes).total_s
    assert _check(chain, Planner(chain), budget_bytes, link_bytes_per_s) == found_s


def test_measured_bandwidth_makes_a_transformer_faster() -> None:
    # 64 MiB between layers, 5 ms of forward a layer, 51.6 GiB/s each way: as Llama with 16k tokens on an H200.
    chain = _in_seconds(transformer_chain(8, unit_bytes=64 * 2**20), seconds=5e-3 / 14)
    planner = Planner(chain)
    budget_bytes = planner.smallest_bytes + planner.smallest_bytes // 4
    without = simulate(chain, planner.plan(budget_bytes=budget_bytes).schedule)
    with_offload_s = _check(chain, planner, budget_bytes, 51.6 * 2**30)
    assert with_offload_s < 0.97 * without.total_s


def test_a_budget_that_only_offload_meets() -> None:
    chain = _dear_beginning()
    verify_chain(chain)
    planner = Planner(chain)
    found = plan_offload(planner, budget_bytes=planner.smallest_bytes - 1, link_bytes_per_s=100.0)
    assert found.peak_bytes < planner.smallest_bytes
    assert found.moved_bytes > 0


def test_copies_that_fit_but_wait_are_not_preferred() -> None:
    """With boundaries away a slow link fits what without offload fits more cheaply."""
    chain = _with_a_free_option()
    verify_chain(chain)
    planner = Planner(chain)
    assert planner.plan(budget_bytes=9).total_s == 4
    assert _check(chain, planner, 9, 0.25) == 4


def test_refuses_a_budget_that_nothing_meets() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"`budget_bytes=1` cannot be met with offload.* needs 4 bytes"):
        plan_offload(Planner(uniform_chain(4)), budget_bytes=1, link_bytes_per_s=1.0)


@pytest.mark.parametrize("link_bytes_per_s", [0.0, -1.0, float("nan")])
def test_refuses_a_bandwidth_that_is_none(link_bytes_per_s: float) -> None:
    with pytest.raises(ConfigError, match=f"`link_bytes_per_s={link_bytes_per_s}`"):
        plan_offload(Planner(uniform_chain(2)), budget_bytes=100, link_bytes_per_s=link_bytes_per_s)


def test_gaps_are_where_a_stored_boundary_is_not_read() -> None:
    chain = uniform_chain(4)
    actions = from_text("F0 S1 F1 F2 K3 B3 F1 K2 B2 K1 D1 B1 K0 B0").actions
    # Boundary 1 is stored by action 1, read by action 6 (F1) and by action 9 (K1); nothing goes between K2 and B2.
    gaps = find_gaps(chain, actions)
    assert [(g.boundary, g.start, g.stop) for g in gaps] == [(1, 2, 6), (1, 7, 9)]
    assert [k for k, is_open in enumerate(open_slots(chain, actions)) if not is_open] == [8, 10, 11, 13]
    woven, place = weave(actions, [Away(gaps[0], 5), Away(gaps[1], 9)])
    text = "F0 S1 O1 F1 F2 K3 R1 B3 F1 O1 K2 B2 R1 K1 D1 B1 K0 B0"
    assert to_text(Schedule(4, woven)) == text
    assert [woven[k] for k in place] == list(actions)
    verify_schedule(chain, Schedule(4, woven))


@pytest.mark.parametrize("staying_share", [0.0, 0.5, 1.0])
def test_the_chain_with_boundaries_away_is_a_chain(staying_share: float) -> None:
    chain = transformer_chain(2)
    away = with_boundaries_away(chain, staying_share=staying_share)
    verify_chain(away)
    assert (away == chain) is (staying_share == 1.0)
    assert sum(away.storage_bytes) == staying_share * sum(chain.storage_bytes)


def _in_seconds(chain: Chain, *, seconds: float) -> Chain:
    blocks = tuple(
        replace(
            block,
            forward_s=block.forward_s * seconds,
            options=tuple(
                replace(option, replay_s=option.replay_s * seconds, backward_s=option.backward_s * seconds)
                for option in block.options
            ),
        )
        for block in chain.blocks
    )
    return replace(chain, blocks=blocks)


def _with_a_free_option() -> Chain:
    """Return a chain in which only one block takes time; its plan without offload saves every block."""

    def option(saved_bytes: int, save_peak_bytes: int, replay_peak_bytes: int) -> SavedSet:
        return SavedSet("", (), saved_bytes, save_peak_bytes, 0.0, replay_peak_bytes, 0.0, 0)

    def block(name: str, forward_s: float, forward_peak_bytes: int, *options: SavedSet) -> Block:
        named = tuple(replace(option, name=f"option{k}") for k, option in enumerate(options))
        return Block(name, "s", forward_s, forward_peak_bytes, 0, named)

    return Chain(
        storage_bytes=(0, 4, 0, 2, 0, 3, 0),
        blocks=(
            block("b0", 4.0, 4, option(0, 4, 0)),
            block("b1", 0.0, 0, option(2, 2, 2), option(0, 0, 0)),
            block("b2", 0.0, 2, option(3, 5, 3)),
            block("b3", 0.0, 3, option(0, 3, 0)),
            block("b4", 0.0, 0, option(0, 1, 1)),
        ),
        boundaries=tuple(
            Boundary(tuple(map(StorageId, storages)), 0) for storages in ((0,), (1,), (1, 2), (3, 4), (3, 5), (6,))
        ),
    )


def _dear_beginning() -> Chain:
    """Return a chain whose first block takes 10 bytes to run, and whose last takes 10 in backward.

    Boundary 1 (4 bytes) beside the last backward is too much, and so is the first block's run beside a gradient.
    """
    chain = uniform_chain(3)
    first, middle, last = chain.blocks
    saved = replace(first.options[0], save_peak_bytes=10)
    blocks = (
        replace(first, forward_peak_bytes=10, options=(saved,)),
        middle,
        replace(last, options=(replace(last.options[0], backward_peak_bytes=10),)),
    )
    boundaries = (*chain.boundaries[:2], replace(chain.boundaries[2], gradient_bytes=4), chain.boundaries[3])
    return replace(chain, storage_bytes=(0, 4, 1, 1), blocks=blocks, boundaries=boundaries)
