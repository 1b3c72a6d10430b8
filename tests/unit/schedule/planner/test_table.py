"""Equal layers share rows, unlike ones do not, and sharing changes no plan."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.schedule.chains_by_hand import random_chain, transformer_chain, uniform_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule.planner import table
from tinybp_lightning.schedule.planner.states import StateModel, storable_boundaries
from tinybp_lightning.schedule.planner.table import RowIndex, Table, fitting_unit_bytes, share_rows


def _model(chain: Chain) -> StateModel:
    return StateModel(chain, cuts=tuple(range(1, len(chain.blocks))))


def _unshared(model: StateModel) -> RowIndex:
    """Every segment its own row."""
    counts = [
        len(model.cuts) - model.first_cut(state.boundary) if state.boundary < model.num_blocks else 0
        for state in model.states
    ]
    own = tuple(tuple(range(count)) for count in counts)
    return RowIndex(np.arange(model.num_segments), own, model.num_segments, 0)


def _num_segments(model: StateModel) -> int:
    return model.num_segments


def test_rows_of_equal_blocks_grow_with_length_not_with_its_square() -> None:
    few, many = (share_rows(_model(uniform_chain(n))).num_rows for n in (20, 40))
    assert few < 3 * 20
    assert many < 3 * 40


def test_equal_layers_share_and_unlike_ones_do_not() -> None:
    equal, unlike = _model(transformer_chain(12)), _model(random_chain(random.Random(3), 30))
    assert share_rows(equal).num_rows < _num_segments(equal) / 4
    assert share_rows(unlike).num_rows > _num_segments(unlike) * 0.6


def test_one_unlike_block_in_the_middle_is_seen() -> None:
    chain = uniform_chain(30)
    blocks = list(chain.blocks)
    blocks[15] = replace(blocks[15], forward_s=1.5)
    marked = share_rows(_model(replace(chain, blocks=tuple(blocks)))).num_rows
    assert marked > 3 * share_rows(_model(chain)).num_rows


@pytest.mark.parametrize(
    "chain", [uniform_chain(14), transformer_chain(4), random_chain(random.Random(8), 16)], ids=["u", "t", "r"]
)
@pytest.mark.parametrize("many_rows", [0, 1000], ids=["by split", "by row"])
def test_tables_are_the_same_however_they_are_filled(
    chain: Chain, many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(chain)
    unit_bytes = max(1, sum(chain.storage_bytes) // 400)
    shared = Table(model, share_rows(model), unit_bytes=unit_bytes, num_units=300)
    monkeypatch.setattr(table, "_MANY_ROWS", many_rows)
    plain = Table(model, _unshared(model), unit_bytes=unit_bytes, num_units=300)
    assert np.array_equal(shared.seconds, plain.seconds)
    units = int(np.flatnonzero(np.isfinite(plain.seconds))[0]) + 5
    assert shared.schedule(units) == plain.schedule(units)


def test_a_unit_divides_the_sizes_in_the_chain_where_one_does() -> None:
    model = _model(transformer_chain(3))
    unit_bytes = fitting_unit_bytes(model, wanted_bytes=60_000)
    assert 60_000 <= unit_bytes <= 75_000
    errors = [keep.kept_bytes / unit_bytes for state in model.states for keep in state.keeps]
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
