"""How are pieces compiled? Each unique piece once by Inductor, forward and backward together, and again per option.

Equal pieces (same structure, same constants, same inputs wanting gradients) share compiled functions: parameters are
arguments. Option 0 saves what torch's own partitioner chose. A piece that stands in the program several times gets
further options, which save less and repeat ops inside their backward (`partition`): compiling one more function for it
pays many times in every step.

Private API: `torch._inductor.compile_fx.compile_fx` on a torch-level graph (torch 2.11 to 2.14).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, Piece, Program
from tinybp_lightning.runtime.torch.ambient import random_state_now, set_random_state
from tinybp_lightning.runtime.torch.partition import ClosurePartitioner
from tinybp_lightning.runtime.torch.steps import Externals

__all__ = ["compile_program"]

_SHARES = (0.6, 0.3, 0.1)
"""How much of what autograd wants the further options save. In a transformer layer the first repeats pointwise ops, the
second the matrix products that widen too, and the third all but what is random."""
_OPTION_DEVICES = frozenset({"cpu", "cuda"})
# Where the tags were seen to be followed, with bits, budget and time. Elsewhere a block's replay is what saves memory.

_Call = Callable[[list[Any]], Sequence[Any]]


def compile_program(
    program: Program,
    externals: Externals,
    devices: Sequence[torch.device],
    on_piece: Callable[[int, int], None],
) -> Program:
    """Return the program with every piece compiled for the given external values, which may be changed in place.

    Runs each piece once, so that compilation happens here and not under the engine's hooks. Generators are put back.

    **Arguments:** `on_piece(done, total)`: called after each piece, for progress.
    """
    random = random_state_now(devices)
    try:
        return _compile_pieces(program, externals.values, on_piece)
    finally:
        set_random_state(random)


def _compile_pieces(program: Program, values: Sequence[Any], on_piece: Callable[[int, int], None]) -> Program:
    num_equal = Counter(piece.span.signature for piece in program.pieces)
    compiled: dict[tuple[Any, ...], tuple[_Call, ...]] = {}
    pieces: list[Piece] = []
    state: list[Any] = []
    for done, piece in enumerate(program.pieces):
        arguments = [values[s.index] if s.origin == EXTERNAL else state[s.index] for s in piece.reads]
        key = _key(piece, arguments)
        if key not in compiled:
            has_options = num_equal[piece.span.signature] > 1 and _has_options(arguments)
            shares = (None, *_SHARES) if has_options else (None,)
            compiled[key] = tuple(_compile(piece, arguments, share) for share in shares)
        calls = compiled[key]
        with torch.enable_grad():
            made = calls[0](list(arguments))
        following = [made[s.index] if s.origin == MADE else state[s.index] for s in piece.state]
        wants = [isinstance(t, torch.Tensor) and t.requires_grad for t in following]
        state = [
            t.detach().requires_grad_(w) if isinstance(t, torch.Tensor) else t
            for t, w in zip(following, wants, strict=True)
        ]
        pieces.append(replace(piece, calls=calls, is_compiled=True))
        on_piece(done + 1, len(program.pieces))
    return replace(program, pieces=tuple(pieces))


def _has_options(arguments: Sequence[Any]) -> bool:
    return all(t.device.type in _OPTION_DEVICES for t in arguments if isinstance(t, torch.Tensor))


def _compile(piece: Piece, arguments: Sequence[Any], share: float | None) -> _Call:
    if share is None:
        return _boxed(_compiled(piece.module, arguments))
    parameters = frozenset(
        position
        for position, (source, value) in enumerate(zip(piece.reads, arguments, strict=True))
        if source.origin == EXTERNAL and isinstance(value, torch.Tensor) and value.requires_grad
    )
    with inductor_config.patch(custom_partitioner_fn=ClosurePartitioner(share, parameters)):
        return _boxed(_compiled(piece.module, arguments))


def _compiled(module: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
    compile_graph: Any = compile_fx  # its annotation has cases that a graph in memory never makes
    return compile_graph(_unboxed(module), list(arguments))


def _key(piece: Piece, arguments: Sequence[Any]) -> tuple[Any, ...]:
    # The signature leaves constants (an epsilon, a dropout rate) out; the code has them.
    forms = tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if isinstance(t, torch.Tensor) else repr(t)
        for t in arguments
    )
    module = _unboxed(piece.module)
    targets = tuple(n.target for n in module.graph.nodes)  # code names functions: two may have one name
    return (piece.span.signature, module.code, targets, forms)


def _unboxed(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with ordinary arguments, as the compiler expects, and values named by position.

    The tracer numbers names through the whole forward: with those, the code of equal pieces would differ.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(module.graph.nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
        name = node.name if node.op == "placeholder" else f"v{position}"
        copied[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copied[node].meta = dict(node.meta)
    return fx.GraphModule(module, graph)


def _boxed(compiled: Callable[..., Any]) -> _Call:
    def call(arguments: list[Any]) -> Sequence[Any]:
        taken = tuple(arguments)
        arguments.clear()
        return compiled(*taken)

    return call
