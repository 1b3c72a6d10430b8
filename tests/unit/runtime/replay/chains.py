"""Hand-made blocks for the engine, which write down what runs when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs
from tinybp_lightning.runtime.torch.replay.engine import Run
from tinybp_lightning.runtime.torch.replay.program import replay_program_of
from tinybp_lightning.schedule.actions import Schedule

__all__ = ["Layer", "Log", "layers", "plain", "replayed"]


@dataclass
class Log:
    """Words for what happened: `f3` first run, `a3` a run again, `b3` the block's backward began."""

    words: list[str] = field(default_factory=list)

    def count(self, letters: str) -> int:
        return sum(word[0] in letters for word in self.words)

    def __str__(self) -> str:
        return " ".join(self.words)


class Layer:
    """A block: `run` on the only leaf of its boundary."""

    def __init__(
        self, index: int, run: Callable[[torch.Tensor], torch.Tensor], log: Log, *, is_random: bool = False
    ) -> None:
        self.name = f"layer {index}"
        self.is_random = is_random
        self.is_out_of_place = False
        self.has_regions = False
        self._index = index
        self._run = run
        self._log = log

    def first(self, state: list[Any]) -> list[Any]:
        self._log.words.append(f"f{self._index}")
        (x,) = state
        state.clear()
        out = self._run(x)
        if out.grad_fn is not None:
            out.grad_fn.register_prehook(lambda _: self._log.words.append(f"b{self._index}"))
        return [out]

    def again(self, state: list[Any]) -> list[Any]:
        self._log.words.append(f"a{self._index}")
        (x,) = state
        state.clear()
        return [self._run(x)]


def layers(depth: int, width: int = 4, *, dropout: float = 0.0) -> nn.ModuleList:
    """Layers that save one private tensor each, the result of `tanh`."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(depth))


def plain(modules: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Run the layers as anybody would."""
    for module in modules:
        x = module(x)
    return x


def replayed(
    modules: Sequence[nn.Module], x: torch.Tensor, schedule: Schedule, log: Log, *, is_random: bool = False
) -> tuple[torch.Tensor, Run]:
    """Run the layers through the engine."""
    externals = NonBoundaryInputs.of([x, *(p for module in modules for p in module.parameters())])
    run = Run(replay_program_of(schedule), externals, devices=(torch.device("cpu"),))
    run.begin([x])
    state: list[Any] = [x]
    for i, module in enumerate(modules):
        state = run.sweep(Layer(i, module, log, is_random=is_random), state)
    (out,) = state
    return out, run
