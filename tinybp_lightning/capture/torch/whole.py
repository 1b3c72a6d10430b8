"""What does a module's forward compute, as one graph? Traced on the user's inputs, and not run."""

import contextlib
from typing import Any

import torch
from torch import fx, nn

from tinybp_lightning.capture.torch.dynamo import CannotTraceError, Tracer
from tinybp_lightning.capture.torch.record import record_graph
from tinybp_lightning.errors import CaptureError, UnsupportedModuleError
from tinybp_lightning.graph.ir import Graph

__all__ = ["capture_graph"]


class _CapturedError(Exception):
    """Ends the traced call once its graph is recorded, before anything of it has run."""


def capture_graph(module: nn.Module, *inputs: Any, **named_inputs: Any) -> Graph:
    """Return the graph of `module(*inputs, **named_inputs)` as it would be trained.

    Only shapes are computed: no kernel runs and nothing of the module changes. It may be on the `meta` device, and so
    larger than this machine.

    **Arguments:** `module`: in the mode (training or not) that is meant, and not under `tbp.hcb`.

    **Raises:** `UnsupportedModuleError` for what is no module; `CaptureError` if the forward cannot be traced as one
    graph, or is under `tbp.hcb`.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModuleError(f"`{type(module).__name__}` is no torch.nn.Module: pass the model itself.")
    found: list[Graph] = []

    def on_graph(traced: fx.GraphModule) -> Any:
        def record(*values: Any) -> Any:
            found.append(record_graph(traced, values, name=type(module).__name__))
            raise _CapturedError

        return record

    with torch.enable_grad(), contextlib.suppress(_CapturedError):
        try:
            Tracer(module.forward, on_graph)(*inputs, **named_inputs)
        except CannotTraceError as error:
            raise CaptureError(
                f"`{type(module).__name__}` cannot be captured as one graph ({error.reason}). If it is under "
                "`tbp.hcb`, call `tbp.restore` first; else train it for a step and ask `tbp.explain(module)`."
            ) from error
    return found[0]
