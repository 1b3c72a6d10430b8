"""Which of Lightning's training steps are ours to run again when memory runs out, and how are they run again?

In automatic optimization on one device a strategy is handed `training_step` and `backward`, so a failed backward can be
preceded by its forward once more. What the loop does between and after them (divide the loss, zero gradients, count)
has happened once and stays. Manual optimization steps the optimizer inside `training_step`, and a strategy over several
devices synchronises: their errors pass, with our numbers as a note.

Private parts of Lightning 2.6 used: `LightningModule._current_fx_name` (which hook may log), `Trainer._results`.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tinybp_lightning.integrations._metrics import metrics_in, note_metrics
from tinybp_lightning.runtime.torch.recovery.oom import OomRetry, explaining, fresh_containers, why_not_rerun
from tinybp_lightning.runtime.torch.recovery.step_snapshot import StepSnapshot

if TYPE_CHECKING:
    from tinybp_lightning.runtime.torch import Session

__all__ = ["OwnedStep"]


class OwnedStep:
    """Runs `training_step` and `backward` of one fit, and runs a step again that was out of memory."""

    def __init__(self, strategy: Any, session: "Session", trainer: Any) -> None:
        self._strategy = strategy
        self._session = session
        self._trainer = trainer
        module: nn.Module = strategy.lightning_module
        self._metrics = metrics_in(module)
        self._rescue = OomRetry(StepSnapshot(module), lambda: session.targets, self._note_metrics)
        self._forward_again: Callable[[], Any] | None = None
        self._returned: list[weakref.ref[torch.Tensor]] = []

    def _note_metrics(self) -> Callable[[], None]:
        return note_metrics(self._metrics, self._trainer._results)

    def _why_not(self) -> str | None:
        if not self._strategy.lightning_module.automatic_optimization:
            return "manual optimization steps the optimizer inside `training_step`, which is never run again."
        if self._strategy.model is not self._strategy.lightning_module:
            return f"`{type(self._strategy.model).__name__}` synchronises backward, which cannot be run again."
        return why_not_rerun(self._session.config)

    def training_step(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `run(*args, **kwargs)` returns: the strategy's own `training_step`."""
        self._forward_again = None
        reason = self._why_not()
        if reason is not None:
            with explaining(lambda: self._session.targets, reason):
                return run(*args, **kwargs)
        untouched = fresh_containers((args, kwargs))

        def again() -> Any:
            args, kwargs = fresh_containers(untouched)
            return run(*args, **kwargs)

        self._rescue.begin((args, kwargs))
        output = self._rescue.run(lambda: run(*args, **kwargs), again)
        self._forward_again = again
        self._returned = [weakref.ref(t) for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        return output

    def backward(self, run: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what `run(loss, *args, **kwargs)` returns: the strategy's own `backward`."""
        forward, self._forward_again = self._forward_again, None
        if forward is None:
            with explaining(lambda: self._session.targets, self._why_not() or "the step has had a backward already."):
                return run(loss, *args, **kwargs)

        def again() -> Any:
            new_loss = self._loss_of(forward)
            self._rescue.backward_begins()
            return run(new_loss, *args, **kwargs)

        self._rescue.backward_begins()
        result = self._rescue.run(lambda: run(loss, *args, **kwargs), again, lambda: self._let_go(loss))
        self._rescue.end()
        return result

    def _loss_of(self, forward: Callable[[], Any]) -> torch.Tensor:
        """Run `training_step` once more, as the loop does, and divide its loss as the loop does."""
        module = self._strategy.lightning_module
        hook, module._current_fx_name = module._current_fx_name, "training_step"
        try:
            output = forward()
        finally:
            module._current_fx_name = hook
        loss = output if isinstance(output, torch.Tensor) else output["loss"]
        return loss / self._trainer.accumulate_grad_batches

    def _let_go(self, loss: torch.Tensor) -> None:
        """Free the failed run's graph, which the loop still holds by its loss and by what `training_step` returned."""
        _detach([loss, *(t for r in self._returned if (t := r()) is not None)])


def _detach(tensors: Iterable[torch.Tensor]) -> None:
    for t in tensors:
        if t.grad_fn is not None and not t._is_view():  # a view cannot be detached in place
            t.detach_()
