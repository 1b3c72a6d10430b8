"""How is a module's forward traced? By Dynamo, as one graph or not at all, and as it runs *without* a compiler.

`torch.compile` with a backend of ours gives guards (new shapes make a new graph), side effects in the right place and
the user's output structure. Its graph is at torch level: no functionalisation, the user's own calls.

Note [As it runs]
    Libraries ask `torch.compiler.is_compiling()` and then take another path: transformers builds an attention mask
    that it leaves out in eager mode, and other kernels with other bits (and no flash attention) follow. The blocks run
    in eager mode, so the trace must take the eager path: Dynamo is made to answer `False`. Where that path reads
    values of tensors, and the graph breaks, the compiler's path is traced instead; `runtime` then checks on the
    first step that its results are the plain forward's, bit for bit.

Private API: `torch._dynamo.config`, `exc`, `comptime`, `variables.torch.tracing_state_functions` (torch 2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Dynamo is private and barely annotated; it is reached from here only.

import contextlib
import logging
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch._dynamo import exc
from torch._dynamo.comptime import comptime
from torch._dynamo.variables.torch import tracing_state_functions

from tinybp_lightning.errors import CaptureError

__all__ = ["CannotTraceError", "traced"]

# One code object serves every instance of a class, and every instance and shape needs its own graph.
_MANY = 4096


class CannotTraceError(CaptureError):
    """Dynamo cannot make one graph of the forward; `reason` is its first line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def traced(
    forward: Callable[..., Any], on_graph: Callable[[fx.GraphModule], Callable[..., Any]], *, as_it_runs: bool
) -> Callable[..., Any]:
    """Return `forward`, traced on each new signature; `on_graph` turns a captured graph into what runs it.

    **Arguments:** `as_it_runs`: take the paths of eager execution (see Note [As it runs]), else the compiler's.

    **Raises:** (when called) `CannotTraceError` if the forward breaks the graph. Nothing of it has run then.
    """

    def backend(module: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        return torch._dynamo.disable(on_graph(module), reason="height-compressed backpropagation runs the blocks")

    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with _settings(), _as_it_runs() if as_it_runs else contextlib.nullcontext():
                return compiled(*args, **kwargs)
        except (exc.Unsupported, exc.UserError, exc.TorchRuntimeError, exc.InternalTorchDynamoError) as error:
            raise CannotTraceError(str(error).strip().splitlines()[0]) from error

    return call


def _settings() -> Any:
    # A log line is no reason to break a graph: HF models log in their forwards. A tuple, because Dynamo sorts sets of
    # settings when it reports them, and functions have no order.
    names = ("debug", "info", "warning", "error", "exception", "critical", "warning_once", "info_once")
    ignored = (*torch._dynamo.config.ignore_logging_functions, *(getattr(logging.Logger, n, None) for n in names))
    return torch._dynamo.config.patch(
        recompile_limit=_MANY,
        accumulated_recompile_limit=_MANY,
        # Off by default because compilers have no kernels for them; blocks run torch's own.
        allow_rnn=True,
        # DDPOptimizer would cut the graph at gradient buckets; blocks keep the overlap by themselves.
        optimize_ddp=False,
        ignore_logging_functions=tuple(f for f in ignored if f is not None),
    )


@contextlib.contextmanager
def _as_it_runs() -> Generator[None]:
    """Let traced code see that it is not being compiled. See Note [As it runs]."""
    answers = tracing_state_functions()
    compiling = [question for question, answer in answers.items() if answer is True]
    masks: Any = sys.modules.get("transformers.masking_utils")
    original = getattr(masks, "find_packed_sequence_indices", None)
    try:
        for question in compiling:
            answers[question] = False
        if original is not None:
            masks.find_packed_sequence_indices = _no_packed_sequences
        yield
    finally:
        for question in compiling:
            answers[question] = True
        if original is not None:
            masks.find_packed_sequence_indices = original


def _no_packed_sequences(position_ids: torch.Tensor) -> None:
    """What transformers' function returns for positions 0, 1, 2 …, without reading them at run time.

    It reads the positions to find several sequences in one row. Where the model made them itself they are constants:
    they are computed and looked at once, while tracing. Where they come from the caller, tracing gives up.
    """
    comptime(_check_positions)
    _ = position_ids


def _check_positions(context: Any) -> None:
    positions = _constant(context.get_local("position_ids").as_proxy().node)
    if not bool((positions.diff(dim=-1) == 1).all()):
        raise CannotTraceError("the positions hold several packed sequences")


def _constant(node: fx.Node) -> Any:
    """Compute a traced value that depends on no input."""
    if node.op not in ("call_function", "call_method"):
        raise CannotTraceError("the positions come from the caller, and the attention mask depends on their values")
    args, kwargs = fx.map_arg((node.args, node.kwargs), _constant)  # pyright: ignore[reportGeneralTypeIssues]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), "call_function names a callable"
    return node.target(*args, **kwargs)
