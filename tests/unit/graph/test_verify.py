"""Each promise of `Graph` and `Chain`, broken once: the error names what breaks it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given

from tests.unit.graph.graphs_by_hand import GraphBuilder, resnet_graph, transformer_graph, unet_graph
from tests.unit.graph.strategies_chain import chains
from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph import (
    Block,
    Boundary,
    Chain,
    Graph,
    Node,
    NodeId,
    SavedSet,
    Storage,
    StorageId,
    StorageKind,
    Value,
    ValueId,
    verify_chain,
    verify_graph,
)


def small_graph() -> Graph:
    """Value 0 (storage 0) is the input; node 0 makes value 1, node 1 writes it and makes value 2 (both storage 1)."""
    build = GraphBuilder()
    a = build.op("op", [build.input(4)], 4, save_output=True)
    return build.build(build.write("add_", a))


def with_node(node: int, **changes: object) -> Graph:
    graph = small_graph()
    nodes = list(graph.nodes)
    nodes[node] = replace(nodes[node], **changes)
    return replace(graph, nodes=tuple(nodes))


def with_value(value: int, **changes: object) -> Graph:
    graph = small_graph()
    values = list(graph.values)
    values[value] = replace(values[value], **changes)
    return replace(graph, values=tuple(values))


def with_storage(storage: int, **changes: object) -> Graph:
    graph = small_graph()
    storages = list(graph.storages)
    storages[storage] = replace(storages[storage], **changes)
    return replace(graph, storages=tuple(storages))


BROKEN_GRAPHS: dict[str, tuple[Callable[[], Graph], str]] = {
    "node id": (lambda: with_node(1, id=NodeId(5)), "node `5` stands at index `1`"),
    "value id": (lambda: with_value(1, id=ValueId(7)), "value `7` stands at index `1`"),
    "storage id": (lambda: with_storage(0, id=StorageId(1)), "storage `1` stands at index `0`"),
    "storage size": (lambda: with_storage(1, size_bytes=-1), "storage `1` has `size_bytes=-1`"),
    "value's storage": (lambda: with_value(2, storage=StorageId(9)), r"value `2` \(v2\) names `9` in `storage`"),
    "negative storage": (lambda: with_value(2, storage=StorageId(-1)), r"value `2` \(v2\) names `-1` in `storage`"),
    "shape": (lambda: with_value(2, shape=(3, -1)), r"value `2` \(v2\) has `shape=\(3, -1\)`"),
    "input range": (lambda: replace(small_graph(), inputs=(ValueId(0), ValueId(9))), "names `9` in `inputs`"),
    "input twice": (lambda: replace(small_graph(), inputs=(ValueId(0), ValueId(0))), "`inputs` names value `0` twice"),
    "input kind": (
        lambda: with_storage(0, kind=StorageKind.ACTIVATION),
        "value `0` on storage `0` of kind `ACTIVATION`",
    ),
    "flops": (lambda: with_node(0, flops=-2), r"node `0` \(op_0\) has `flops=-2`"),
    "read range": (lambda: with_node(0, reads=(ValueId(9),)), r"node `0` \(op_0\) names `9` in `reads`"),
    "read too early": (lambda: with_node(0, reads=(ValueId(2),)), r"node `0` \(op_0\) `reads` value `2` before"),
    "make range": (lambda: with_node(0, makes=(ValueId(9),)), r"node `0` \(op_0\) names `9` in `makes`"),
    "made twice": (lambda: with_node(1, makes=(ValueId(1),)), r"node `1` \(add__1\) `makes` value `1`, which exists"),
    "input made": (lambda: with_node(1, makes=(ValueId(0),)), r"node `1` \(add__1\) `makes` value `0`, which exists"),
    "saved range": (lambda: with_node(0, saved=(StorageId(9),)), r"node `0` \(op_0\) names `9` in `saved`"),
    "copy not saved": (
        lambda: with_node(0, saved=(), copies=((StorageId(1), StorageId(0)),)),
        r"node `0` \(op_0\) has `\(1, 0\)` in `copies`",
    ),
    "copy of another": (
        lambda: with_node(0, saved=(StorageId(1),), copies=((StorageId(1), StorageId(1)),)),
        r"node `0` \(op_0\) has `\(1, 1\)` in `copies`",
    ),
    "write range": (lambda: with_node(1, writes=(StorageId(9),)), r"node `1` \(add__1\) names `9` in `writes`"),
    "write too early": (
        lambda: replace(
            with_node(0, writes=(StorageId(2),)),
            storages=(*small_graph().storages, Storage(StorageId(2), 1, StorageKind.ACTIVATION)),
        ),
        r"node `0` \(op_0\) `writes` storage `2` before",
    ),
    "no maker": (lambda: with_node(1, makes=()), r"value `2` \(v2\) has no maker"),
    "output range": (lambda: replace(small_graph(), outputs=(ValueId(9),)), "the graph names `9` in `outputs`"),
}


@pytest.mark.parametrize(
    "graph", [small_graph(), transformer_graph(2), unet_graph(3), resnet_graph()], ids=lambda g: g.name
)
def test_good_graphs_pass(graph: Graph) -> None:
    verify_graph(graph)


@pytest.mark.parametrize(("make", "message"), BROKEN_GRAPHS.values(), ids=BROKEN_GRAPHS.keys())
def test_each_broken_graph_is_named(make: Callable[[], Graph], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        verify_graph(make())


def test_a_private_storage_may_be_saved() -> None:
    """A dropout's mask belongs to no value, but backward reads it."""
    value = Value(ValueId(0), "mask_source", StorageId(0), (1,), "uint8", requires_grad=False)
    node = Node(NodeId(0), "dropout", "dropout", "", (), (ValueId(0),), (), (StorageId(1),), 0, True, False)
    storages = tuple(Storage(StorageId(s), 1, StorageKind.ACTIVATION) for s in range(2))
    verify_graph(Graph("g", (node,), (value,), storages, (), (ValueId(0),)))


OPTION = SavedSet("all", (StorageId(1),), 5, 12, 1.0, 6, 2.0, 3)
BLOCK = Block("b", "s", 1.0, 7, 1, (OPTION,))
CHAIN = Chain(
    storage_bytes=(0, 4, 7),
    blocks=(BLOCK, BLOCK),
    boundaries=(
        Boundary((StorageId(0),), 0),
        Boundary((StorageId(1),), 4),
        Boundary((StorageId(2),), 7),
    ),
    tail_peak_bytes=2,
    tail_live_bytes=1,
)


def with_option(**changes: object) -> Chain:
    return with_block(options=(OPTION, replace(OPTION, name="less", **changes)))


def with_block(**changes: object) -> Chain:
    return replace(CHAIN, blocks=(BLOCK, replace(BLOCK, **changes)))


def with_boundary(boundary: int, **changes: object) -> Chain:
    boundaries = list(CHAIN.boundaries)
    boundaries[boundary] = replace(boundaries[boundary], **changes)
    return replace(CHAIN, boundaries=tuple(boundaries))


OPTION_OWNER = r"block `1` \(b\), option `1` \(less\)"
BROKEN_CHAINS: dict[str, tuple[Callable[[], Chain], str]] = {
    "no blocks": (lambda: replace(CHAIN, blocks=()), r"`blocks` is `\(\)`"),
    "boundaries": (
        lambda: replace(CHAIN, boundaries=CHAIN.boundaries[1:]),
        "`boundaries` has `2` entries for `2` blocks",
    ),
    "storage bytes": (lambda: replace(CHAIN, storage_bytes=(0, -4, 7)), r"`storage_bytes\[1\]=-4`"),
    "boundary range": (lambda: with_boundary(1, storages=(StorageId(3),)), "boundary `1` names `3` in `storages`"),
    "boundary order": (
        lambda: with_boundary(2, storages=(StorageId(2), StorageId(1))),
        r"boundary `2` has `storages=\(2, 1\)`: expected ids in increasing order",
    ),
    "boundary repeat": (
        lambda: with_boundary(1, storages=(StorageId(1), StorageId(1))),
        r"boundary `1` has `storages=\(1",
    ),
    "gradient bytes": (lambda: with_boundary(1, gradient_bytes=-1), "boundary `1` has `gradient_bytes=-1`"),
    "comes back": (
        lambda: with_boundary(0, storages=(StorageId(2),)),
        "boundary `2` holds storage `2` in `storages`, which boundary `0` held and boundary `1` does not",
    ),
    "forward_s": (lambda: with_block(forward_s=-0.5), r"block `1` \(b\) has `forward_s=-0.5`"),
    "forward_s nan": (lambda: with_block(forward_s=float("nan")), r"block `1` \(b\) has `forward_s=nan`"),
    "forward_s inf": (lambda: with_block(forward_s=float("inf")), r"block `1` \(b\) has `forward_s=inf`"),
    "parameter gradients": (lambda: with_block(parameter_gradient_bytes=-1), "has `parameter_gradient_bytes=-1`"),
    "forward peak": (lambda: with_block(forward_peak_bytes=6), "has `forward_peak_bytes=6`: expected at least `7`"),
    "no options": (lambda: with_block(options=()), r"block `1` \(b\) has `options=\(\)`"),
    "option storages": (lambda: with_option(storages=(StorageId(9),)), f"{OPTION_OWNER} names `9` in `storages`"),
    "option order": (
        lambda: with_option(storages=(StorageId(2), StorageId(1))),
        rf"{OPTION_OWNER} has `storages=\(2, 1\)`",
    ),
    "saved bytes": (lambda: with_option(saved_bytes=-1), f"{OPTION_OWNER} has `saved_bytes=-1`"),
    "backward peak": (lambda: with_option(backward_peak_bytes=-1), f"{OPTION_OWNER} has `backward_peak_bytes=-1`"),
    "replay_s": (lambda: with_option(replay_s=-1.0), f"{OPTION_OWNER} has `replay_s=-1.0`"),
    "backward_s": (lambda: with_option(backward_s=-1.0), f"{OPTION_OWNER} has `backward_s=-1.0`"),
    "save peak": (
        lambda: with_option(save_peak_bytes=11),
        f"{OPTION_OWNER} has `save_peak_bytes=11`: expected at least `12`",
    ),
    "replay peak low": (lambda: with_option(replay_peak_bytes=4), "has `replay_peak_bytes=4`: expected at least `5`"),
    "replay peak high": (lambda: with_option(replay_peak_bytes=13), "has `save_peak_bytes=12`: expected at least `13`"),
    "replay slower": (lambda: with_option(replay_s=1.5), f"{OPTION_OWNER} has `replay_s=1.5`: expected at most"),
    "tail live": (lambda: replace(CHAIN, tail_live_bytes=-1), "the chain has `tail_live_bytes=-1`"),
    "tail peak": (
        lambda: replace(CHAIN, tail_peak_bytes=0),
        "the chain has `tail_peak_bytes=0`: expected at least `1`",
    ),
    "workspace": (lambda: replace(CHAIN, unmodelled_bytes=-1), "the chain has `unmodelled_bytes=-1`"),
}


def test_a_good_chain_passes() -> None:
    verify_chain(CHAIN)


@given(chains())
def test_random_chains_pass(chain: Chain) -> None:
    verify_chain(chain)


@pytest.mark.parametrize(("make", "message"), BROKEN_CHAINS.values(), ids=BROKEN_CHAINS.keys())
def test_each_broken_chain_is_named(make: Callable[[], Chain], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        verify_chain(make())


def test_a_storage_of_no_bytes_may_come_back() -> None:
    """The batch is somebody else's: boundaries name it where it is convenient."""
    boundaries = (CHAIN.boundaries[0], CHAIN.boundaries[1], Boundary((StorageId(0), StorageId(2)), 7))
    verify_chain(replace(CHAIN, boundaries=boundaries))
