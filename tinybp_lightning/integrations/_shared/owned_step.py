"""Run Lightning's training step again when memory runs out.

In automatic optimization on one device, Lightning calls a strategy's `training_step` and `backward`: a failed backward
can be preceded by its forward once more. What the loop does around them has then happened once and stays. Manual
optimization steps the optimizer inside `training_step`, and a strategy over several devices synchronises: there the
error passes, with a note that gives our numbers.

A step that runs twice would count its batch twice in metrics. torchmetrics keeps its states as plain attributes, and
the values that `self.log` collects are such metrics too: their states are noted before a step and put back.

Private parts of Lightning 2.6 used: `LightningModule._current_fx_name` (which hook may log), `Trainer._results`.
"""

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tinybp_lightning.runtime.torch.recovery.oom import OomRetry, explaining, fresh_containers, why_not_rerun
from tinybp_lightning.runtime.torch.recovery.step_snapshot import StepSnapshot

if TYPE_CHECKING:
    from tinybp_lightning.runtime.torch import Session

__all__ = ["OwnedStep"]


class OwnedStep:
    """Runs `training_step` and `backward` of one fit, and runs a step again that ran out of memory.

    `step_log` is first among the Trainer's callbacks until `detach`.
    """

    def __init__(self, strategy: Any, session: "Session", trainer: Any, step_log: Any) -> None:
        self._strategy, self._session, self._trainer, self._step_log = strategy, session, trainer, step_log
        self._targets = lambda: session.targets
        module: nn.Module = strategy.lightning_module
        # torchmetrics need not be installed.
        self._metrics = [m for m in module.modules() if hasattr(m, "metric_state")]
        self._retry = OomRetry(StepSnapshot(module), self._targets, self._note_metrics)
        self._forward_again: Callable[[], Any] | None = None
        self._returned: list[weakref.ref[torch.Tensor]] = []
        trainer.callbacks.insert(0, step_log)

    def detach(self) -> None:
        """Take the step log out of the Trainer, and the module out of its budget."""
        if self._step_log in self._trainer.callbacks:
            self._trainer.callbacks.remove(self._step_log)
        self._session.detach()

    def _why_not(self) -> str | None:
        if not self._strategy.lightning_module.automatic_optimization:
            return "manual optimization steps the optimizer inside `training_step`, which cannot be run again."
        if self._strategy.model is not self._strategy.lightning_module:
            return f"`{type(self._strategy.model).__name__}` synchronises backward, which cannot be run again."
        return why_not_rerun(self._session.config)

    def training_step(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `run(*args, **kwargs)` returns, the strategy's own `training_step`."""
        self._forward_again = None
        if (reason := self._why_not()) is not None:
            with explaining(self._targets, reason):
                return run(*args, **kwargs)
        untouched = fresh_containers((args, kwargs))

        def again() -> Any:
            args, kwargs = fresh_containers(untouched)
            return run(*args, **kwargs)

        self._retry.begin((args, kwargs))
        output = self._retry.run(lambda: run(*args, **kwargs), again)
        self._forward_again = again
        self._returned = [weakref.ref(t) for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        return output

    def backward(self, run: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what `run(loss, *args, **kwargs)` returns, the strategy's own `backward`."""
        forward, self._forward_again = self._forward_again, None
        if forward is None:
            with explaining(self._targets, self._why_not() or "the step has already run a backward."):
                return run(loss, *args, **kwargs)

        def again() -> Any:
            new_loss = self._loss_of(forward)
            self._retry.backward_begins()
            return run(new_loss, *args, **kwargs)

        self._retry.backward_begins()
        result = self._retry.run(lambda: run(loss, *args, **kwargs), again, lambda: self._let_go(loss))
        self._retry.end()
        return result

    def _loss_of(self, forward: Callable[[], Any]) -> torch.Tensor:
        """Run `training_step` once more and divide its loss, both as Lightning's loop does."""
        module = self._strategy.lightning_module
        hook, module._current_fx_name = module._current_fx_name, "training_step"
        try:
            output = forward()
        finally:
            module._current_fx_name = hook
        loss = output if isinstance(output, torch.Tensor) else output["loss"]
        return loss / self._trainer.accumulate_grad_batches

    def _let_go(self, loss: torch.Tensor) -> None:
        """Free the failed run's graph: the loop still holds its loss and what `training_step` returned."""
        for t in (loss, *(r() for r in self._returned)):
            if t is not None and t.grad_fn is not None and not t._is_view():  # a view cannot be detached in place
                t.detach_()

    def _note_metrics(self) -> Callable[[], None]:
        """Note the states of metrics and of the values logged so far; return the function that puts them back."""
        logged: dict[str, Any] | None = self._trainer._results
        entries = dict(logged or {})
        noted = [(m, dict(vars(m)), _copied(m.metric_state)) for m in (*self._metrics, *entries.values())]

        def put_back() -> None:
            for metric, attributes, states in noted:
                vars(metric).clear()
                vars(metric).update(attributes, **_copied(states))  # copied again: there may be a third run
            if logged is not None:
                logged.clear()
                logged.update(entries)

        return put_back


def _copied(states: Any) -> dict[str, Any]:
    """Copy the states of a metric (tensors, or lists of tensors), as an update may write into them."""
    return {name: s.detach().clone() if isinstance(s, torch.Tensor) else copy.copy(s) for name, s in states.items()}
