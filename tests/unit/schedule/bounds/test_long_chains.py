"""Long chains: their coarse chains, and what the bounds of these are worth."""

import random
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.chains import load_chain
from benchmarks.chains.shapes import repeated
from tests.unit.schedule.chains_by_hand import random_chain
from tests.unit.schedule.milp import checkmate
from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId, verify_chain
from tinybp_lightning.schedule import Planner, certify, keep_all, simulate
from tinybp_lightning.schedule.bounds import certificate
from tinybp_lightning.schedule.bounds.certificate import fastest_possible_s
from tinybp_lightning.schedule.bounds.dp_bound import dp_bound_s
from tinybp_lightning.schedule.bounds.live_sets import Resolution
from tinybp_lightning.schedule.bounds.relaxation import coarsen, relax

_ROUNDING = 1 + 1e-6


def _llama(num_layers: int) -> Chain:
    return repeated(load_chain("llama_8"), first_block=15, layer_blocks=7, num_copies=num_layers - 8)


def _with_norms(rng: random.Random, num_blocks: int) -> Chain:
    """A random chain, a hundred times larger, with blocks put in that only add a byte to what they read."""
    chain = random_chain(rng, num_blocks)
    sizes = [100 * size for size in chain.storage_bytes]
    blocks, boundaries = list[Block](), [chain.boundaries[0]]
    for block, after in zip(chain.blocks, chain.boundaries[1:], strict=True):
        options = tuple(_larger(option) for option in block.options)
        gradient_bytes = 100 * block.parameter_gradient_bytes
        peak_bytes = 100 * block.forward_peak_bytes
        blocks.append(
            replace(block, forward_peak_bytes=peak_bytes, parameter_gradient_bytes=gradient_bytes, options=options)
        )
        boundaries.append(Boundary(after.storages, 100 * after.gradient_bytes))
        if block is chain.blocks[-1] or rng.random() < 0.4 or not any(sizes[s] for s in after.storages):
            continue
        sizes.append(1)
        statistics = StorageId(len(sizes) - 1)
        storages = (*(s for s in after.storages if sizes[s]), statistics)
        times = float(rng.randint(0, 2)), 1, float(rng.randint(1, 3)), 100 * rng.randint(0, 3)
        norm = SavedSet("all", storages, 0, 2, *times)
        blocks.append(Block("norm", "norm", times[0] + rng.randint(0, 2), 2, 0, (norm,)))
        boundaries.append(Boundary((*after.storages, statistics), 100 * rng.randint(0, 2)))
    return replace(
        chain,
        storage_bytes=tuple(sizes),
        blocks=tuple(blocks),
        boundaries=tuple(boundaries),
        tail_peak_bytes=100 * chain.tail_peak_bytes,
        tail_live_bytes=100 * chain.tail_live_bytes,
        unmodelled_bytes=100 * chain.unmodelled_bytes,
    )


@cache
def _optima(seed: int) -> tuple[tuple[int, float], ...]:
    """Three budgets of a chain with norms, and the seconds of the best schedule for each."""
    chain = _with_norms(random.Random(seed), 4)
    planner, found = Planner(chain), list[tuple[int, float]]()
    for part in range(3):
        budget_bytes = planner.smallest_bytes + (planner.largest_bytes - planner.smallest_bytes) * part // 4
        solution = checkmate(chain, budget_bytes=budget_bytes)
        assert solution is not None
        found.append((budget_bytes, solution.total_s))
    return tuple(found)


def _larger(option: SavedSet) -> SavedSet:
    return replace(
        option,
        saved_bytes=100 * option.saved_bytes,
        save_peak_bytes=100 * option.save_peak_bytes,
        replay_peak_bytes=100 * option.replay_peak_bytes,
        backward_peak_bytes=100 * option.backward_peak_bytes,
    )


def test_the_coarse_chain_of_a_llama_leaves_out_two_norms_of_each_layer() -> None:
    chain = _llama(11)
    assert len(coarsen(chain).blocks) == len(chain.blocks) - 2 * 11


@pytest.mark.parametrize("seed", range(40))
def test_bound_of_the_coarse_chain_is_under_the_integer_program(seed: int) -> None:
    chain = _with_norms(random.Random(seed), 4)
    verify_chain(chain)
    coarse = coarsen(chain)
    verify_chain(coarse)
    for budget_bytes, best_s in _optima(seed):
        bound_s = dp_bound_s(relax(coarse, budget_bytes=budget_bytes), Resolution(300, 64), limit_s=best_s)
        assert bound_s <= best_s * _ROUNDING


def test_coarse_chains_of_the_test_above_are_shorter() -> None:
    shorter = [len(coarsen(c).blocks) < len(c.blocks) for c in (_with_norms(random.Random(s), 4) for s in range(40))]
    assert sum(shorter) > 25


def test_prices_of_the_coarse_chain_bound_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a chain of hundreds of blocks; of these few the optimum is known."""
    monkeypatch.setattr(certificate, "_COARSE_BLOCKS", 1)
    num_tight = 0
    for seed in range(40):
        chain = _with_norms(random.Random(seed), 4)
        planner = Planner(chain)
        for budget_bytes, best_s in _optima(seed):
            found = certify(chain, planner.plan(budget_bytes=budget_bytes), planner=planner)
            assert found.lagrangian_bound_s <= best_s * _ROUNDING
            assert len(found.prices) == len(coarsen(chain).blocks) + 2
            num_tight += found.lagrangian_bound_s > fastest_possible_s(chain) * (1 + 1e-6)
    assert num_tight > 10


def test_coarse_chain_bounds_a_real_network_as_well_as_the_chain_itself() -> None:
    chain = load_chain("llama_8")
    budget_bytes = Planner(chain).smallest_bytes
    limit_s = 4 * sum(block.forward_s + block.options[0].backward_s for block in chain.blocks)
    bounds = [
        dp_bound_s(relax(c, budget_bytes=budget_bytes), Resolution(60, 8), limit_s=limit_s)
        for c in (chain, coarsen(chain))
    ]
    assert bounds[1] > 0.99 * bounds[0]


def test_the_smallest_budget_of_a_long_llama_is_near_that_of_a_short_one() -> None:
    planner = Planner(_llama(32))
    # On a chain this long plans store at narrow boundaries only, and need 17 % more.
    assert planner.smallest_bytes <= 1.18 * Planner(load_chain("llama_8")).smallest_bytes
    assert planner.smallest_plan().peak_bytes == planner.smallest_bytes


def test_gap_of_a_long_llama() -> None:
    chain = _llama(32)
    planner = Planner(chain)
    found = planner.plan(budget_bytes=simulate(chain, keep_all(chain)).peak_bytes // 5)
    assert found.recompute_s > 0
    assert certify(chain, found, planner=planner).gap <= 0.02


@pytest.mark.slow
def test_plans_of_eighty_llama_layers() -> None:
    chain = _llama(80)
    planner = Planner(chain)
    plain_bytes = simulate(chain, keep_all(chain)).peak_bytes
    assert planner.smallest_bytes < 0.0127 * plain_bytes
    found = planner.plan(budget_bytes=plain_bytes // 5)
    assert certify(chain, found, planner=planner).gap <= 0.03
    times = [planner.plan(budget_bytes=planner.smallest_bytes * k // 100).total_s for k in (100, 105, 118, 150, 220)]
    assert times == sorted(times, reverse=True)
