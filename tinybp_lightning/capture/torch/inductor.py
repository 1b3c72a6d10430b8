"""How are pieces compiled? Each unique piece once, by Inductor, forward and backward together.

Equal pieces (same structure, same constants, same inputs wanting gradients) share one compiled function: parameters
are arguments. A compiled piece saves what AOTAutograd's partitioner chose to save; the engine treats it as any other.
Private API: `torch._inductor.compile_fx.compile_fx` on a torch-level graph (torch 2.11 to 2.14).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, Piece, Program

__all__ = ["compile_pieces"]


def compile_pieces(program: Program, values: Sequence[Any], *, on_piece: Callable[[int, int], None]) -> Program:
    """Return the program with every piece compiled for the given external values.

    Runs each piece once, so that compilation happens here and not under the engine's hooks. Generators advance and
    buffers change as in one forward: the caller puts both back.

    **Arguments:** `on_piece(done, total)`: called after each piece, for progress.
    """
    compiled: dict[tuple[Any, ...], Any] = {}
    pieces: list[Piece] = []
    state: list[Any] = []
    for done, piece in enumerate(program.pieces):
        arguments = [values[s.index] if s.origin == EXTERNAL else state[s.index] for s in piece.reads]
        key = _key(piece, arguments)
        if key not in compiled:
            compiled[key] = compile_fx(_unboxed(piece.module), arguments)
        call = _boxed(compiled[key])
        with torch.enable_grad():
            made = call(list(arguments))
        following = [made[s.index] if s.origin == MADE else state[s.index] for s in piece.state]
        wants = [isinstance(t, torch.Tensor) and t.requires_grad for t in following]
        state = [
            t.detach().requires_grad_(w) if isinstance(t, torch.Tensor) else t
            for t, w in zip(following, wants, strict=True)
        ]
        pieces.append(replace(piece, call=call))
        on_piece(done + 1, len(program.pieces))
    return replace(program, pieces=tuple(pieces))


def _key(piece: Piece, arguments: Sequence[Any]) -> tuple[Any, ...]:
    # The signature leaves constants (an epsilon, a dropout rate) out; the code names them.
    forms = tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if isinstance(t, torch.Tensor) else repr(t)
        for t in arguments
    )
    return (piece.span.signature, piece.module.code, forms)


def _unboxed(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with ordinary arguments, which is what the compiler expects."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _boxed(compiled: Callable[..., Any]) -> Callable[[list[Any]], Sequence[Any]]:
    def call(arguments: list[Any]) -> Sequence[Any]:
        taken = tuple(arguments)
        arguments.clear()
        return compiled(*taken)

    return call
