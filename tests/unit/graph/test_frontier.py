"""The frontier profile against its definition, read literally, and on graphs whose widths are known."""

import time

import pytest
from hypothesis import given

from tests.unit.graph.graphs_by_hand import GraphBuilder, chain_graph, transformer_graph, unet_graph
from tests.unit.graph.strategies_graph import graphs
from tinybp_lightning.graph import CutObstacle, Graph, StorageId, StorageKind, frontier_profile, verify_graph


def made_at(graph: Graph, storage: StorageId) -> int:
    of = {value.id for value in graph.values if value.storage == storage}
    if of & set(graph.inputs):
        return -1
    return min((node.id for node in graph.nodes if of & set(node.makes)), default=len(graph.nodes))


def is_needed_after(graph: Graph, storage: StorageId, position: int) -> bool:
    of = {value.id for value in graph.values if value.storage == storage}
    later = graph.nodes[position + 1 :]
    return bool(of & set(graph.outputs)) or any(of & set(node.reads) or storage in node.writes for node in later)


def frontier_by_definition(graph: Graph, position: int) -> tuple[StorageId, ...]:
    return tuple(
        storage.id
        for storage in graph.storages
        if storage.kind is StorageKind.ACTIVATION
        and made_at(graph, storage.id) <= position
        and is_needed_after(graph, storage.id, position)
    )


def values_by_definition(graph: Graph, position: int) -> tuple[int, ...]:
    made = {value for node in graph.nodes[: position + 1] for value in node.makes}
    needed = {value for node in graph.nodes[position + 1 :] for value in node.reads} | set(graph.outputs)
    return tuple(sorted(made & needed))


def is_allowed_by_definition(graph: Graph, position: int) -> bool:
    guarded = {s.id for s in graph.storages if s.kind in (StorageKind.ACTIVATION, StorageKind.INPUT)}
    written = {storage for node in graph.nodes[position + 1 :] for storage in node.writes}
    crossing = {graph.values[v].storage for v in values_by_definition(graph, position)}
    ever_written = {storage for node in graph.nodes for storage in node.writes}
    if None in crossing or crossing & ever_written - guarded:
        return False
    return not any(made_at(graph, s) <= position for s in written & guarded)


@given(graphs())
def test_profile_is_the_definition(graph: Graph) -> None:
    verify_graph(graph)
    profile = frontier_profile(graph)
    positions = range(len(graph.nodes))
    frontiers = [frontier_by_definition(graph, p) for p in positions]
    lives = list(enumerate(profile.storage_lives))
    assert [tuple(s for s, life in lives if life.crosses(p)) for p in positions] == frontiers
    assert list(profile.width_bytes) == [sum(graph.storages[s].size_bytes for s in f) for f in frontiers]
    crossing = [tuple(v for v, life in enumerate(profile.value_lives) if life.crosses(p)) for p in positions]
    assert crossing == [values_by_definition(graph, p) for p in positions]
    assert [profile.is_allowed(p) for p in positions] == [is_allowed_by_definition(graph, p) for p in positions]
    assert list(profile.is_new) == [f != g for f, g in zip(frontiers, [(), *frontiers], strict=False)]
    tensor_sizes = [0 if v.storage is None else v.shape[0] for v in graph.values]
    assert list(profile.num_elements) == [sum(tensor_sizes[v] for v in values) for values in crossing]


def test_a_view_costs_nothing_beside_its_base() -> None:
    build = GraphBuilder()
    x = build.op("op", [build.input(4)], 10)
    v = build.view("view", x, 10)
    profile = frontier_profile(build.build(build.op("op", [x, v], 3)))
    assert profile.width_bytes == (10, 10, 3)
    assert profile.num_elements == (10, 20, 3)


def test_a_view_keeps_its_base_alive() -> None:
    build = GraphBuilder()
    x = build.op("op", [build.input(4)], 10)
    v = build.view("slice", x, 1)
    y = build.op("op", [], 2)
    assert frontier_profile(build.build(build.op("op", [v, y], 3))).width_bytes == (10, 10, 12, 3)


def test_an_output_crosses_to_the_end() -> None:
    build = GraphBuilder()
    x = build.op("op", [build.input(4)], 10)
    y = build.op("op", [build.input(4)], 5)
    z = build.op("op", [y], 1)
    assert frontier_profile(build.build(x, z)).width_bytes == (10, 15, 11)


def test_widths_of_a_unet_rise_to_the_middle() -> None:
    assert frontier_profile(unet_graph(2, size=16)).width_bytes == (16, 24, 24, 28, 28, 32, 24, 32, 16)


@pytest.mark.parametrize("kind", [StorageKind.ACTIVATION, StorageKind.INPUT])
def test_no_cut_between_a_value_and_a_later_write_of_it(kind: StorageKind) -> None:
    build = GraphBuilder()
    x = build.input(4)
    a = build.op("op", [x], 4)
    target = {StorageKind.ACTIVATION: a, StorageKind.INPUT: x}[kind]
    b = build.op("op", [a], 4)
    build.write("add_", target, [b])
    profile = frontier_profile(build.build(build.op("op", [b, target], 4)))
    assert profile.obstacles == (CutObstacle.LATER_WRITE, CutObstacle.LATER_WRITE, None, None)


def test_a_write_of_a_buffer_forbids_no_cut() -> None:
    build = GraphBuilder()
    running_mean = build.input(4, StorageKind.BUFFER)
    a = build.op("op", [build.input(4)], 4)
    build.write("lerp_", running_mean, [a])
    assert frontier_profile(build.build(build.op("op", [a], 4))).obstacles == (None, None, None)


def test_no_cut_under_a_value_on_a_buffer_that_is_written() -> None:
    build = GraphBuilder()
    power = build.input(4, StorageKind.BUFFER)
    a = build.op("op", [build.input(4)], 4)
    normalized = build.write("normalize_", power, [a])
    b = build.op("op", [a], 4)
    c = build.op("clone", [normalized, b], 4)
    build.write("normalize_", power, [c])
    profile = frontier_profile(build.build(build.op("op", [c], 4)))
    later = CutObstacle.LATER_WRITE
    assert profile.obstacles == (None, later, later, None, None, None)


def test_no_cut_under_a_value_that_is_no_tensor() -> None:
    build = GraphBuilder()
    a = build.op("op", [build.input(4)], 4)
    flag = build.flag("enter_autocast")
    b = build.op("op", [a], 4)
    build.flag("exit_autocast", [flag])
    profile = frontier_profile(build.build(build.op("op", [b], 4)))
    assert profile.obstacles == (None, CutObstacle.NOT_A_TENSOR, CutObstacle.NOT_A_TENSOR, None, None)


def test_an_input_that_is_no_tensor_crosses_nothing() -> None:
    build = GraphBuilder()
    num_heads = build.flag_input()
    a = build.op("op", [build.input(4), num_heads], 4)
    assert frontier_profile(build.build(build.op("op", [a, num_heads], 4))).obstacles == (None, None)


def test_time_is_about_linear() -> None:
    """Ten times the graph takes far less than the hundred times that a quadratic pass would."""
    transformer_seconds = [_profile_seconds(transformer_graph(layers)) for layers in (150, 1500)]
    assert transformer_seconds[1] < 40 * transformer_seconds[0]


def _profile_seconds(graph: Graph) -> float:
    def once() -> float:
        began = time.process_time()
        frontier_profile(graph)
        return time.process_time() - began

    return min(once() for _ in range(3))


def test_a_chain_is_one_tensor_wide() -> None:
    assert frontier_profile(chain_graph(4, size=7)).width_bytes == (7, 7, 7, 7)
