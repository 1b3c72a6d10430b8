"""The lower bound is below the peak of every schedule, and it is reached where the docstring says so."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.graph.graphs_by_hand import GraphBuilder, transformer_graph
from tests.unit.graph.strategies_chain import chains
from tinybp_lightning.analysis import Bottleneck, Phase, peak_bottleneck, peak_lower_bound, widest_op
from tinybp_lightning.graph import Block, BlockId, Boundary, Chain, OptionId, SavedSet, StorageId, verify_chain
from tinybp_lightning.schedule import (
    Action,
    Backward,
    ForwardSave,
    Schedule,
    every_k,
    keep_all,
    per_block,
    revolve,
    simulate,
)


def with_options(schedule: Schedule, options: list[int]) -> Schedule:
    """Return `schedule` with block `b` always saved and run backward under `options[b]`."""

    def under_option(action: Action) -> Action:
        match action:
            case ForwardSave(block):
                return ForwardSave(block, OptionId(options[block]))
            case Backward(block):
                return Backward(block, OptionId(options[block]))
            case _:
                return action

    return replace(schedule, actions=tuple(map(under_option, schedule.actions)))


@given(chains(), st.data())
def test_no_schedule_is_below_the_bound(chain: Chain, data: st.DataObject) -> None:
    num_blocks = len(chain.blocks)
    k = data.draw(st.integers(1, num_blocks))
    schedules = [keep_all(chain), per_block(chain), every_k(chain, k=k), revolve(chain, num_slots=k)]
    options = [data.draw(st.integers(0, len(block.options) - 1)) for block in chain.blocks]
    peaks = [simulate(chain, with_options(schedule, options)).peak_bytes for schedule in schedules]
    assert peak_lower_bound(chain) <= min(peaks)


def one_block(*, workspace_bytes: int = 0, tail_peak_bytes: int = 0, **changes: int) -> Chain:
    option = SavedSet("all", (StorageId(1),), 10, 30, 1.0, 10, 1.0, 3)
    option = replace(option, **{field: value for field, value in changes.items() if field in SavedSet.__slots__})
    block = Block("b", "s", 1.0, changes.get("forward_peak_bytes", 20), 2, (option,))
    chain = Chain(
        storage_bytes=(5, 20),
        blocks=(block,),
        boundaries=(Boundary((StorageId(0),), 5), Boundary((StorageId(1),), 20)),
        tail_peak_bytes=tail_peak_bytes,
        workspace_bytes=workspace_bytes,
    )
    verify_chain(chain)
    return chain


# Boundary 0 is 5 bytes, boundary 1 is 20 and so is its gradient; the parameter's gradient is 2.
BOTTLENECKS = {
    "backward": (one_block(), Bottleneck(10 + 20 + 20 + 2 + 3, Phase.BACKWARD, BlockId(0))),
    "workspace": (one_block(workspace_bytes=7), Bottleneck(10 + 20 + 20 + 2 + 3 + 7, Phase.BACKWARD, BlockId(0))),
    "forward": (
        one_block(forward_peak_bytes=60, save_peak_bytes=60),
        Bottleneck(5 + 60, Phase.FORWARD, BlockId(0)),
    ),
    "save": (one_block(replay_peak_bytes=90, save_peak_bytes=90), Bottleneck(5 + 90, Phase.SAVE, BlockId(0))),
    "loss": (one_block(tail_peak_bytes=80), Bottleneck(20 + 80, Phase.LOSS, None)),
}


@pytest.mark.parametrize(("chain", "bottleneck"), BOTTLENECKS.values(), ids=BOTTLENECKS.keys())
def test_each_moment_can_be_the_bottleneck(chain: Chain, bottleneck: Bottleneck) -> None:
    assert peak_bottleneck(chain) == bottleneck
    assert peak_lower_bound(chain) == bottleneck.peak_bytes


def test_the_cheaper_option_counts() -> None:
    chain = one_block()
    block = chain.blocks[0]
    less = replace(block.options[0], name="less", storages=(), saved_bytes=1)
    chain = replace(chain, blocks=(replace(block, options=(*block.options, less)),))
    assert peak_bottleneck(chain).peak_bytes == 1 + 20 + 2 + 3


def uniform_chain(num_blocks: int) -> Chain:
    """Return blocks that save their 4-byte input, make a 4-byte output, and leave 1 byte of parameter gradient."""
    blocks = tuple(
        Block(f"b{i}", "s", 1.0, 4, 1, (SavedSet("all", (StorageId(i),), 0, 4, 1.0, 0, 1.0, 4),))
        for i in range(num_blocks)
    )
    boundaries = tuple(Boundary((StorageId(i),), 4) for i in range(num_blocks + 1))
    return Chain((0, *(4 for _ in range(num_blocks))), blocks, boundaries)


@pytest.mark.parametrize("num_blocks", [2, 5, 9])
def test_parameter_gradients_of_later_blocks_count(num_blocks: int) -> None:
    """The second block's backward: its input, both boundary gradients, and all parameter gradients but the first."""
    assert peak_bottleneck(uniform_chain(num_blocks)) == Bottleneck(12 + num_blocks - 1, Phase.BACKWARD, BlockId(1))


def test_the_bound_is_reached_on_two_blocks() -> None:
    chain = uniform_chain(2)
    assert peak_lower_bound(chain) == simulate(chain, keep_all(chain)).peak_bytes


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
