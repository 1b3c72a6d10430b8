"""Gaps on chains of real networks, and bounds under the optimum on many small ones: what the certificate is worth."""

import random
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.chains import chain_from_json, chain_names, chain_to_json, load_chain
from benchmarks.chains.shapes import repeated
from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import random_chain, uniform_chain, with_heavy_skips
from tests.unit.schedule.milp import checkmate
from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId, verify_chain
from tinybp_lightning.schedule import Planner, certify, keep_all, simulate
from tinybp_lightning.schedule.bounds.certificate import fastest_possible_s
from tinybp_lightning.schedule.bounds.dp_bound import dp_bound_s
from tinybp_lightning.schedule.bounds.live_sets import Resolution, affordable
from tinybp_lightning.schedule.bounds.relaxation import relax

_ROUNDING = 1 + 1e-6


@cache
def _planner(name: str) -> tuple[Planner, int]:
    """A planner whose tables the tests share, and the plain peak of its chain."""
    chain = load_chain(name)
    return Planner(chain), simulate(chain, keep_all(chain)).peak_bytes


@pytest.mark.parametrize("name", chain_names())
def test_kept_chains_read_back_as_written(name: str) -> None:
    chain = load_chain(name)
    assert chain_from_json(chain_to_json(chain, made_by="a test")) == chain


@pytest.mark.parametrize(
    ("name", "percent", "most"),
    [
        ("llama_8", 15, 0.01),
        ("llama_8", 11, 0.01),
        ("gpt2_48", 15, 0.01),
        ("gpt2_48", 0, 0.01),
        ("resnet_152", 50, 0.01),
        ("resnet_152", 0, 0.01),
        ("unet_small", 70, 0.01),
        ("unet_small", 50, 0.01),
        ("unet_small", 33, 0.02),
    ],
)
def test_gap_of_real_networks(name: str, percent: int, most: float) -> None:
    planner, plain_bytes = _planner(name)
    found = planner.plan(budget_bytes=max(planner.smallest_bytes, plain_bytes * percent // 100))
    assert found.recompute_s > 0
    assert certify(planner.chain, found, planner=planner).gap <= most


@pytest.mark.parametrize(
    ("name", "best_known", "most"),
    [("llama_8", 2.2121, 0.01), ("unet_small", 1.4705, 0.03), ("resnet_152", 1.5499, 0.01)],
)
def test_bound_at_the_smallest_budget_is_near_the_best_known(name: str, best_known: float, most: float) -> None:
    """`best_known`: the step of a schedule with non-persistent checkpoints, in plain steps."""
    planner, _ = _planner(name)
    certificate = certify(planner.chain, planner.smallest_plan(), planner=planner)
    bound = certificate.lower_bound_s / fastest_possible_s(planner.chain)
    assert best_known / (1 + most) <= bound <= best_known * 1.0001


@pytest.mark.parametrize("seed", range(1000, 1040))
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_dp_bound_is_under_brute_force(seed: int, num_blocks: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks, max_options=3)
    planner = Planner(chain)
    for budget_bytes in {planner.smallest_bytes, (planner.smallest_bytes + planner.largest_bytes) // 2}:
        relaxed, best = relax(chain, budget_bytes=budget_bytes), fastest(chain, budget_bytes)
        assert best is not None
        for resolution in (Resolution(3, 2), Resolution(50, 3), Resolution(400, 64)):
            assert dp_bound_s(relaxed, resolution, limit_s=best[0]) <= best[0] * _ROUNDING


@pytest.mark.parametrize("seed", range(40))
def test_dp_bound_is_under_the_integer_program(seed: int) -> None:
    chain = random_chain(random.Random(seed), 6)
    planner = Planner(chain)
    budget_bytes = planner.smallest_bytes + (planner.largest_bytes - planner.smallest_bytes) * (seed % 3) // 4
    solution = checkmate(chain, budget_bytes=budget_bytes)
    assert solution is not None
    relaxed = relax(chain, budget_bytes=budget_bytes)
    assert dp_bound_s(relaxed, Resolution(400, 64), limit_s=solution.total_s) <= solution.total_s * _ROUNDING


@pytest.mark.parametrize("seed", range(40))
def test_dp_bound_is_under_the_integer_program_with_heavy_skips(seed: int) -> None:
    """Where boundaries are heavy and saved sets light, it pays to turn one into the other before it is due."""
    rng = random.Random(seed)
    chain = with_heavy_skips(random_chain(rng, 5), rng)
    verify_chain(chain)
    planner = Planner(chain)
    for part in range(3):
        budget_bytes = planner.smallest_bytes + (planner.largest_bytes - planner.smallest_bytes) * part // 4
        solution = checkmate(chain, budget_bytes=budget_bytes)
        assert solution is not None
        relaxed = relax(chain, budget_bytes=budget_bytes)
        for resolution in (Resolution(400, 64), Resolution(60, 3)):
            assert dp_bound_s(relaxed, resolution, limit_s=solution.total_s) <= solution.total_s * _ROUNDING


def test_bound_knows_that_a_boundary_may_be_replaced_before_it_is_due() -> None:
    """Boundary 1 holds a skip beside what block 1 needs, and the skip is in the way of block 2's backward.

    The best schedule turns boundary 1 into block 1's saved set as soon as block 3, which reads the skip, is done.
    """
    chain = _skip_in_the_way()
    verify_chain(chain)
    best = fastest(chain, 13)
    assert best is not None
    assert best[1] == "K0 S1 F1 K2 S3 F3 K3 B3 D3 K1 D1 B2 B1 B0"
    bound_s = dp_bound_s(relax(chain, budget_bytes=13), Resolution(500, 64), limit_s=best[0])
    assert 0.9 * best[0] <= bound_s <= best[0]


def test_gap_of_eighty_layers_at_the_smallest_budget() -> None:
    chain = repeated(load_chain("gpt2_8"), first_block=5, layer_blocks=2, num_copies=72)
    planner = Planner(chain)
    found = planner.plan(budget_bytes=planner.smallest_bytes)
    assert found.total_s > 30 * (found.total_s - found.recompute_s)
    assert certify(chain, found, planner=planner).gap <= 0.01


def test_dp_bound_counts_a_storage_of_several_boundaries() -> None:
    planner, _ = _planner("llama_8")
    relaxed = relax(load_chain("llama_8"), budget_bytes=planner.smallest_bytes)
    limit_s = 10 * fastest_possible_s(relaxed.chain)
    together = dp_bound_s(relaxed, Resolution(60, 1), limit_s=limit_s)
    assert dp_bound_s(relaxed, Resolution(60, 8), limit_s=limit_s) > together * 1.5


def test_no_slots_are_affordable_for_a_very_long_chain() -> None:
    assert affordable(relax(uniform_chain(600), budget_bytes=30)) is None
    found = affordable(relax(uniform_chain(20), budget_bytes=30))
    assert found is not None
    assert found.num_slots == 600


def test_repeated_layers_give_the_longer_chain() -> None:
    longer = repeated(load_chain("llama_8"), first_block=15, layer_blocks=7, num_copies=8)
    captured = load_chain("llama_16")
    assert [b.signature for b in longer.blocks] == [b.signature for b in captured.blocks]
    assert longer.storage_bytes != load_chain("llama_8").storage_bytes
    assert sorted(longer.storage_bytes) == sorted(captured.storage_bytes)


def _skip_in_the_way() -> Chain:
    """Storage 1 (6 bytes) is made by block 0 and read last by block 3; block 2's backward takes 8 bytes."""

    def block(name: str, forward_s: float, made: int, storages: tuple[int, ...], saved: int, backward: int) -> Block:
        option = SavedSet("all", tuple(map(StorageId, storages)), saved, saved + made, forward_s, saved, 1.0, backward)
        return Block(name, "s", forward_s, made, 0, (option,))

    return Chain(
        storage_bytes=(0, 6, 1, 1, 1, 1),
        blocks=(
            block("b0", 10.0, 7, (0,), 0, 0),
            block("b1", 1.0, 1, (), 3, 0),
            block("b2", 5.0, 1, (), 1, 8),
            block("b3", 1.0, 1, (1,), 4, 0),
        ),
        boundaries=tuple(Boundary(tuple(map(StorageId, s)), 0) for s in ((0,), (1, 2), (1, 3), (1, 4), (5,))),
    )


@pytest.mark.parametrize("num_blocks", [16, 24])
def test_a_boundary_as_heavy_as_all_that_is_left_is_no_boundary_to_hold(num_blocks: int) -> None:
    """What every backward needs beside leaves less to plan with than it weighs."""
    chain = uniform_chain(num_blocks, saved_bytes=2)
    sizes = [1000 if s == 2 else size for s, size in enumerate(chain.storage_bytes)]
    blocks = [
        replace(b, options=(replace(b.options[0], storages=()),)) if k == 2 else b for k, b in enumerate(chain.blocks)
    ]
    chain = replace(chain, storage_bytes=tuple(sizes), blocks=tuple(blocks), tail_live_bytes=1000, tail_peak_bytes=1000)
    planner = Planner(chain)
    for more_bytes in (0, 2, 4, 8, 12):
        found = planner.plan(budget_bytes=planner.smallest_bytes + more_bytes)
        certificate = certify(chain, found, planner=planner)
        assert max(certificate.lagrangian_bound_s, certificate.dp_bound_s) <= found.total_s * _ROUNDING
