"""What does a training step count beside gradients? Metrics, of the user and of `self.log`: noted, and put back.

torchmetrics keeps its states as plain attributes, which no buffer or state-dict shows; Lightning's logged values are
such metrics too. A step that is run twice would count its batch twice.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

__all__ = ["metrics_in", "note_metrics"]


@runtime_checkable
class _Metric(Protocol):
    """What is used of `torchmetrics.Metric`, which need not be installed."""

    @property
    def metric_state(self) -> dict[str, Any]: ...


def metrics_in(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the metrics among the modules of `module`."""
    return tuple(m for m in module.modules() if isinstance(m, _Metric))


def note_metrics(metrics: Iterable[nn.Module], logged: dict[str, Any] | None) -> Callable[[], None]:
    """Note what `metrics`, and the values `logged` so far, hold now; return the function that puts it back."""
    entries = dict(logged or {})
    noted = [(m, dict(vars(m)), _copied(m.metric_state)) for m in (*metrics, *entries.values())]

    def put_back() -> None:
        for metric, attributes, states in noted:
            vars(metric).clear()
            vars(metric).update(attributes, **_copied(states))  # copied once more: there may be a third run
        if logged is not None:
            logged.clear()
            logged.update(entries)

    return put_back


def _copied(states: Any) -> dict[str, Any]:
    """Copy the states of a metric, as an update may write into them: tensors, or lists of tensors."""
    return {name: s.detach().clone() if isinstance(s, torch.Tensor) else copy.copy(s) for name, s in states.items()}
