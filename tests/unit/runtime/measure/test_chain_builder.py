"""A program and its blocks' costs make a chain: storages, gradients and saved sets, in small integers.

The program is written by hand. Its tensors are of one byte an element, so a size is a number of bytes:

    block 0 reads `x` and `w`, makes `a`;  block 1 reads `a`, makes `b`;  block 2 reads `a`, `b` and `w`, makes `c`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import fx

from tests.unit.graph.graphs_by_hand import GraphBuilder
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece, Program, Source
from tinybp_lightning.errors import PlanFileError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.cuts.narrow import BlockSpan
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, StorageKind
from tinybp_lightning.runtime.torch.measure.block_profiler import BlockProfile
from tinybp_lightning.runtime.torch.measure.chain_builder import chain_of, check_chain_is_of
from tinybp_lightning.runtime.torch.measure.timer import Timing

A, B, C, W = 10, 20, 30, 7
NO_MODULE = cast("fx.GraphModule", None)
Costs = list[tuple[BlockProfile, ...]]


def source(value: ValueId, before: Sequence[ValueId], graph: Graph) -> Source:
    return Source(EXTERNAL, graph.inputs.index(value)) if value in graph.inputs else Source(STATE, before.index(value))


def program_of(
    graph: Graph, blocks: Sequence[tuple[Sequence[ValueId], Sequence[ValueId]]], *, differentiated: Sequence[ValueId]
) -> Program:
    """Return the program whose blocks read and leave these values; what was not there before, a block makes.

    The batch wants no gradient.
    """
    batch = {v for v in graph.inputs if graph.storages[graph.values[v].storage or 0].kind is StorageKind.INPUT}
    graph = replace(graph, values=tuple(replace(v, requires_grad=False) if v.id in batch else v for v in graph.values))
    pieces: list[Piece] = []
    boundaries: list[tuple[ValueId, ...]] = [()]
    for k, (reads, after) in enumerate(blocks):
        before = boundaries[-1]
        made = [v for v in after if v not in before]
        span = BlockSpan(k, k + 1, f"block {k}", before, tuple(after), (), f"kind {k}")
        pieces.append(
            Piece(
                calls=(tuple,),
                module=NO_MODULE,
                reads=tuple(source(v, before, graph) for v in reads),
                state=tuple(
                    Source(MADE, made.index(v)) if v in made else Source(STATE, before.index(v)) for v in after
                ),
                volatile=(),
                written=(),
                write_only=(),
                is_random=False,
                is_out_of_place=True,
                span=span,
            )
        )
        boundaries.append(tuple(after))
    return Program(graph, tuple(pieces), tuple(boundaries), (), None, frozenset(differentiated))


def skipping() -> Program:
    """The program of this file's docstring."""
    build = GraphBuilder()
    x, w = build.input(5), build.parameter(W)
    a = build.op("mul", [x, w], A)
    b = build.op("exp", [a], B)
    c = build.op("mul", [a, b, w], C)
    return program_of(build.build(c), [((x, w), (a,)), ((a,), (a, b)), ((a, b, w), (c,))], differentiated=[c])


def costs_of(
    *,
    gradients: tuple[tuple[int, int, int], ...] = (),
    saved_reads: tuple[int, ...] = (),
    saved_made: tuple[int, ...] = (),
    forward_peak_bytes: int = 0,
    saved_bytes: int = 0,
    save_peak_bytes: int = 0,
    seconds: float = 1.0,
    is_estimated: bool = False,
) -> BlockProfile:
    return BlockProfile(
        forward_peak_bytes=forward_peak_bytes,
        saved_bytes=saved_bytes,
        saved_reads=saved_reads,
        saved_made=saved_made,
        save_peak_bytes=save_peak_bytes,
        replay_peak_bytes=3,
        backward_peak_bytes=4,
        forward=Timing(seconds, seconds),
        replay=Timing(seconds / 2, seconds / 2),
        backward=Timing(2 * seconds, 2 * seconds),
        input_gradients=gradients,
        is_estimated=is_estimated,
    )


# Gradients of positions in a block's reads: (position, number of the storage, its bytes). Block 2 gives `a` and `b` two
# parts of one tensor.
GRADIENTS: Costs = [
    (costs_of(),),
    (costs_of(gradients=((0, 0, A + 1),)),),
    (costs_of(gradients=((0, 4, A + B), (1, 4, A + B))),),
]
ALL_WANTED = [(), (True,), (True, True), (True,)]


def chain(
    program: Program | None = None,
    costs: Costs = GRADIENTS,
    *,
    wants: Sequence[Sequence[bool]] = ALL_WANTED,
    counts_gradients: bool = True,
) -> Chain:
    return chain_of(program or skipping(), costs, wants, counts_gradients=counts_gradients)


def gradient_bytes(made: Chain) -> list[int]:
    return [boundary.gradient_bytes for boundary in made.boundaries]


def parameter_gradient_bytes(made: Chain) -> list[int]:
    return [block.parameter_gradient_bytes for block in made.blocks]


def test_a_boundary_is_the_storages_that_cross_it() -> None:
    made = chain()
    assert made.storage_bytes == (A, B, C)
    assert [boundary.storages for boundary in made.boundaries] == [(), (0,), (0, 1), (2,)]
    assert [(block.name, block.signature) for block in made.blocks] == [(f"block {k}", f"kind {k}") for k in range(3)]
    assert (made.tail_peak_bytes, made.tail_live_bytes, made.unmodelled_bytes) == (0, 0, 0)


def test_views_are_one_storage_and_what_others_own_takes_no_bytes() -> None:
    build = GraphBuilder()
    x, n = build.input(50), build.flag_input()
    a = build.op("exp", [x], A)
    left, right, kept = build.view("chunk", a, 5), build.view("chunk", a, 5), build.view("view", x, 50)
    number = build.flag("size", [n])
    out = build.op("mul", [left, right, kept], C)
    program = program_of(
        build.build(out),
        [((x, n), (left, right, kept, number)), ((left, right, kept, number), (out,))],
        differentiated=[out],
    )
    made = chain(program, [(costs_of(),), (costs_of(),)], wants=[(), (False,) * 4, (False,)])
    assert made.storage_bytes == (A, 0, C)
    assert [boundary.storages for boundary in made.boundaries] == [(), (0, 1), (2,)]


@pytest.mark.parametrize("kind", [StorageKind.PARAMETER, StorageKind.BUFFER, StorageKind.INPUT])
def test_only_activations_are_the_plans_bytes(kind: StorageKind) -> None:
    build = GraphBuilder()
    x = build.input(50, kind)
    kept = build.view("view", x, 50)
    program = program_of(build.build(kept), [((x,), (kept,))], differentiated=[])
    assert chain(program, [(costs_of(),)], wants=[(), (False,)]).storage_bytes == (0,)


def test_gradients_at_boundaries() -> None:
    """At 1, two blocks' gradients of `a` were summed into a new tensor. At 2, `a` and `b` share block 2's tensor."""
    assert gradient_bytes(chain()) == [0, A, A + B, C]


def test_gradients_on_storages_of_their_own_add_up() -> None:
    costs: Costs = [*GRADIENTS[:2], (costs_of(gradients=((0, 4, A), (1, 5, B + 3))),)]
    assert gradient_bytes(chain(costs=costs)) == [0, A, A + B + 3, C]


def test_a_gradient_that_one_block_made_takes_the_storage_that_it_made() -> None:
    costs: Costs = [GRADIENTS[0], (costs_of(gradients=((0, 0, 64),)),), (costs_of(gradients=((1, 4, B),)),)]
    assert gradient_bytes(chain(costs=costs)) == [0, 64, B, C]


def test_storage_numbers_are_of_one_block_each() -> None:
    """`a`'s gradient is from block 1 and `b`'s from block 2: the same number, and two storages."""
    build = GraphBuilder()
    x = build.input(5)
    a, b = build.op("exp", [x], A), build.op("exp", [x], B)
    c = build.op("exp", [a], C)
    d = build.op("mul", [b, c], C)
    program = program_of(build.build(d), [((x,), (a, b)), ((a,), (b, c)), ((b, c), (d,))], differentiated=[d])
    costs: Costs = [(costs_of(),), (costs_of(gradients=((0, 0, A),)),), (costs_of(gradients=((0, 0, B), (1, 1, C))),)]
    made = chain(program, costs, wants=[(), (True, True), (True, True), (True,)])
    assert gradient_bytes(made) == [0, A + B, B + C, C]


def test_what_wants_no_gradient_has_none() -> None:
    made = chain(wants=[(), (True,), (False, True), (False,)])
    assert gradient_bytes(made) == [0, A, A + B, 0]
    made = chain(wants=[(), (False,), (False, False), (True,)])
    assert gradient_bytes(made) == [0, 0, 0, C]


def test_what_nobody_differentiates_has_none() -> None:
    program = replace(skipping(), differentiated=frozenset())
    assert gradient_bytes(chain(program)) == [0, A, A + B, 0]


def test_an_output_that_is_read_on_has_the_callers_gradient_too() -> None:
    """`b` is returned, and block 2 reads it: two gradients, summed. From the last boundary on it has one."""
    build = GraphBuilder()
    x = build.input(5)
    b = build.op("exp", [x], B)
    c = build.op("exp", [b], C)
    program = program_of(build.build(b, c), [((x,), (b,)), ((b,), (b, c))], differentiated=[b, c])
    costs: Costs = [(costs_of(),), (costs_of(gradients=((0, 0, 64),)),)]
    assert gradient_bytes(chain(program, costs, wants=[(), (True,), (True, True)])) == [0, B, B + C]


def test_the_first_option_says_which_inputs_get_gradients() -> None:
    other = costs_of(gradients=((0, 0, 1000), (1, 1, 1000)))
    costs: Costs = [*GRADIENTS[:2], (*GRADIENTS[2], other)]
    assert gradient_bytes(chain(costs=costs)) == [0, A, A + B, C]


def test_gradients_count_bytes_and_not_elements() -> None:
    """The summed gradient of `a` at boundary 1 and the caller's of `c`."""
    program = skipping()
    values = tuple(replace(v, dtype="float32") for v in program.graph.values)
    program = replace(program, graph=replace(program.graph, values=values))
    assert gradient_bytes(chain(program)) == [0, 4 * A, A + B, 4 * C]
    assert parameter_gradient_bytes(chain(program)) == [0, 0, 4 * W]


def test_a_parameter_used_twice_counts_at_its_last_use() -> None:
    """Backward goes from the last block to the first, so the last use is what allocates."""
    assert parameter_gradient_bytes(chain(counts_gradients=True)) == [0, 0, W]


def test_a_shared_gradient_waits_for_the_first_use() -> None:
    """Where parameters' gradients are not in the budget, autograd still holds block 2's part until block 0 adds its."""
    plain = gradient_bytes(chain(counts_gradients=True))
    made = chain(counts_gradients=False)
    assert [have - without for have, without in zip(gradient_bytes(made), plain, strict=True)] == [0, W, W, 0]
    assert parameter_gradient_bytes(made) == [0, 0, 0]


def two_weights(*, frozen: bool) -> Program:
    """Both blocks read `v`, which may be frozen; the first one reads `w`."""
    build = GraphBuilder()
    x, w, v = build.input(5), build.parameter(W), build.parameter(100)
    a = build.op("mul", [x, w, v], A)
    b = build.op("mul", [a, v], B)
    graph = build.build(b)
    values = tuple(replace(value, requires_grad=not (frozen and value.id == v)) for value in graph.values)
    blocks = [((x, w, v), (a,)), ((a, v), (b,))]
    return program_of(replace(graph, values=values), blocks, differentiated=[b])


@pytest.mark.parametrize(
    ("frozen", "at_blocks", "at_boundaries"), [(False, [W, 100], [0, A + 100, B]), (True, [W, 0], [0, A, B])]
)
def test_what_is_frozen_or_used_once_is_not_shared(
    frozen: bool, at_blocks: list[int], at_boundaries: list[int]
) -> None:
    costs: Costs = [(costs_of(),), (costs_of(gradients=((0, 0, A),)),)]
    wants = [(), (True,), (True,)]
    program = two_weights(frozen=frozen)
    assert parameter_gradient_bytes(chain(program, costs, wants=wants)) == at_blocks
    assert gradient_bytes(chain(program, costs, wants=wants, counts_gradients=False)) == at_boundaries


def test_a_block_that_uses_a_parameter_twice_does_not_share_it() -> None:
    build = GraphBuilder()
    x, w = build.input(5), build.parameter(W)
    a = build.op("mul", [x, w], A)
    program = program_of(build.build(a), [((x, w, w), (a,))], differentiated=[a])
    made = chain(program, [(costs_of(),)], wants=[(), (True,)], counts_gradients=False)
    assert gradient_bytes(made) == [0, A]
    assert parameter_gradient_bytes(chain(program, [(costs_of(),)], wants=[(), (True,)])) == [W]


def test_saved_sets_name_the_boundaries_that_they_alias() -> None:
    """Block 2 reads `a`, `b` and `w`; a saved tensor may be one of them, or what it makes."""
    options = (
        costs_of(saved_reads=(1, 0, 1), saved_made=(0,)),
        costs_of(saved_reads=(0,)),
        costs_of(saved_made=(0,)),
        costs_of(),
    )
    made = chain(costs=[*GRADIENTS[:2], options])
    assert [option.storages for option in made.blocks[2].options] == [(0, 1, 2), (0,), (2,), ()]


def test_what_a_block_makes_is_counted_apart_from_what_it_passes_on() -> None:
    """Block 1 passes `a` on and makes `b`: the first that it makes."""
    made = chain(costs=[GRADIENTS[0], (costs_of(saved_made=(0,)),), GRADIENTS[2]])
    assert made.blocks[1].options[0].storages == (StorageId(1),)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"forward_peak_bytes": 21, "save_peak_bytes": 99, "saved_bytes": 5}, (21, 99)),
        ({"forward_peak_bytes": 19, "save_peak_bytes": 0, "saved_bytes": 0}, (B, B)),  # never less than what it makes
        ({"forward_peak_bytes": 50, "save_peak_bytes": 30, "saved_bytes": 5}, (50, 50)),  # nor than without saving
        ({"forward_peak_bytes": 0, "save_peak_bytes": 30, "saved_bytes": 15}, (B, 15 + B)),  # nor than what it leaves
    ],
)
def test_peaks_hold_what_a_block_leaves_behind(measured: dict[str, int], expected: tuple[int, int]) -> None:
    block = chain(costs=[GRADIENTS[0], (costs_of(**measured),), GRADIENTS[2]]).blocks[1]
    assert (block.forward_peak_bytes, block.options[0].save_peak_bytes) == expected
    assert block.options[0].saved_bytes == measured["saved_bytes"]


def test_a_forward_costs_what_its_worst_option_costs() -> None:
    options = (costs_of(seconds=2.0, forward_peak_bytes=40), costs_of(seconds=3.0, forward_peak_bytes=70))
    block = chain(costs=[GRADIENTS[0], options, GRADIENTS[2]]).blocks[1]
    assert (block.forward_s, block.forward_peak_bytes) == (3.0, 70)
    assert [o.save_peak_bytes for o in block.options] == [70, 70]


def test_an_option_keeps_what_was_measured_of_it() -> None:
    options = (costs_of(seconds=2.0, saved_bytes=8), costs_of(seconds=4.0, saved_bytes=9, is_estimated=True))
    first, second = chain(costs=[GRADIENTS[0], options, GRADIENTS[2]]).blocks[1].options
    assert (first.replay_s, first.backward_s, first.saved_bytes, first.is_estimated) == (1.0, 4.0, 8, False)
    assert (second.replay_s, second.backward_s, second.saved_bytes, second.is_estimated) == (2.0, 8.0, 9, True)
    assert (first.replay_peak_bytes, first.backward_peak_bytes) == (3, 4)


def test_the_engine_keeps_random_states_and_buffers() -> None:
    """A random block's generator state, and a copy of each buffer that replays must find as it was."""
    build = GraphBuilder()
    x, buffer, unread = build.input(5), build.input(11, StorageKind.BUFFER), build.input(13, StorageKind.BUFFER)
    a = build.op("norm", [x, buffer], A)
    b = build.op("norm", [a, buffer, unread], B)
    program = program_of(build.build(b), [((x, buffer), (a,)), ((a, buffer, unread), (b,))], differentiated=[b])
    first, second = program.pieces
    pieces = (
        replace(first, volatile=(1,), is_random=True),
        replace(second, volatile=(1, 2), write_only=(2,), is_random=True),
    )
    made = chain(replace(program, pieces=pieces), [(costs_of(),), (costs_of(),)], wants=[(), (True,), (True,)])
    assert made.unmodelled_bytes == 2 * torch.get_rng_state().nbytes + 11 + 11


def test_the_chain_of_a_program_is_of_it() -> None:
    check_chain_is_of(skipping(), chain())


def first_block(made: Chain, **changed: object) -> Chain:
    return replace(made, blocks=(replace(made.blocks[0], **changed), *made.blocks[1:]))


def other_chains() -> dict[str, tuple[str, Chain]]:
    made = chain()
    boundaries = list(made.boundaries)
    boundaries[1] = replace(boundaries[1], storages=(StorageId(1),))
    return {
        "signature": ("blocks", first_block(made, signature="another")),
        "name": ("blocks", first_block(made, name="another")),
        "options": ("blocks", first_block(made, options=made.blocks[0].options * 2)),
        "fewer": ("blocks", replace(made, blocks=made.blocks[:-1])),
        "boundary": ("boundaries", replace(made, boundaries=tuple(boundaries))),
        "bytes": ("storage_bytes", replace(made, storage_bytes=(A, B, C + 1))),
    }


@pytest.mark.parametrize("name", ["signature", "name", "options", "fewer", "boundary", "bytes"])
def test_another_chain_is_refused_by_its_first_difference(name: str) -> None:
    field, other = other_chains()[name]
    with pytest.raises(PlanFileError, match=f"`{field}`"):
        check_chain_is_of(skipping(), other)


def test_costs_do_not_belong_to_a_chains_identity() -> None:
    """They may be another machine's."""
    slower = chain(costs=[(costs_of(seconds=9.0, saved_bytes=1),)] * 3)
    check_chain_is_of(skipping(), slower)
