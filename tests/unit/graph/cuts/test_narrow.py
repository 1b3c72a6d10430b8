"""Cuts are legal on every graph, and where a reader would put them on graphs of known shape."""

import re
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.graph.graphs_by_hand import (
    LAYER_OPS,
    GraphBuilder,
    chain_graph,
    resnet_graph,
    transformer_graph,
    unet_graph,
)
from tests.unit.graph.strategies_graph import graphs
from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph import (
    FrontierProfile,
    Granularity,
    Graph,
    ValueId,
    choose_cuts,
    cut_blocks,
    frontier_profile,
)

GRANULARITIES = st.sampled_from(Granularity)
FINE, COARSE = Granularity.FINE, Granularity.COARSE


@given(graphs(max_nodes=24), GRANULARITIES)
def test_chosen_cuts_are_allowed_and_leave_two_ops(graph: Graph, granularity: Granularity) -> None:
    cuts = choose_cuts(graph, granularity=granularity)
    profile = frontier_profile(graph)
    assert all(profile.is_allowed(cut) for cut in cuts)
    assert all(after - before >= 2 for before, after in pairwise([-1, *cuts, len(graph.nodes) - 1]) if cuts)


def crossing(profile: FrontierProfile, position: int) -> tuple[ValueId, ...]:
    return tuple(ValueId(v) for v, life in enumerate(profile.value_lives) if life.crosses(position))


@given(graphs(max_nodes=24), st.data())
def test_blocks_pass_on_what_later_blocks_and_the_caller_need(graph: Graph, data: st.DataObject) -> None:
    profile = frontier_profile(graph)
    allowed = [p for p in range(len(graph.nodes) - 1) if profile.is_allowed(p)]
    cuts = sorted(data.draw(st.sets(st.sampled_from(allowed)))) if allowed else []
    blocks = cut_blocks(graph, cuts)
    assert [block.start for block in blocks] == [0, *(cut + 1 for cut in cuts)]
    assert [block.stop for block in blocks] == [*(cut + 1 for cut in cuts), len(graph.nodes)]
    assert blocks[0].inputs == ()
    assert [block.outputs for block in blocks] == [crossing(profile, block.stop - 1) for block in blocks]
    assert [block.inputs for block in blocks[1:]] == [block.outputs for block in blocks[:-1]]
    assert set(blocks[-1].outputs) == set(graph.outputs) - set(graph.inputs)
    for block in blocks:
        nodes = graph.nodes[block.start : block.stop]
        within = {value for node in nodes for value in node.makes}
        assert {value for node in nodes for value in node.reads} <= within | {*block.inputs, *block.external}
        assert set(block.external) <= set(graph.inputs)
        assert set(block.outputs) <= within | set(block.inputs)


def test_external_inputs_are_in_the_order_of_reading() -> None:
    build = GraphBuilder()
    x, w1, w2 = build.input(4), build.parameter(), build.parameter()
    a = build.op("op", [w2, x], 4)
    b = build.op("op", [a, w1, w2], 4)
    blocks = cut_blocks(build.build(build.op("op", [b, w1], 4)), [0])
    assert [block.external for block in blocks] == [(w2, x), (w1, w2)]


@pytest.mark.parametrize("cuts", [[-1], [3], [4], [1, 1], [2, 1]])
def test_bad_cuts_are_refused(cuts: list[int]) -> None:
    with pytest.raises(GraphError, match=re.escape(f"`cuts={tuple(cuts)}`: expected increasing, allowed")):
        cut_blocks(chain_graph(4), cuts)


def test_a_cut_across_a_later_write_is_refused() -> None:
    build = GraphBuilder()
    a = build.op("op", [build.input(4)], 4)
    with pytest.raises(GraphError, match=r"`cuts=\(0,\)`: expected increasing, allowed"):
        cut_blocks(build.build(build.write("relu_", a)), [0])


def test_a_graph_without_nodes_has_no_blocks() -> None:
    build = GraphBuilder()
    with pytest.raises(GraphError, match=r"`nodes=\(\)`"):
        cut_blocks(build.build(build.input(4)), [])


@pytest.mark.parametrize("granularity", Granularity)
def test_a_uniform_chain_is_cut_every_other_op(granularity: Granularity) -> None:
    """All its frontiers are equally wide but not the same one, so each is a place to cut."""
    assert choose_cuts(chain_graph(9), granularity=granularity) == (1, 3, 5)


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("num_ops", [0, 1, 2, 3])
def test_nothing_to_cut(num_ops: int, granularity: Granularity) -> None:
    assert choose_cuts(chain_graph(num_ops), granularity=granularity) == ()


def layer_ends(num_layers: int) -> list[int]:
    return [1 + LAYER_OPS * layer for layer in range(num_layers + 1)]


@pytest.mark.parametrize("num_layers", [2, 3, 12])
def test_coarse_is_one_block_a_layer(num_layers: int) -> None:
    """The stem, each layer, and the head; the rotary table that dies in the last layer does not hide its end."""
    graph = transformer_graph(num_layers)
    cuts = choose_cuts(graph, granularity=COARSE)
    assert list(cuts) == layer_ends(num_layers)
    blocks = cut_blocks(graph, cuts)
    assert [block.name.partition("[")[0] for block in blocks[1:-1]] == [f"model.layers.{i}" for i in range(num_layers)]


def test_coarse_ends_a_block_at_a_result_that_is_read_on() -> None:
    """Logits that are returned beside their loss: `lm_head` is not in one block with the loss."""
    plain = transformer_graph(3)
    (loss,) = plain.outputs
    logits = plain.nodes[-1].reads[0]
    graph = replace(plain, outputs=(loss, logits))
    head = next(node.id for node in graph.nodes if logits in node.makes)
    # The loss alone would be a block of one op: give it two.
    softmax = GraphBuilder(graph.name, [*graph.nodes[:-1]], [*graph.values], [*graph.storages], [*graph.inputs])
    scaled = softmax.op("softmax", [logits], 2000, save_output=True)
    graph = softmax.build(softmax.op("nll_loss", [scaled, graph.inputs[0]], 4), logits)
    assert head in choose_cuts(graph, granularity=COARSE)
    assert head not in choose_cuts(replace(graph, outputs=graph.outputs[:1]), granularity=COARSE)


def test_fine_is_the_residual_stream_before_and_after_each_half() -> None:
    assert choose_cuts(transformer_graph(3), granularity=FINE) == (1, 8, 12, 19, 23, 30, 34)


def test_fine_splits_the_block_that_sets_the_floor() -> None:
    """With a wider MLP, the half layer that holds it is the heaviest block, and has no local minimum inside."""
    build = GraphBuilder()
    x = build.input(10)
    for _ in range(3):
        y = build.op("linear", [x, build.parameter()], 40, save_output=True)
        for _ in range(4):
            y = build.op("gelu", [y], 40, save_output=True)
        x = build.op("linear", [y, build.parameter()], 10, save_output=True)
    graph = build.build(x)
    assert [cut for cut in choose_cuts(graph, granularity=FINE) if cut in (5, 11)] == [5, 11]
    assert len(choose_cuts(graph, granularity=FINE)) > len(choose_cuts(graph, granularity=COARSE)) == 2


def test_unsaved_twins_of_a_saved_tensor_are_not_stored() -> None:
    """`add` then `relu`: both ends are equally wide, but only the result of `relu` is what backward keeps anyway."""
    build = GraphBuilder()
    x = build.op("relu", [build.input(8)], 8, save_output=True)
    for _ in range(4):
        y = build.op("conv", [x], 8, saved=[build.storage_of(x)])
        y = build.op("norm", [y], 8, saved=[build.storage_of(y)])
        y = build.op("add", [x, y], 8)
        x = build.op("relu", [y], 8, save_output=True)
    graph = build.build(build.op("mean", [x], 1))
    assert {graph.nodes[cut].op for cut in choose_cuts(graph, granularity=FINE)} == {"relu"}


def test_a_view_goes_with_its_producer_and_an_expanded_one_does_not() -> None:
    build = GraphBuilder()
    x = build.input(10)
    for _ in range(3):
        wide = build.op("linear", [x], 40)
        x = build.op("linear", [wide], 10)
        x = build.view("view", x, 10)
        expanded = build.view("expand", x, 40)
        x = build.op("mul", [expanded, expanded], 40)
    graph = build.build(x)
    cuts = choose_cuts(graph, granularity=FINE)
    assert [graph.nodes[cut].op for cut in cuts] == ["view", "view", "view"]


def test_a_transposed_weight_does_not_cross() -> None:
    build = GraphBuilder()
    x = build.input(10)
    for _ in range(3):
        weight = build.parameter(100)
        wide = build.op("relu", [x], 40)
        x = build.op("linear", [wide], 10)
        transposed = build.view("t", weight, 100)
        x = build.op("linear", [x, transposed], 40)
    graph = build.build(x)
    assert {len(block.outputs) for block in cut_blocks(graph, choose_cuts(graph, granularity=FINE))} == {1}


def test_a_light_block_joins_its_neighbour() -> None:
    """The statistics of a norm are a narrow place that offers nothing to keep."""
    build = GraphBuilder()
    x = build.input(1000)
    for _ in range(4):
        square = build.op("pow", [x], 1000)
        mean = build.op("mean", [square], 1)
        root = build.op("rsqrt", [mean], 1)
        root = build.op("clamp", [root], 1)
        wide = build.op("linear", [root], 3000)
        x = build.op("linear", [wide], 1000)
    graph = build.build(x)
    profile = frontier_profile(graph)
    made = [
        sum(graph.storages[s].size_bytes for s in range(len(graph.storages)) if start <= made_of(graph, s) < stop)
        for start, stop in ((b.start, b.stop) for b in cut_blocks(graph, choose_cuts(graph, granularity=FINE)))
    ]
    assert min(made) >= 1000
    assert min(profile.width_bytes) == 1


def made_of(graph: Graph, storage: int) -> int:
    return next((n.id for n in graph.nodes for v in n.makes if graph.values[v].storage == storage), -1)


def test_resnet_stages_are_cut_between_their_layers() -> None:
    graph = resnet_graph()
    cuts = choose_cuts(graph, granularity=COARSE)
    assert [graph.nodes[cut].module for cut in cuts] == [
        f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1, 2) if (stage, index) != (4, 2)
    ]
    assert {graph.nodes[cut].op for cut in cuts} == {"relu_"}


def test_skips_do_not_hide_the_narrow_places_of_a_unet() -> None:
    """The frontier only grows on the way down; what a level adds to the skips before it still shows its end."""
    build = GraphBuilder()
    x = build.input(100)
    skips = []
    for level in range(5):
        for _ in range(6):
            x = build.op("conv", [build.op("wide", [x], 300, module=f"down.{level}")], 100, module=f"down.{level}")
        skips.append(x)
    for level in range(5):
        for _ in range(6):
            x = build.op("conv", [build.op("wide", [x], 300, module=f"up.{level}")], 100, module=f"up.{level}")
        x = build.op("cat", [x, skips.pop()], 100, module=f"up.{level}")
    graph = build.build(x)
    widths = frontier_profile(graph).width_bytes
    assert max(widths[:60]) == max(widths[48:60]) > 3 * widths[1]
    for granularity in Granularity:
        cuts = choose_cuts(graph, granularity=granularity)
        assert {11, 23, 35, 47, 59} <= set(cuts)
        assert {graph.nodes[cut].op for cut in cuts} <= {"conv", "cat"}


def test_unlike_children_of_a_sequential_are_no_layers() -> None:
    """`0` is a stem, `1` the stack, `2` a head: layers are the items of `1`."""
    build = GraphBuilder()
    x = build.op("embed", [build.input(4)], 100, module="0")
    x = build.op("scale", [x], 100, module="0")
    for layer in range(4):
        for part in ("norm", "mix"):
            y = build.op(part, [x], 300, module=f"1.{layer}.{part}")
            x = build.op("add", [x, build.op("out", [y], 100, module=f"1.{layer}.{part}")], 100, module=f"1.{layer}")
    x = build.op("head", [x], 50, module="2")
    graph = build.build(build.op("loss", [x], 1, module="2"))
    assert choose_cuts(graph, granularity=COARSE) == (1, 7, 13, 19, 25)


def test_wide_minima_near_narrow_ones_are_dropped() -> None:
    """Between two streams of 100 bytes a dip to 600 is not a place to cut; far from them it is."""
    build = GraphBuilder()
    x = build.input(100)
    for size in [800, 100] * 20 + [800, 600, 800, 100] + [800, 600] * 15:
        x = build.op("op", [x], size)
    graph = build.build(x)
    cuts = choose_cuts(graph, granularity=FINE)
    widths = frontier_profile(graph).width_bytes
    assert [widths[cut] for cut in cuts if cut <= 43] == [100] * 21
    assert [cut for cut in cuts if cut > 43] == [61, 63, 65, 67, 69, 71]


def test_twenty_thousand_ops_are_cut_in_seconds() -> None:
    graph = transformer_graph(1800)
    began = time.process_time()
    blocks = cut_blocks(graph, choose_cuts(graph, granularity=FINE))
    assert time.process_time() - began < 10
    assert len(graph.nodes) > 19_000
    assert len(blocks) == 3602
    assert len({block.signature for block in blocks}) == 4


def test_the_small_unet_has_its_skips_in_every_boundary() -> None:
    graph = unet_graph(3)
    blocks = cut_blocks(graph, [3, 5, 8])
    skips = [node.makes[0] for node in graph.nodes[:6] if node.op == "conv"]
    assert [sum(skip in block.outputs for skip in skips) for block in blocks] == [2, 3, 2, 0]
