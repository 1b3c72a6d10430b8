"""A graph step runs its piece on what the forward saw: copies where some block changes it, itself everywhere else."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece, Source
from tinybp_lightning.graph.cuts.narrow import BlockSpan
from tinybp_lightning.runtime.torch.replay.blocks import GraphBlock, NonBoundaryInputs, copies
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import replay_program_of
from tinybp_lightning.schedule.notation import from_text

SPAN = BlockSpan(0, 1, "piece", (), (), (), "piece")


def power_iteration(arguments: list[Any]) -> Sequence[Any]:
    """As a compiled spectral norm: moves a buffer, and saves the buffer itself where the user's code saves a copy."""
    x, buffer = arguments
    with torch.no_grad():
        buffer.mul_(0.5).add_(1.0)
    return (x * buffer,)


def piece(*, is_compiled: bool, reads_state: bool) -> Piece:
    return Piece(
        calls=(power_iteration,),
        module=fx.GraphModule(nn.Module(), fx.Graph()),
        reads=(Source(STATE, 0) if reads_state else Source(EXTERNAL, 1), Source(EXTERNAL, 0)),
        state=(Source(MADE, 0),),
        volatile=(0,),
        written=(0,),
        write_only=(),
        is_out_of_place=True,
        is_random=False,
        span=SPAN,
        is_compiled=is_compiled,
    )


def twice(schedule: str, *, is_compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two blocks that move one buffer: return the input's gradient and the buffer."""
    buffer, x = torch.ones(3), torch.arange(3.0).requires_grad_()
    externals = NonBoundaryInputs.of([buffer, x])
    run = Run(replay_program_of(from_text(schedule)), externals, devices=())
    run.begin([])
    state: list[Any] = []
    for reads_state in (False, True):
        state = run.sweep(GraphBlock(piece(is_compiled=is_compiled, reads_state=reads_state), externals), state)
    (gradient,) = torch.autograd.grad(state[0].sum(), x)
    return gradient, buffer


@pytest.mark.parametrize("schedule", ["K0 K1 B1 B0", "F0 K1 B1 K0 B0", "F0 F1 F0 K1 B1 K0 B0"])
def test_a_compiled_block_may_save_a_buffer_that_a_later_block_changes(schedule: str) -> None:
    gradient, buffer = twice(schedule, is_compiled=True)
    assert torch.equal(gradient, torch.full((3,), 1.5 * 1.75))
    assert torch.equal(buffer, torch.full((3,), 1.75))  # moved once a block, by replays too


def test_the_users_own_block_gets_the_buffer_itself() -> None:
    """It fails as in plain training, which saves the buffer too."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice("K0 K1 B1 B0", is_compiled=False)


def test_copies_keep_strides_and_what_shares_memory() -> None:
    whole = torch.arange(12.0).view(3, 4)
    column, row = whole.t()[1], whole[2]
    got = copies({0: column, 1: row})
    assert (got[0].stride(), got[1].stride()) == (column.stride(), row.stride())
    got[0][2] = 100.0
    assert torch.equal(got[1], torch.tensor([8.0, 100.0, 10.0, 11.0]))
    assert torch.equal(whole, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("wanted", [True, False])
def test_copies_want_gradients_as_their_originals_do(wanted: bool) -> None:
    t = torch.randn(2, dtype=torch.complex64).conj().requires_grad_(wanted)
    got = copies({3: t})[3]
    assert torch.equal(got, t)
    assert (got.requires_grad, got.is_leaf) == (wanted, True)
