"""How is a module's forward traced? By Dynamo, as one graph or not at all, along the path that eager mode takes.

`torch.compile` with a backend of ours gives guards (new shapes make a new graph), side effects in the right place and
the user's output structure. Its graph holds the user's own torch-level calls, without functionalisation.

Note [As it runs]
    Libraries ask `torch.compiler.is_compiling()` and take another path if it is true: under a tracer, transformers
    builds an attention mask that it leaves out in eager mode, which selects other kernels with other bits (and no flash
    attention). The blocks run in eager mode, so the trace must take the eager path: Dynamo is made to answer `False`.
    Where that path reads values of tensors (other than the caller's mask, see `masks.py`), the graph breaks, and the
    module is trained by its submodules' calls: as exact, but coarser.

Private API: `torch._dynamo.config`, `eval_frame._stance`, `exc`, `comptime`,
`variables.torch.tracing_state_functions`, `variables.misc.RandomVariable` (torch 2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Dynamo is private and barely annotated; only this file and `masks.py` touch it.

import contextlib
import itertools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch._dynamo import eval_frame, exc
from torch._dynamo.comptime import comptime
from torch._dynamo.variables import misc as dynamo_misc
from torch._dynamo.variables import torch as dynamo_torch
from torch._dynamo.variables.torch import tracing_state_functions

from tinybp_lightning.capture.torch.fake_ops import register_fake_ops
from tinybp_lightning.capture.torch.higher_order import as_plain_calls
from tinybp_lightning.capture.torch.masks import mask_functions
from tinybp_lightning.capture.torch.private import modes_set_aside
from tinybp_lightning.capture.torch.regions import settle_regions
from tinybp_lightning.errors import CaptureError

__all__ = ["CannotTraceError", "Tracer"]

# Each instance of a class and each shape needs a graph of its own, and they share one code object.
_MANY = 4096
# The functions replaced during a trace are replaced for all threads: two traces must not undo each other's changes.
_ONE_AT_A_TIME = threading.RLock()
_NUMBERS = itertools.count()
_LOGGING = ("debug", "info", "warning", "error", "exception", "critical", "warning_once", "info_once")


register_fake_ops()


class CannotTraceError(CaptureError):
    """Dynamo cannot make one graph of the forward; the message is the first line of its reason."""


class Tracer:
    """A forward that is traced on each new signature. See Note [As it runs].

    **Arguments:** `on_graph`: turns a captured graph into the callable that runs it.
    """

    def __init__(self, forward: Callable[..., Any], on_graph: Callable[[fx.GraphModule], Callable[..., Any]]) -> None:
        def backend(module: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
            as_plain_calls(module)
            settle_regions(module)
            run_graph = on_graph(module)

            def run(*values: Any) -> Any:
                self._has_run = True
                return run_graph(*values)

            return torch._dynamo.disable(run, reason="height-compressed backpropagation runs the blocks")

        self._forward = forward
        self._has_run = False  # whether the call that is under way has reached the graph
        with torch._dynamo.config.patch(disable=False):  # else `torch.compile` returns the forward itself
            self._compiled = torch.compile(_own_frame(forward), backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward. Raises `CannotTraceError` before anything has run if the graph breaks."""
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # `torch.compile` returns the forward itself
            raise CannotTraceError("`TORCHDYNAMO_DISABLE=1` switches the tracer off")
        with _ONE_AT_A_TIME, _tracing(self._forward, args, kwargs):
            self._has_run = False
            try:
                return self._compiled(*args, **kwargs)
            except Exception as error:
                # Dynamo lets many kinds of error out (of symbolic shapes, of libraries, of its own), and none of them
                # means more than that there is no graph; what the run of a graph raises is the user's to see.
                if self._has_run or isinstance(error, CaptureError):
                    raise
                raise CannotTraceError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    inner = getattr(error, "inner_exception", None)  # what a backend raises, Dynamo wraps
    shown = inner if isinstance(inner, Exception) else error
    text = str(shown).strip()
    name = "" if isinstance(shown, (exc.TorchDynamoException, CaptureError)) else f"{type(shown).__name__}: "
    return f"{name}{text.splitlines()[0]}" if text else type(shown).__name__


def _own_frame(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` in a function that shares its code object with no other.

    Dynamo counts recompilations by code object, and wraps all forwards that it does not trace itself
    (`nn.Sequential.forward`) into one function (pytorch issue 124269). Past its limit it would skip that code for good.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    traced.__code__ = traced.__code__.replace(co_name=f"traced_{next(_NUMBERS)}")
    return traced


@contextlib.contextmanager
def _tracing(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[None]:
    """Trace the path of eager mode, even if the user has switched compilers off: nothing is compiled here.

    A forward that ran plainly because of `TORCH_COMPILE_DISABLE` or `set_stance` would silently ignore its budget.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(modes_set_aside())
        # Transformers' models log in their forwards, which must not break the graph.
        loggers = frozenset(f for name in _LOGGING if (f := getattr(logging.Logger, name, None)) is not None)
        settings = torch._dynamo.config.patch(
            disable=False,
            recompile_limit=_MANY,
            accumulated_recompile_limit=_MANY,
            # Off by default because compilers have no kernels for RNNs; blocks run torch's own.
            allow_rnn=True,
            # Dynamo would turn NumPy's arithmetic and generator into torch's, which have other bits.
            trace_numpy=False,
            # DDPOptimizer would cut the graph at gradient buckets; blocks overlap with communication without it.
            optimize_ddp=False,
            # A hook that the user registers after the first step must run.
            skip_nnmodule_hook_guards=False,
            ignore_logging_functions=_Functions(loggers),
        )
        stack.enter_context(settings)
        if eval_frame._stance.stance != "default":
            stack.enter_context(torch.compiler.set_stance("default"))
        # See Note [As it runs].
        answers = {q: False if answer is True else answer for q, answer in tracing_state_functions().items()}
        _replace(stack, dynamo_torch, "tracing_state_functions", lambda: answers)
        if hasattr(dynamo_misc.RandomVariable, "is_supported_random_obj"):
            _replace(stack, dynamo_misc.RandomVariable, "is_supported_random_obj", staticmethod(_refuse_generator))
        for module, name, new in (*_REPLACED, *mask_functions(forward, args, kwargs)):
            if hasattr(owner := sys.modules.get(module), name):
                _replace(stack, owner, name, new)
        # Dynamo's own warnings do not concern the user.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, new: Any) -> None:
    """Set an attribute until `stack` is left."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, new)


def _refuse_generator(_: Any) -> bool:
    """Keep Dynamo from drawing from a `random.Random` while it traces: it would make constants of what it draws."""
    raise CannotTraceError("it draws from a `random.Random` of its own, which a trace would turn into constants")


class _Functions(str):
    """A set of functions that Dynamo can write into its JSON reports, where a plain set raises."""

    __slots__ = ("_members",)

    def __new__(cls, members: frozenset[Any]) -> "_Functions":
        made = super().__new__(cls, f"{len(members)} logging functions")
        made._members = members
        return made

    def __contains__(self, item: object) -> bool:
        return item in self._members


def _no_packed_sequences(position_ids: torch.Tensor) -> None:
    """Return what transformers' function returns for positions 0, 1, 2 …, without reading them at run time.

    That function reads the positions to find several sequences in one row. Positions that the model makes itself are
    constants, which are computed and checked once, during the trace. With the caller's positions the trace fails.
    """
    comptime(_check_positions)
    _ = position_ids


def _check_positions(context: Any) -> None:
    positions = _constant(context.get_local("position_ids").as_proxy().node)
    if not bool((positions.diff(dim=-1) == 1).all()):
        raise CannotTraceError("the positions hold several packed sequences")


def _constant(node: fx.Node) -> Any:
    """Return a traced value that depends on no input."""
    if node.op not in ("call_function", "call_method"):
        raise CannotTraceError("the positions come from the caller, and the attention mask depends on their values")
    args, kwargs = fx.map_arg((node.args, node.kwargs), _constant)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), "call_function names a callable"
    return node.target(*args, **kwargs)


# Functions of transformers that must not be traced: two that read values (the second to warn about padding), two that
# ask the driver, and one that guards a context variable of eager mode, which Dynamo cannot follow and which computes
# nothing.
_REPLACED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("transformers.masking_utils", "find_packed_sequence_indices", _no_packed_sequences),
    ("transformers.modeling_utils", "is_tracing", lambda *_: True),
    ("transformers.utils.import_utils", "is_cuda_stream_capturing", lambda *_: False),
    ("transformers.utils.import_utils", "is_xpu_stream_capturing", lambda *_: False),
    ("transformers.utils.output_capturing", "is_torchdynamo_compiling", lambda *_: True),
)
