"""Gaps on chains of real networks, and bounds under the optimum on many small ones: what the certificate is worth."""

import random
from functools import cache

import pytest

from benchmarks.chains import chain_from_json, chain_names, chain_to_json, load_chain
from benchmarks.chains.shapes import repeated
from tests.unit.schedule.brute_force import fastest
from tests.unit.schedule.chains_by_hand import random_chain, transformer_chain, uniform_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import Planner, keep_all, simulate
from tinybp_lightning.schedule.capped import Resolution, affordable, capped_bound_s
from tinybp_lightning.schedule.certificate import fastest_possible_s
from tinybp_lightning.schedule.helped import HelperTree
from tinybp_lightning.schedule.milp import checkmate
from tinybp_lightning.schedule.relaxed import relax
from tinybp_lightning.schedule.tables import Tables

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
        ("llama_8", 0, 0.01),
        ("gpt2_48", 15, 0.03),
        ("gpt2_48", 0, 0.01),
        ("resnet_152", 50, 0.01),
        ("resnet_152", 0, 0.01),
        ("unet_small", 70, 0.02),
        ("unet_small", 50, 0.02),
    ],
)
def test_gap_of_real_networks(name: str, percent: int, most: float) -> None:
    planner, plain_bytes = _planner(name)
    found = planner.plan(budget_bytes=max(planner.smallest_bytes, plain_bytes * percent // 100))
    assert found.recompute_s > 0
    assert found.gap <= most


@pytest.mark.parametrize("seed", range(1000, 1100))
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_capped_bound_is_under_brute_force(seed: int, num_blocks: int) -> None:
    chain = random_chain(random.Random(seed), num_blocks, max_options=3)
    planner = Planner(chain)
    for budget_bytes in {planner.smallest_bytes, (planner.smallest_bytes + planner.largest_bytes) // 2}:
        relaxed, best = relax(chain, budget_bytes=budget_bytes), fastest(chain, budget_bytes)
        assert best is not None
        for resolution in (Resolution(3, 2), Resolution(50, 3), Resolution(400, 64)):
            assert capped_bound_s(relaxed, resolution, limit_s=best[0]) <= best[0] * _ROUNDING


@pytest.mark.parametrize("seed", range(40))
def test_capped_bound_is_under_the_integer_program(seed: int) -> None:
    chain = random_chain(random.Random(seed), 6)
    planner = Planner(chain)
    budget_bytes = planner.smallest_bytes + (planner.largest_bytes - planner.smallest_bytes) * (seed % 3) // 4
    solution = checkmate(chain, budget_bytes=budget_bytes)
    assert solution is not None
    relaxed = relax(chain, budget_bytes=budget_bytes)
    assert capped_bound_s(relaxed, Resolution(400, 64), limit_s=solution.total_s) <= solution.total_s * _ROUNDING


def test_capped_bound_counts_a_storage_of_several_boundaries() -> None:
    planner, _ = _planner("llama_8")
    relaxed = relax(load_chain("llama_8"), budget_bytes=planner.smallest_bytes)
    limit_s = 10 * fastest_possible_s(relaxed.chain)
    together = capped_bound_s(relaxed, Resolution(60, 1), limit_s=limit_s)
    assert capped_bound_s(relaxed, Resolution(60, 8), limit_s=limit_s) > together * 1.5


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


@pytest.mark.parametrize("seed", range(30))
def test_helpers_by_arrays_are_as_fast_as_brute_force(seed: int) -> None:
    chain = random_chain(random.Random(seed), 4)
    budget_bytes = Planner(chain).smallest_bytes
    best = fastest(chain, budget_bytes)
    assert best is not None
    tables = Tables(chain, cuts=(1, 2, 3), passing=True)
    tree = HelperTree(tables, unit_bytes=1, num_slots=budget_bytes - chain.workspace_bytes)
    timeline = simulate(chain, tree.schedule(tree.num_slots))
    assert timeline.peak_bytes <= budget_bytes
    assert timeline.total_s == pytest.approx(tree.seconds[-1])
    assert timeline.total_s == best[0]


def test_helpers_make_a_tight_plan_faster() -> None:
    planner, _ = _planner("llama_8")
    found = planner.plan(budget_bytes=planner.smallest_bytes)
    # What interval trees alone reach at this budget: `x2.2646` of plain training.
    assert found.total_s < 2.25 * (found.total_s - found.recompute_s)


@pytest.mark.parametrize("chain", [load_chain("unet_small"), transformer_chain(4)], ids=["unet", "t4"])
def test_time_never_rises_with_the_budget_where_helpers_are(chain: Chain) -> None:
    planner = Planner(chain)
    low, high = planner.smallest_bytes, planner.largest_bytes
    times = [planner.plan(budget_bytes=low + (high - low) * k // 4).total_s for k in range(5)]
    assert times == sorted(times, reverse=True)
    again = Planner(chain).plan(budget_bytes=low + (high - low) * 2 // 4)
    assert again.total_s == times[2]
