"""Does a traced forward compute what the plain one does? Asked once per signature, where the trace took another path.

See Note [As it runs] in `capture/torch/dynamo.py`. The plain forward runs once more, keeping nothing for backward;
generators and buffers are put back in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tinybp_lightning.runtime.torch.ambient import RandomState, random_state_now, set_random_state
from tinybp_lightning.runtime.torch.slots import forget, never_unpacked

__all__ = ["Before", "plain_outputs", "same_outputs", "signature_of"]


@dataclass(frozen=True, slots=True)
class Before:
    """What a forward may change: generators, and the module's buffers as copies."""

    random: RandomState
    buffers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "Before":
        """Note the state before a forward of `module`."""
        devices = sorted({t.device for t in [*module.parameters(), *module.buffers()]}, key=str)
        return cls(random_state_now(devices), tuple((b, b.detach().clone()) for b in module.buffers()))

    def restore(self) -> None:
        """Put everything back."""
        set_random_state(self.random)
        with torch.no_grad():
            for buffer, copy in self.buffers:
                buffer.copy_(copy)


def plain_outputs(plain: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that the plain forward returns, detached; nothing is kept for a backward."""
    with torch.autograd.graph.saved_tensors_hooks(forget, never_unpacked):
        result = plain(*args, **kwargs)
    return [t.detach() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def same_outputs(expected: Sequence[torch.Tensor], result: Any) -> bool:
    """Whether `result` holds the expected tensors, bit for bit (a NaN equals a NaN)."""
    found = [t.detach() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    return len(found) == len(expected) and all(_same(a, b) for a, b in zip(found, expected, strict=True))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124 - NaN is unlike itself


def signature_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return what a new trace depends on: shapes and types of the tensors passed."""
    leaves: list[Any] = tree_leaves((tuple(args), kwargs))
    return tuple(
        f"{tuple(t.shape)} {t.dtype} {t.device}" if isinstance(t, torch.Tensor) else str(t.__class__) for t in leaves
    )
