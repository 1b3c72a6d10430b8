"""Run a step that has run out of device memory again, under a tighter plan, with nothing lost.

Only a step whose bounds are known can be run again: `run_step` here, and Lightning's automatic optimization. A
synchronised backward cannot, because the other ranks wait inside a collective for gradients of the first run.

Note [Letting go]
    An exception's traceback holds the frames that it passed, and these hold the failed step's graph. So the error is
    kept without its frames' contents, and the second run begins outside of the `except` block. The autograd engine
    holds the graph too: a backward that fails leaves the nodes it did not reach in its thread's queue, and removes them
    only when it comes to them. The queue is in the order of creation, newest first, so a backward through a node that
    is older than the step removes them all (torch 2.13, `engine.cpp`: `CompareNodeTaskTime`, `thread_main`).

Note [How much tighter]
    A little at first, because a smaller plan costs time in every later step; more each time the same step fails again;
    then the smallest plan. A step that fails under the smallest plan at once is run again as it is, once, because the
    allocator can give back whole segments now. The first error is the one that is raised in the end.
"""

import contextlib
import copy
import gc
import traceback
import warnings
from collections.abc import Callable, Generator, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from tinybp_lightning.analysis import format_bytes
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.errors import ConfigError, HCBWarning
from tinybp_lightning.runtime.torch.api import targets
from tinybp_lightning.runtime.torch.dispatcher import Dispatcher, Target, dispatcher_of
from tinybp_lightning.runtime.torch.recovery.step_snapshot import StepSnapshot
from tinybp_lightning.runtime.torch.refuse import refuse_other_than_module

__all__ = ["OomRetry", "explaining", "fresh_containers", "run_step", "why_not_rerun"]

T = TypeVar("T")
# See Note [How much tighter].
_SHARES = (0.05, 0.15, 0.35, 1.0)


class OomRetry:
    """Runs the steps of one model, and runs a step again if it was out of memory.

    **Arguments:** `targets`: returns what trains under a plan; `keep`: called as a step begins, notes what else the
    step changes, and returns a function that restores it.
    """

    def __init__(
        self,
        step_snapshot: StepSnapshot,
        targets: Callable[[], Sequence[Target]],
        keep: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        self._step_snapshot = step_snapshot
        self._targets = targets
        self._keep = keep
        self._restore: Callable[[], None] | None = None
        self._error: torch.OutOfMemoryError | None = None
        self._num_failures = 0
        with torch.enable_grad():
            self._leaf = torch.zeros((), requires_grad=True)
            self._older_than_any_step = self._leaf * 1

    def begin(self, inputs: Sequence[Any]) -> None:
        """Begin a step that will read `inputs` in every run of it."""
        self._error, self._num_failures = None, 0
        self._step_snapshot.begin(inputs)
        self._restore = None if self._keep is None else self._keep()

    def backward_begins(self) -> None:
        """Note, in every run, that the forward has ended."""
        self._step_snapshot.backward_begins()

    def end(self) -> None:
        """End a step that went well."""
        self._error, self._restore = None, None
        self._step_snapshot.end()

    def run(self, first: Callable[[], T], again: Callable[[], T], let_go: Callable[[], None] | None = None) -> T:
        """Return what `first` returns, or `again`, which runs the whole step up to the end of `first`.

        `let_go` drops what the caller holds of the failed run. Raises the step's first `torch.OutOfMemoryError`, with
        our numbers as a note, when nothing more helps.
        """
        attempt = first
        try:
            while True:
                try:
                    return attempt()
                except torch.OutOfMemoryError as error:
                    _clear_frames(error)  # See Note [Letting go]
                    self._error = self._error or error
                if let_go is not None:
                    let_go()
                self._prepare()
                attempt = again
        except BaseException:
            self._error, self._restore = None, None
            self._step_snapshot.abandon()
            raise

    def _prepare(self) -> None:
        """Free memory, tighten the plans and rewind the step, or raise the first error."""
        assert self._error is not None
        self._num_failures += 1
        torch.autograd.grad(self._older_than_any_step, self._leaf, retain_graph=True)  # See Note [Letting go]
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        reason = self._step_snapshot.obstacle()
        if reason is None and not self._tighten():
            reason = f"it was run {self._num_failures} times, the last time under the smallest plan"
        if reason is not None:
            self._error.add_note(_note(self._targets(), f"the step cannot be saved: {reason}."))
            raise self._error
        self._step_snapshot.rewind()
        if self._restore is not None:
            self._restore()

    def _tighten(self) -> bool:
        """Tighten the targets' plans; return whether another run may fit. See Note [How much tighter]."""
        share = _SHARES[min(self._num_failures, len(_SHARES)) - 1]
        before = [(t, t.active_plan) for t in self._targets()]
        changed = [(t, old) for t, old in before if t.tighten(share)]
        for t, old in changed:
            new = t.active_plan
            if old is not None and new is not None:
                warnings.warn(
                    f"`{t.name}` ran out of device memory. The step is run again, with nothing lost, under a plan of "
                    f"{format_bytes(new.predicted_peak_bytes)} (before: {format_bytes(old.predicted_peak_bytes)}), "
                    'which stays in force. Lower the budget to avoid this, or say `on_oom="raise"`.',
                    HCBWarning,
                    stacklevel=2,
                )
        return bool(changed) or self._num_failures == 1


def run_step(
    model: nn.Module,
    compute_loss: Callable[..., torch.Tensor],
    *inputs: Any,
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
) -> torch.Tensor:
    """Run `compute_loss(*inputs)` and its backward; if memory runs out, tighten the plan and run both again.

    **Arguments:** `model`: it, or a part of it, is under `tbp.hcb`. `inputs` must not be changed in place. `backward`:
    called with the loss, such as `lambda loss: scaler.scale(loss).backward()`. Python side effects of both functions
    happen once for each run.

    **Returns:** the loss, detached. Gradients, buffers and random generators are as after one uninterrupted step, bit
    for bit, even if there were gradients before.

    **Raises:** `ConfigError` if nothing in `model` is under `tbp.hcb`, or a function is not one or returns no loss;
    `UnsupportedModuleError` if `model` is not a module; `torch.OutOfMemoryError` if the smallest plan fails too, or the
    step cannot be run again (the note says why).
    """
    dispatcher = _dispatcher_in(model)
    for name, function in (("compute_loss", compute_loss), ("backward", backward)):
        if not callable(function) or isinstance(function, type):
            raise ConfigError(
                f"`{name}={function!r}` is not a function: pass one that takes "
                f"{'the inputs and returns the loss' if name == 'compute_loss' else 'the loss and runs its backward'}."
            )

    def attempt(inputs: Sequence[Any], begins: Callable[[], None]) -> torch.Tensor:
        loss = compute_loss(*inputs)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise ConfigError(
                f"`compute_loss` returned `{type(loss).__name__}`, but `run_step` calls its backward: return the loss, "
                "a tensor that requires grad."
            )
        begins()
        backward(loss)
        return loss.detach()

    if (reason := why_not_rerun(dispatcher.config)) is not None:
        with explaining(lambda: targets(model), reason):
            return attempt(inputs, lambda: None)
    if dispatcher.step_snapshot is None or dispatcher.step_snapshot.root is not model:
        dispatcher.step_snapshot = StepSnapshot(model)
    retry = OomRetry(dispatcher.step_snapshot, lambda: targets(model))
    untouched = fresh_containers(inputs)
    retry.begin(inputs)
    loss = retry.run(
        lambda: attempt(inputs, retry.backward_begins),
        lambda: attempt(fresh_containers(untouched), retry.backward_begins),
    )
    retry.end()
    return loss


def why_not_rerun(config: HCBConfig) -> str | None:
    """Return why no step may be run again here, as a sentence; `None` if it may."""
    if config.on_oom == "raise":
        return '`on_oom="raise"` was asked for; `on_oom="replan"` runs the step again under a tighter plan.'
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and (num_ranks := torch.distributed.get_world_size()) > 1:
        return (
            f"backward is synchronised over {num_ranks} ranks, so one of them cannot run its step again. "
            "Start anew from the last checkpoint with a lower budget or a smaller batch."
        )
    return None


@contextlib.contextmanager
def explaining(targets: Callable[[], Sequence[Target]], reason: str) -> Generator[None]:
    """Let an `OutOfMemoryError` of the body pass, with `reason` and our numbers as a note."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(_note(targets(), reason))
        raise


def fresh_containers(inputs: Any) -> Any:
    """Return the same values in new containers, so that a step that pops a key from its batch can be run again."""

    def renew(leaf: Any) -> Any:
        mapping: Any = leaf  # a library's own kind of dictionary is a leaf to pytree
        return copy.copy(mapping) if isinstance(leaf, MutableMapping) else leaf

    return tree_map(renew, inputs)


def _dispatcher_in(model: nn.Module) -> Dispatcher:
    refuse_other_than_module(model)
    for m in model.modules():
        if (dispatcher := dispatcher_of(m)) is not None:
            return dispatcher
    raise ConfigError(
        f"`{type(model).__name__}` is not under height-compressed backpropagation, and no part of it is: "
        "call `tbp.hcb(model, ...)` first."
    )


def _clear_frames(error: BaseException) -> None:
    """Empty the frames that `error`, and what caused it, has passed. See Note [Letting go]."""
    found: list[BaseException] = [error]
    for e in found:  # which grows
        traceback.clear_frames(e.__traceback__)
        found += [c for c in (e.__cause__, e.__context__) if c is not None and c not in found]


def _note(found: Sequence[Target], reason: str) -> str:
    lines = [f"tinybp_lightning: {reason}"]
    for target in found:
        plan = target.active_plan
        if plan is None:
            lines.append(f"`{target.name}` has no plan yet: memory ran out while its blocks were run or measured.")
        else:
            lines.append(
                f"`{target.name}` ran the plan `{plan.reason}`: {format_bytes(plan.predicted_peak_bytes)} above what "
                f"was there when the step began, of {format_bytes(plan.budget_bytes)} (plain training: "
                f"{format_bytes(plan.plain_peak_bytes)}; smallest plan: {format_bytes(target.smallest_bytes)})."
            )
    return "\n".join(lines)
