"""What the diagnosis says of graphs whose shape is known."""

import pytest
from hypothesis import given

from tests.unit.graph.graphs_by_hand import GraphBuilder, chain_graph, transformer_graph, unet_graph
from tests.unit.graph.strategies_graph import graphs
from tinybp_lightning.analysis import SKINNY_RATIO, diagnose, widest_op
from tinybp_lightning.graph import Graph, StorageKind


@given(graphs())
def test_ratio_and_totals_agree(graph: Graph) -> None:
    diagnosis = diagnose(graph)
    assert 0 <= diagnosis.frontier_ratio <= 1
    assert diagnosis.saved_bytes <= diagnosis.total_bytes
    assert diagnosis.total_bytes == sum(s.size_bytes for s in graph.storages if s.kind is StorageKind.ACTIVATION)
    assert diagnosis.widest is not None
    assert diagnosis.widest_cut_bytes <= diagnosis.widest.width_bytes


def test_a_long_chain_is_skinny() -> None:
    diagnosis = diagnose(chain_graph(100, size=7))
    assert diagnosis.is_skinny
    assert diagnosis.frontier_ratio == pytest.approx(0.01)
    assert diagnosis.saved_bytes == diagnosis.total_bytes == 700
    assert diagnosis.num_narrow_cuts == 49
    assert diagnosis.widest_cut_bytes == 7
    assert diagnosis.long_skips == ()


@pytest.mark.parametrize(("num_ops", "is_skinny"), [(3, False), (4, True), (5, True)])
def test_four_equal_steps_are_the_shortest_skinny_chain(num_ops: int, is_skinny: bool) -> None:
    assert diagnose(chain_graph(num_ops)).is_skinny is is_skinny
    assert pytest.approx(1 / 4) == SKINNY_RATIO


def test_a_fan_is_not_skinny() -> None:
    """Everything is made first and read last: no plan can drop anything."""
    build = GraphBuilder()
    x = build.input(4)
    parts = [build.op("op", [x], 10, save_output=True) for _ in range(20)]
    diagnosis = diagnose(build.build(build.op("cat", parts, 10)))
    assert not diagnosis.is_skinny
    assert diagnosis.frontier_ratio == pytest.approx(200 / 210)


def test_the_widest_point_of_a_transformer_is_in_its_mlp() -> None:
    diagnosis = diagnose(transformer_graph(8))
    assert diagnosis.is_skinny
    assert diagnosis.widest is not None
    widest = diagnosis.widest
    assert (widest.op, widest.module, widest.width_bytes) == ("linear_silu", "model.layers.0.mlp", 5008)
    assert diagnosis.num_layer_cuts == 9
    assert diagnosis.num_narrow_cuts == 17


def test_the_rotary_table_is_the_only_long_skip_of_a_transformer() -> None:
    (table,) = diagnose(transformer_graph(8)).long_skips
    assert (table.op, table.module, table.size_bytes, table.made_by) == ("rotary", "model.rotary_emb", 8, 0)
    assert table.num_cuts == 8


def test_long_skips_are_sorted_by_bytes() -> None:
    build = GraphBuilder()
    x = build.op("op", [build.input(4)], 100)
    tables = [build.op("table", [], size) for size in (3, 9, 6)]
    for _ in range(12):
        x = build.op("op", [build.op("wide", [x, *tables], 300)], 100)
    assert [skip.size_bytes for skip in diagnose(build.build(x)).long_skips] == [9, 6, 3]


def test_an_uncut_unet_is_not_skinny() -> None:
    diagnosis = diagnose(unet_graph(3))
    assert not diagnosis.is_skinny
    assert diagnosis.widest is not None
    assert (diagnosis.widest.op, diagnosis.widest.width_bytes) == ("upsample", 8192)


def test_a_graph_without_ops() -> None:
    build = GraphBuilder()
    diagnosis = diagnose(build.build(build.input(3)))
    assert (diagnosis.widest, diagnosis.widest_op, diagnosis.frontier_ratio) == (None, None, 0.0)
    assert not diagnosis.is_skinny


def test_widest_op_counts_each_activation_once() -> None:
    build = GraphBuilder()
    a = build.op("op", [build.input(50)], 10)
    view = build.view("view", a, 10)
    mask = build.storage(3)
    b = build.op("dropout", [a, view, build.parameter(70)], 10, module="drop", saved=[mask, build.storage_of(a)])
    widest = widest_op(build.build(build.op("op", [b], 1)))
    assert widest is not None
    assert (widest.node, widest.op, widest.module, widest.working_set_bytes) == (2, "dropout", "drop", 10 + 10 + 3)


def test_widest_op_of_a_transformer_is_its_rotation() -> None:
    widest = widest_op(transformer_graph(3))
    assert widest is not None
    assert (widest.op, widest.module, widest.working_set_bytes) == ("rotate", "model.layers.0.self_attn", 6008)


def test_no_ops_no_widest_op() -> None:
    build = GraphBuilder()
    assert widest_op(build.build(build.input(3))) is None
