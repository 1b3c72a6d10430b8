"""How is a module's forward traced? By Dynamo, as one graph or not at all.

`torch.compile` with a backend of ours gives guards (new shapes make a new graph), side effects in the right place and
the user's output structure. Its graph is at torch level: no functionalisation, the user's own calls. Private API:
`torch._dynamo.config`, `torch._dynamo.exc` (torch 2.11 to 2.14).
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch._dynamo import exc

from tinybp_lightning.errors import CaptureError

__all__ = ["CannotTraceError", "traced"]

# One code object serves every instance of a class, and every instance and shape needs its own graph.
_MANY = 4096


class CannotTraceError(CaptureError):
    """Dynamo cannot make one graph of the forward; `reason` is its first line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def traced(forward: Callable[..., Any], on_graph: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any]:
    """Return `forward`, traced on each new signature; `on_graph` turns a captured graph into what runs it.

    **Raises:** (when called) `CannotTraceError` if the forward breaks the graph. Nothing of it has run then.
    """

    def backend(module: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        return torch._dynamo.disable(on_graph(module), reason="height-compressed backpropagation runs the blocks")

    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with _settings():
                return compiled(*args, **kwargs)
        except (exc.Unsupported, exc.UserError, exc.TorchRuntimeError, exc.InternalTorchDynamoError) as error:
            raise CannotTraceError(str(error).strip().splitlines()[0]) from error

    return call


def _settings() -> Any:
    # A log line is no reason to break a graph: HF models log in their forwards.
    loggers = {getattr(logging.Logger, n) for n in ("debug", "info", "warning", "error", "exception", "critical")}
    loggers |= {f for n in ("warning_once", "info_once", "warning_advice") if (f := getattr(logging.Logger, n, None))}
    settings: Any = torch._dynamo.config.patch(
        recompile_limit=_MANY,
        accumulated_recompile_limit=_MANY,
        # DDPOptimizer would cut the graph at gradient buckets; blocks keep the overlap by themselves.
        optimize_ddp=False,
        ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | loggers,
    )
    return settings
