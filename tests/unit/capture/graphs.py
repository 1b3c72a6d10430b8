"""Trace a function to torch-level FX, as the runtime does, and look at the result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tinybp_lightning.capture.torch.dynamo import Tracer
from tinybp_lightning.capture.torch.record import record_graph
from tinybp_lightning.graph.ir import Graph

__all__ = ["Traced", "trace_graph"]


@dataclass(frozen=True, slots=True)
class Traced:
    """An FX graph with the inputs it was called with, in placeholder order, and what the plain call returned."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]

    @property
    def graph(self) -> Graph:
        return record_graph(self.module, self.inputs, name="test")


def trace_graph(forward: nn.Module | Callable[..., Any], *args: Any) -> Traced:
    """Return the one graph of `forward(*args)`; nothing of it is run."""
    found: list[Traced] = []

    def on_graph(module: fx.GraphModule) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            found.append(Traced(module, inputs))
            return module(*inputs)

        return run

    torch._dynamo.reset()
    call = forward.forward if isinstance(forward, nn.Module) else forward
    Tracer(call, on_graph)(*args)
    (result,) = found
    return result
