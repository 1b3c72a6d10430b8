"""How are pieces compiled? Each unique piece once by Inductor, forward and backward together, and again per option.

Equal pieces (same structure, same constants, same inputs wanting gradients) share compiled functions: parameters are
arguments. Option 0 saves what torch's own partitioner chose. A piece that stands in the program several times gets
further options, which save less and repeat ops inside their backward (`partition`): compiling one more function for it
pays many times in every step. It is compiled when a plan takes it (`compile_options`); until then there is a forecast
of what it saves and repeats.

# Note [Kernels that are timed]
On CUDA a pointwise kernel is launched in the shape that was fastest when it was timed, and it is timed anew whenever
code that has the same kernel is loaded, for all who use it. The last bits of what it computes can depend on the shape.
No code is loaded within a step, so a replay computes what its forward did; but two trainings, or two runs of one, can
part. Where the user asks for deterministic algorithms, of which that is the purpose, no kernel is timed.

Private API: `torch._inductor.compile_fx.compile_fx` on a torch-level graph (torch 2.11 to 2.14).
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, Piece, Program
from tinybp_lightning.runtime.torch.executors.forecast import Forecast, forecast_options
from tinybp_lightning.runtime.torch.executors.partitioner import ClosurePartitioner
from tinybp_lightning.runtime.torch.replay.ambient import random_state_now, set_random_state
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs

__all__ = ["compile_options", "compile_program", "forecast_of", "is_compiled", "options_to_compile"]

_SHARES = (0.6, 0.3, 0.1)
"""How much of what autograd wants the further options save. In a transformer layer the first repeats pointwise ops, the
second the matrix products that widen too, and the third all but what is random."""
_OPTION_DEVICES = frozenset({"cpu", "cuda"})
# Where the tags were seen to be followed, with bits, budget and time. Elsewhere a block's replay is what saves memory.

_Call = Callable[[list[Any]], Sequence[Any]]


class _FurtherOption:
    """An option of all equal pieces, callable once it is compiled; before and after there is a forecast."""

    def __init__(self, piece: Piece, share: float, forecast: Forecast) -> None:
        self._piece = piece
        self._share = share
        self._call: _Call | None = None
        self.forecast = forecast

    @property
    def is_compiled(self) -> bool:
        return self._call is not None

    def compile(self, arguments: Sequence[Any]) -> None:
        """Compile it for arguments like these."""
        self._call = _compile(self._piece, arguments, self._share)

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        assert self._call is not None, "options are compiled before a step goes by them"
        return self._call(arguments)


def forecast_of(call: _Call) -> Forecast | None:
    """Return the forecast of one of a piece's `calls`, if there is one: not for option 0."""
    return call.forecast if isinstance(call, _FurtherOption) else None


def is_compiled(call: _Call) -> bool:
    """Return whether one of a piece's `calls` can be called: a further option once it is compiled."""
    return call.is_compiled if isinstance(call, _FurtherOption) else True


def options_to_compile(program: Program, options: Collection[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    """Return those of `options`, pairs of a piece's position and an option's number, that are not compiled."""
    return frozenset((i, o) for i, o in options if not is_compiled(program.pieces[i].calls[o]))


def compile_program(
    program: Program,
    externals: NonBoundaryInputs,
    devices: Sequence[torch.device],
    on_piece: Callable[[int, int], None],
) -> Program:
    """Return the program with every piece compiled for the given external values, which may be changed in place.

    Runs each piece once, so that compilation happens here and not under the engine's hooks. Generators are put back.

    **Arguments:** `on_piece(done, total)`: called after each piece, for progress.
    """
    num_equal = Counter(piece.span.signature for piece in program.pieces)
    compiled: dict[tuple[Any, ...], tuple[_Call, ...]] = {}
    pieces: list[Piece] = []

    def visit(piece: Piece, arguments: Sequence[Any]) -> _Call:
        key = _key(piece, arguments)
        if key not in compiled:
            has_options = num_equal[piece.span.signature] > 1 and _has_options(arguments)
            further = _further_options(piece, arguments) if has_options else ()
            compiled[key] = (_compile(piece, arguments, None), *further)
        pieces.append(replace(piece, calls=compiled[key], is_compiled=True))
        on_piece(len(pieces), len(program.pieces))
        return compiled[key][0]

    _walk(program.pieces, externals.values, devices, visit)
    return replace(program, pieces=tuple(pieces))


def compile_options(
    program: Program,
    externals: NonBoundaryInputs,
    devices: Sequence[torch.device],
    wanted: Collection[tuple[int, int]],
    on_piece: Callable[[int, int], None],
) -> None:
    """Compile the options of `wanted` (see `options_to_compile`), for all equal pieces.

    **Arguments:** `program`, which `compile_program` returned; all else as for that.
    """
    pieces = program.pieces[: max((i for i, _ in wanted), default=-1) + 1]
    done = 0

    def visit(piece: Piece, arguments: Sequence[Any]) -> _Call:
        nonlocal done
        for i, option in sorted(wanted):
            call = piece.calls[option] if i == done else None
            if isinstance(call, _FurtherOption) and not call.is_compiled:
                call.compile(arguments)
        done += 1
        on_piece(done, len(pieces))
        return piece.calls[0]

    _walk(pieces, externals.values, devices, visit)


def _walk(
    pieces: Sequence[Piece],
    values: Sequence[Any],
    devices: Sequence[torch.device],
    visit: Callable[[Piece, Sequence[Any]], _Call],
) -> None:
    """Run `pieces`, each by what `visit` returns for it and its arguments. Generators are put back."""
    random = random_state_now(devices)
    try:
        _run(pieces, values, visit)
    finally:
        set_random_state(random)


def _run(pieces: Sequence[Piece], values: Sequence[Any], visit: Callable[[Piece, Sequence[Any]], _Call]) -> None:
    state: list[Any] = []
    for piece in pieces:
        arguments = [values[s.index] if s.origin == EXTERNAL else state[s.index] for s in piece.reads]
        call = visit(piece, arguments)
        with torch.enable_grad():
            made = call(list(arguments))
        following = [made[s.index] if s.origin == MADE else state[s.index] for s in piece.state]
        wants = [isinstance(t, torch.Tensor) and t.requires_grad for t in following]
        state = [
            t.detach().requires_grad_(w) if isinstance(t, torch.Tensor) else t
            for t, w in zip(following, wants, strict=True)
        ]


def _further_options(piece: Piece, arguments: Sequence[Any]) -> tuple[_Call, ...]:
    """Return the options beside option 0: compiled at once only where they cannot be forecast."""
    forecasts = forecast_options(
        _unboxed(piece.module), arguments, shares=_SHARES, parameters=_parameters(piece, arguments)
    )
    if forecasts is None:
        return tuple(_compile(piece, arguments, share) for share in _SHARES)
    return tuple(_FurtherOption(piece, share, f) for share, f in zip(_SHARES, forecasts, strict=True))


def _has_options(arguments: Sequence[Any]) -> bool:
    return all(t.device.type in _OPTION_DEVICES for t in arguments if isinstance(t, torch.Tensor))


def _compile(piece: Piece, arguments: Sequence[Any], share: float | None) -> _Call:
    if share is None:
        return _boxed(_compiled(piece.module, arguments))
    with inductor_config.patch(custom_partitioner_fn=ClosurePartitioner(share, _parameters(piece, arguments))):
        return _boxed(_compiled(piece.module, arguments))


def _parameters(piece: Piece, arguments: Sequence[Any]) -> frozenset[int]:
    return frozenset(
        position
        for position, (source, value) in enumerate(zip(piece.reads, arguments, strict=True))
        if source.origin == EXTERNAL and isinstance(value, torch.Tensor) and value.requires_grad
    )


def _compiled(module: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
    compile_graph: Any = compile_fx  # its annotation has cases that a graph in memory never makes
    # See Note [Kernels that are timed].
    settings = {"triton.autotune_pointwise": False} if torch.are_deterministic_algorithms_enabled() else None
    return compile_graph(_unboxed(module), list(arguments), config_patches=settings)


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
