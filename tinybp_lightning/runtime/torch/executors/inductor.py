"""Compile every unique piece once by Inductor, forward and backward together, and again for each option in use.

Equal pieces share compiled functions: parameters are arguments. Option 0 saves what torch's own partitioner chose. A
piece that occurs several times gets further options, which save less and repeat ops inside their backward
(`partitioner.py`). Such an option is compiled when a plan uses it. Until then its forecast is read off its partition of
the piece's joint graph: the bytes saved are exact, and what is repeated is estimated against option 0, which is
measured.

# Note [Kernels that are timed]
On CUDA, Inductor launches a pointwise kernel in the shape that was fastest when it was timed. It times the kernel anew
whenever code that has the same kernel is loaded. The last bits of the result can depend on the shape. No code is loaded
within a step, so a replay computes what its forward did; but two trainings can differ. Deterministic algorithms promise
that they do not, so with them no kernel is timed.

Private API: `torch._functorch.partitioners`, `torch._inductor.compile_fx.compile_fx` on a torch-level graph (torch
2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# AOTAutograd's partitioners are private and barely annotated.

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch import partitioners as aot
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from tinybp_lightning.capture.torch.ambient import random_state_now, set_random_state
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, Piece, Program, cut_program
from tinybp_lightning.graph.cuts.narrow import Granularity
from tinybp_lightning.runtime.torch.executors.executor import Call, Capture, Cut, Executor, Forecast, Preparation
from tinybp_lightning.runtime.torch.executors.partitioner import ClosurePartitioner, repeated_share, value_bytes

__all__ = ["InductorExecutor"]

_SHARES = (0.6, 0.3, 0.1)
"""How much of what autograd wants the further options save. In a transformer layer the first repeats pointwise ops, the
second also the matrix products that widen, and the third all but random ops."""
_OPTION_DEVICES = frozenset({"cpu", "cuda"})
# The devices on which we have seen torch follow the tags, with bits, budget and time. On others, replays save memory.


class InductorExecutor(Executor):
    """Pieces compiled by Inductor: results as near to float64 as `torch.compile`'s, with options beside replays."""

    def cut(self, capture: Capture) -> Cut:
        """Cut coarsely: a large piece gives the compiler something to fuse."""
        return Cut(cut_program(capture.module, capture.graph, granularity=Granularity.COARSE))

    def prepare(self, asked: Preparation) -> Program:
        """Return the program compiled: each piece runs once, so that it is not compiled under the engine's hooks."""
        pieces = asked.program.pieces
        num_equal = Counter(piece.span.signature for piece in pieces)
        compiled: dict[tuple[Any, ...], tuple[Call, ...]] = {}
        keys: list[tuple[Any, ...]] = []

        def visit(piece: Piece, arguments: Sequence[Any]) -> Call:
            keys.append(key := _key(piece, arguments))
            if key not in compiled:
                further = _further_options(piece, arguments) if num_equal[piece.span.signature] > 1 else ()
                compiled[key] = (_compile(piece, arguments, None), *further)
            return compiled[key][0]

        _walk(pieces, asked, visit)
        ready = (replace(p, calls=compiled[key], is_compiled=True) for p, key in zip(pieces, keys, strict=True))
        return replace(asked.program, pieces=tuple(ready))

    def prepare_options(self, asked: Preparation, wanted: Collection[tuple[int, int]]) -> None:
        """Compile the options in `wanted`, for all equal pieces."""
        pieces = asked.program.pieces
        calls = {pieces[i].calls[option] for i, option in wanted}

        def visit(piece: Piece, arguments: Sequence[Any]) -> Call:
            for call in piece.calls:
                if call in calls and isinstance(call, _FurtherOption) and call.compiled is None:
                    call.compiled = _compile(piece, arguments, call.share)
            return piece.calls[0]

        _walk(pieces[: max((i for i, _ in wanted), default=-1) + 1], asked, visit)

    def forecast(self, call: Call) -> Forecast | None:
        """Return the forecast of a further option."""
        return call.forecast if isinstance(call, _FurtherOption) else None

    def is_ready(self, call: Call) -> bool:
        """Return whether `call` is compiled."""
        return not isinstance(call, _FurtherOption) or call.compiled is not None


@dataclass(eq=False)
class _FurtherOption:
    """An option of all equal pieces. It has a forecast from the beginning, and can be called once it is compiled."""

    share: float
    forecast: Forecast
    compiled: Call | None = None

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        assert self.compiled is not None, "options are compiled before a step uses them"
        return self.compiled(arguments)


def _walk(pieces: Sequence[Piece], asked: Preparation, visit: Callable[[Piece, Sequence[Any]], Call]) -> None:
    """Run `pieces`, each by the call that `visit` returns for it and its arguments. Generators are put back."""
    values, random = asked.externals().values, random_state_now(asked.devices)
    try:
        state: list[Any] = []
        for done, piece in enumerate(pieces, start=1):
            arguments = [values[s.index] if s.origin == EXTERNAL else state[s.index] for s in piece.reads]
            call = visit(piece, arguments)
            with torch.enable_grad():
                made = call(list(arguments))
            state = [_leaf(made[s.index] if s.origin == MADE else state[s.index]) for s in piece.state]
            asked.on_piece(done, len(pieces))
    finally:
        set_random_state(random)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _further_options(piece: Piece, arguments: Sequence[Any]) -> tuple[Call, ...]:
    """Return the options beside option 0. Those that cannot be forecast are compiled at once."""
    if not all(t.device.type in _OPTION_DEVICES for t in arguments if isinstance(t, torch.Tensor)):
        return ()
    forecasts = _forecasts(piece, arguments)
    if forecasts is None:
        return tuple(_compile(piece, arguments, share) for share in _SHARES)
    return tuple(_FurtherOption(share, forecast) for share, forecast in zip(_SHARES, forecasts, strict=True))


def _compile(piece: Piece, arguments: Sequence[Any], share: float | None) -> Call:
    """Compile a piece, to save what torch chooses or a `share` of what autograd wants."""
    ours = {} if share is None else {"custom_partitioner_fn": ClosurePartitioner(share, _parameters(piece, arguments))}
    compile_graph: Any = compile_fx  # its annotation has cases that a graph in memory never makes
    # See Note [Kernels that are timed].
    settings = {"triton.autotune_pointwise": False} if torch.are_deterministic_algorithms_enabled() else None
    with inductor_config.patch(ours):
        compiled = compile_graph(_unboxed(piece.module), list(arguments), config_patches=settings)

    def call(arguments: list[Any]) -> Sequence[Any]:
        taken = tuple(arguments)
        arguments.clear()
        return compiled(*taken)

    return call


def _parameters(piece: Piece, arguments: Sequence[Any]) -> frozenset[int]:
    return frozenset(
        position
        for position, (source, value) in enumerate(zip(piece.reads, arguments, strict=True))
        if source.origin == EXTERNAL and isinstance(value, torch.Tensor) and value.requires_grad
    )


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
    """Return the same graph with ordinary arguments, as the compiler expects, and values named by position."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(module.graph.nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
        # The tracer numbers names through the whole forward, so the code of equal pieces would differ.
        name = node.name if node.op == "placeholder" else f"v{position}"
        copied[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copied[node].meta = dict(node.meta)
    return fx.GraphModule(module, graph)


def _forecasts(piece: Piece, arguments: Sequence[Any]) -> tuple[Forecast, ...] | None:
    """Return one forecast for each further option, or `None` for a piece whose partition does not show them.

    That is a piece without backward, one that changes its arguments, and one that the compiler gives more arguments.
    """
    module, tracer = _unboxed(piece.module), _Tracer()
    compile_graph: Any = compile_fx  # its annotation has cases that a graph in memory never makes
    with inductor_config.patch(custom_partitioner_fn=tracer), functorch_config.patch(enable_autograd_cache=False):
        compile_graph(module, list(arguments), inner_compile=_uncompiled)
    if len(tracer.found) != 1:
        return None
    ((joint, options),) = tracer.found
    returned: Any = module.graph.output_node().args[0]
    if options["num_fwd_outputs"] != len(returned):
        return None
    plain_forward, plain_backward = aot.min_cut_rematerialization_partition(_copy(joint), (), **options)
    if len(plain_forward.graph.find_nodes(op="placeholder")) != len(arguments):
        return None
    repeated_anyway = repeated_share(plain_forward, plain_backward)
    forecasts: list[Forecast] = []
    for share in _SHARES:
        forward, backward = ClosurePartitioner(share, _parameters(piece, arguments))(_copy(joint), (), **options)
        repeats = max(0.0, repeated_share(forward, backward) - repeated_anyway)
        forecasts.append(Forecast(*_saved(forward, len(returned)), repeats))
    return tuple(forecasts)


class _Tracer(CustomPartitionerFn):
    """Keeps copies of the joint graphs that it is given to divide."""

    def __init__(self) -> None:
        self.found: list[tuple[fx.GraphModule, dict[str, Any]]] = []

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.found.append((_copy(gm), kwargs))
        return aot.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """Have nothing cached: all we want is the graph."""
        return None


def _uncompiled(module: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
    return module


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    result: Any = graph.graph_copy(module.graph, {}, return_output_node=True)
    returned, output = result
    graph.output(returned).meta = dict(output.meta)
    return fx.GraphModule(module, graph)


def _saved(forward: fx.GraphModule, num_results: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the bytes that are saved on storages of their own, and which arguments and results are saved."""
    returned: Any = forward.graph.output_node().args[0]
    saved = {_storage(n) for n in returned[num_results:] if isinstance(n, fx.Node)}
    arguments = {n: k for k, n in enumerate(forward.graph.find_nodes(op="placeholder"))}
    results = [_storage(n) if isinstance(n, fx.Node) else None for n in returned[:num_results]]
    return (
        sum(value_bytes(n.meta.get("val")) for n in saved if n not in arguments and n not in results),
        tuple(sorted(arguments[n] for n in saved if n in arguments)),
        tuple(k for k, n in enumerate(results) if n in saved),
    )


def _storage(node: fx.Node) -> fx.Node:
    """Return the op or argument whose storage `node` is a view of."""
    views = aot.get_default_op_list()
    while views.is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
