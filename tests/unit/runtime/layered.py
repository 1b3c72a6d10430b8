"""The same layers one after the other: as one graph, and with a graph break before each (module steps)."""

from collections.abc import Iterable

import torch
from torch import nn

from tests.unit.runtime.training import residual_net

__all__ = ["Broken", "Net", "broken_net"]


class Net(nn.Module):
    """Runs its layers in order."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Broken(Net):
    """Cannot be traced as one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def broken_net() -> Broken:
    """Return the layers of `residual_net`, which cannot be traced as one graph."""
    return Broken(residual_net())
