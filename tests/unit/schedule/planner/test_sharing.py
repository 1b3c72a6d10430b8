"""Equal layers share rows, unlike ones do not, and sharing changes no plan."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.schedule.chains_by_hand import random_chain, transformer_chain, uniform_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule.planner import rows
from tinybp_lightning.schedule.planner.grid import slot_bytes, storable_boundaries
from tinybp_lightning.schedule.planner.sharing import Sharing, share_segments
from tinybp_lightning.schedule.planner.states import Tables
from tinybp_lightning.schedule.planner.tree import IntervalTree


def _tables(chain: Chain) -> Tables:
    return Tables(chain, cuts=tuple(range(1, len(chain.blocks))))


def _unshared(tables: Tables) -> Sharing:
    """Every segment its own row."""
    ranges, first = list[np.ndarray](), 0
    for state in tables.states:
        count = len(tables.cuts) - tables.first_cut(state.boundary) if state.boundary < tables.num_blocks else 0
        ranges.append(np.arange(first, first + count))
        first += count
    return Sharing(tuple(ranges), tuple(tuple(range(len(r))) for r in ranges), first, 0)


def _num_segments(tables: Tables) -> int:
    return _unshared(tables).num_rows


def test_rows_of_equal_blocks_grow_with_length_not_with_its_square() -> None:
    few, many = (share_segments(_tables(uniform_chain(n))).num_rows for n in (20, 40))
    assert few < 3 * 20
    assert many < 3 * 40


def test_equal_layers_share_and_unlike_ones_do_not() -> None:
    equal, unlike = _tables(transformer_chain(12)), _tables(random_chain(random.Random(3), 30))
    assert share_segments(equal).num_rows < _num_segments(equal) / 4
    assert share_segments(unlike).num_rows > _num_segments(unlike) * 0.6


def test_one_unlike_block_in_the_middle_is_seen() -> None:
    chain = uniform_chain(30)
    blocks = list(chain.blocks)
    blocks[15] = replace(blocks[15], forward_s=1.5)
    marked = share_segments(_tables(replace(chain, blocks=tuple(blocks)))).num_rows
    assert marked > 3 * share_segments(_tables(chain)).num_rows


@pytest.mark.parametrize(
    "chain", [uniform_chain(14), transformer_chain(4), random_chain(random.Random(8), 16)], ids=["u", "t", "r"]
)
@pytest.mark.parametrize("many_rows", [0, 1000], ids=["by split", "by row"])
def test_tables_are_the_same_however_they_are_filled(
    chain: Chain, many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = _tables(chain)
    unit_bytes = max(1, sum(chain.storage_bytes) // 400)
    shared = IntervalTree(tables, share_segments(tables), unit_bytes=unit_bytes, num_slots=300)
    monkeypatch.setattr(rows, "_MANY_ROWS", many_rows)
    plain = IntervalTree(tables, _unshared(tables), unit_bytes=unit_bytes, num_slots=300)
    assert np.array_equal(shared.seconds, plain.seconds)
    slots = int(np.flatnonzero(np.isfinite(plain.seconds))[0]) + 5
    assert shared.schedule(slots) == plain.schedule(slots)


def test_slot_size_divides_the_sizes_in_the_chain_where_one_does() -> None:
    tables = _tables(transformer_chain(3))
    unit_bytes = slot_bytes(tables, wanted_bytes=60_000)
    assert 60_000 <= unit_bytes <= 75_000
    errors = [keep.held_bytes / unit_bytes for state in tables.states for keep in state.keeps]
    assert np.abs(np.array(errors) - np.rint(errors)).mean() < 0.02


@pytest.mark.parametrize(("limit", "cuts"), [(99, 17), (8, 8), (4, 4)])
def test_boundaries_to_store_are_the_narrow_ones(limit: int, cuts: int) -> None:
    chain = transformer_chain(4)
    size = [sum(chain.storage_bytes[s] for s in boundary.storages) for boundary in chain.boundaries]
    found = storable_boundaries(chain, limit=limit)
    assert len(found) <= cuts
    assert all(size[i] == min(size[1:-1]) for i in found) or limit == 99


def test_where_all_boundaries_are_alike_every_kth_is_taken() -> None:
    assert storable_boundaries(uniform_chain(41), limit=20) == tuple(range(1, 41, 2))
