"""Train one copy of a network for comparison, and record what each of its steps leaves behind.

Each copy has its own optimizers and its own random numbers, so that two can train in lockstep in one process.
"""

import contextlib
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo import Architecture, Phase
from recipes.measure import record_memory

__all__ = ["NUM_STEPS", "Snapshot", "Training", "differences"]

NUM_STEPS = 3
_SEED = 7


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one step leaves behind, by name, in order."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]
    random_state: dict[str, Tensor]


class Training:
    """One copy of an architecture in training, with its own optimizers and its own random numbers.

    **Arguments:** `autocast`: whether its forwards run under bfloat16 autocast; `around`: entered around each of them.
    """

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        *,
        autocast: bool = False,
    ) -> None:
        workload = architecture.build(_SEED)
        self._around = around
        self._device_type, self._autocast = device.type, autocast
        self.module, self._phases = workload.module.to(device), workload.phases
        self._batch = {name: tensor.to(device) for name, tensor in workload.batch.items()}
        self._initial = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.restart()

    def restart(self) -> None:
        """Begin again at the first step, with the same plans and compiled blocks."""
        self.module.load_state_dict(self._initial)
        self._optimizers = [torch.optim.AdamW(self._trained(phase), lr=1e-3) for phase in self._phases]
        torch.manual_seed(_SEED + 1)
        random.seed(_SEED + 1)
        np.random.seed(_SEED + 1)  # noqa: NPY002 - transformers masks by the global generator
        self._random = _random_states()

    def _trained(self, phase: Phase) -> list[nn.Parameter]:
        return list(self.module.get_submodule(phase.trains).parameters())

    def step(self) -> Snapshot:
        """Run every phase of one training step."""
        _set_random_states(self._random)
        losses: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for number, (phase, optimizer) in enumerate(zip(self._phases, self._optimizers, strict=True)):
            self._prepare(phase)
            loss = self._loss(phase)
            loss.backward()
            losses[f"loss {number}"] = loss.detach().clone()
            for name, parameter in self.module.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{name} in phase {number}"] = parameter.grad.clone()
            optimizer.step()
        self._random = _random_states()
        return Snapshot(
            losses,
            gradients,
            {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()},
            {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()},
            self._random.tensors(),
        )

    def peak_bytes(self) -> int:
        """Return the activation peak of a step's largest phase, measured after some warm-up steps."""
        for _ in range(NUM_STEPS):
            self.step()
        return self.measured_peak_bytes()

    def measured_peak_bytes(self) -> int:
        """Return the activation peak of the next step's largest phase; that step does not train."""
        return max(self._phase_peak(phase) for phase in self._phases)

    def timed_s(self) -> float:
        """Return the seconds of the next step's forwards and backwards; that step does not train."""
        begin_s = time.perf_counter()
        for phase in self._phases:
            self._prepare(phase)
            self._loss(phase).backward()
        return time.perf_counter() - begin_s

    def _phase_peak(self, phase: Phase) -> int:
        self._prepare(phase)
        recorded = record_memory(lambda: self._loss(phase).backward(), self.module)
        return recorded.memory.activation_peak_bytes

    def _loss(self, phase: Phase) -> Tensor:
        precision = torch.autocast(self._device_type, torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with self._around(), precision:
            return phase.loss(self.module, self._batch)

    def _prepare(self, phase: Phase) -> None:
        self.module.zero_grad(set_to_none=True)
        if phase.trains:
            self.module.requires_grad_(False)
            self.module.get_submodule(phase.trains).requires_grad_(True)


@dataclass(frozen=True, slots=True)
class _RandomStates:
    """The states of all generators that a training may draw from."""

    torch_state: Tensor
    device_state: Tensor | None
    numpy_state: dict[str, Any]
    python_state: Any

    def tensors(self) -> dict[str, Tensor]:
        """Return the states as tensors, by generator."""
        inner = self.numpy_state["state"]
        return {
            "torch": self.torch_state,
            **({} if self.device_state is None else {"device": self.device_state}),
            "numpy": torch.tensor([*inner["key"].tolist(), inner["pos"]]),
            "python": torch.tensor(self.python_state[1]),
        }


def _random_states() -> _RandomStates:
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - transformers masks by the global generator
    device_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return _RandomStates(torch.get_rng_state(), device_state, numpy_state, random.getstate())


def _set_random_states(states: _RandomStates) -> None:
    torch.set_rng_state(states.torch_state)
    if states.device_state is not None:
        torch.cuda.set_rng_state(states.device_state)
    np.random.set_state(states.numpy_state)  # noqa: NPY002 - transformers masks by the global generator
    random.setstate(states.python_state)


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Return how `found` differs from `expected`: names that are missing or extra, and tensors of other bits."""
    told = [f"`{name}` is missing" for name in expected if name not in found]
    told += [f"`{name}` is extra" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name in found and not _same_bits(tensor, found[name]):
            gap = (
                (tensor.double() - found[name].double()).abs().max().item() if tensor.shape == found[name].shape else ""
            )
            told.append(f"`{name}` differs {gap}".rstrip())
    return told


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and (torch.equal(a, b) or (a.shape == b.shape and _equal_with_nan(a, b)))


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
