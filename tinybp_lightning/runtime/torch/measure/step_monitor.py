"""When does a training step begin and end, and what did it need? One `StepMonitor` per forward.

The forward's begin and end are ours to see; backward's begin is a pre-hook on the node that made the first output, its
end a callback of the autograd engine. A *traced* watch also reads the allocator (`capture.torch.allocator`).

Note [Stopping a trace]
    A profiler must not be stopped inside a backward callback: the engine puts the thread's state back afterwards, and
    the dead profiler with it. So the callback only marks the end; the trace is closed at the next moment outside
    backward that we hear of: an optimizer step, the next forward, or a look at the profile.
"""

import atexit
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from tinybp_lightning.capture.torch.private import queue_callback
from tinybp_lightning.config import Budget, BudgetKind
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.profile import StepMeasurement
from tinybp_lightning.runtime.torch.measure.allocator import (
    AllocatorTrace,
    LostTraceError,
    Segment,
    can_trace,
    open_trace,
    tracing_lock,
)

__all__ = ["StepMonitor", "settle_pending", "stop_listening", "stop_tracing"]


class StepMonitor:
    """Follows one forward and the first backward through it; traces it if wanted, unless something else traces.

    `is_disturbed`: another target's step began before this one's ended, so what was measured belongs to both.
    `is_lost`: it was traced, and someone else's profiler took what was recorded away: the next step can be measured.
    """

    num_started = 0

    def __init__(
        self, device: torch.device, parameters: Sequence[torch.Tensor], budget: Budget, *, wants_trace: bool
    ) -> None:
        self.thread = threading.current_thread()
        self._started = time.perf_counter()
        self._forward_s = 0.0
        self._backward_started = 0.0
        self._counts_gradients = budget.kind is BudgetKind.MEMORY
        self._without_grad = [p for p in parameters if p.grad is None and p.requires_grad]
        StepMonitor.num_started += 1
        self._number = StepMonitor.num_started
        self._num_others = 0
        if wants_trace:
            _untrace_ended_threads()
        with tracing_lock() as is_mine:
            # Not where another thread had the turn: it may take it again between the question and the trace.
            may_trace = wants_trace and is_mine and can_trace(device)
            self._trace: AllocatorTrace | None = open_trace(device) if may_trace else None
        if self._trace is not None:
            atexit.unregister(stop_tracing)
            atexit.register(stop_tracing)  # a profiler left on crashes the process when it ends
            _TRACING.append(self)
        self._on_end: Callable[[StepMonitor], None] | None = None
        self.measured: StepMeasurement | None = None
        self.step_s = 0.0
        self.ended = False
        self.is_lost = False
        self._mark("forward")

    def _mark(self, label: str) -> None:
        if self._trace is not None:
            self._trace.mark(label)

    def forward_ended(self, outputs: Sequence[Any], on_end: Callable[["StepMonitor"], None]) -> None:
        """Note the end of the forward and wait for backward; `on_end(self)` is called once backward has ended."""
        self._forward_s = time.perf_counter() - self._started
        self._on_end = on_end
        self._mark("tail")
        for t in outputs:
            if isinstance(t, torch.Tensor) and t.grad_fn is not None:
                t.grad_fn.register_prehook(self._backward_begins)

    def _backward_begins(self, _: Any) -> None:
        if self._backward_started or self.ended:
            return
        self._backward_started = time.perf_counter()
        self._mark("backward")
        queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self.step_s = self._forward_s + time.perf_counter() - self._backward_started
        self._num_others = StepMonitor.num_started - self._number
        if self._trace is None:
            self._tell()
            return
        self._mark("after")
        if not self._counts_gradients:
            self._trace.leave_out([p.grad for p in self._without_grad if p.grad is not None])
        self._without_grad = []
        _PENDING.append(self)  # See Note [Stopping a trace]
        _listen()

    @property
    def is_disturbed(self) -> bool:
        """See the class."""
        return self._num_others > 0

    def settle(self) -> None:
        """Close the trace of a step whose backward has ended, and tell `on_end`."""
        trace, self._trace = self._trace, None
        if self in _TRACING:
            _TRACING.remove(self)
        if trace is not None:
            try:
                self.measured = _measured(trace.close())
            except LostTraceError as error:
                self.is_lost = True
                warnings.warn(
                    f"A step could not be measured: {error}; did a memory profiler start or stop within it? The next "
                    "step is measured instead.",
                    HCBWarning,
                    stacklevel=2,
                )
        self._tell()

    def _tell(self) -> None:
        self.ended = True
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self)

    def untrace(self) -> None:
        """Go on to follow the step, but measure nothing."""
        trace, self._trace = self._trace, None
        if self in _TRACING:
            _TRACING.remove(self)
        if trace is not None:
            trace.abandon()

    def abandon(self) -> None:
        """The step will not end (no backward, or an exception): let go of everything, measure nothing.

        Harmless where the step has ended.
        """
        if self.ended:
            return
        self._on_end = None
        if self.thread is not threading.current_thread():
            return  # the thread that opened the trace closes it, for nobody
        self.untrace()
        self.ended = True
        if self in _PENDING:
            _PENDING.remove(self)


def _measured(segments: Sequence[Segment]) -> StepMeasurement:
    parts: dict[str, Segment] = {}
    for s in segments:
        parts.setdefault(s.label, s)
    tail, back = parts["tail"], parts["backward"]
    peak = max(parts[label].peak_bytes for label in ("forward", "tail", "backward"))
    return StepMeasurement(peak, tail.start_bytes, tail.peak_bytes, back.start_bytes)


_PENDING: list[StepMonitor] = []
_TRACING: list[StepMonitor] = []
_HANDLES: list[RemovableHandle] = []


def settle_pending() -> None:
    """Close this thread's traces of steps whose backward has ended. Called outside backward only."""
    while _HANDLES:
        _HANDLES.pop().remove()
    _settle_all()


def _settle_all() -> None:
    for watch in _mine(_PENDING):
        _PENDING.remove(watch)
        watch.settle()


def stop_tracing() -> None:
    """Give up this thread's traces, and those of threads that have ended: there is one profiler.

    Called where another target must be measured now, and when the process ends.
    """
    settle_pending()
    for watch in _mine(_TRACING):
        watch.untrace()
    _untrace_ended_threads()


def _untrace_ended_threads() -> None:
    """Stop what threads left on that have ended: nobody else would, and nobody can read it any more.

    Before this thread opens a trace of its own, which stopping the other would stop too.
    """
    with tracing_lock() as is_mine:
        for watch in [w for w in _TRACING if is_mine and not w.thread.is_alive()]:
            watch.untrace()
            if watch in _PENDING:
                _PENDING.remove(watch)


def stop_listening() -> None:
    """Take the hooks away if nothing waits for an optimizer's step."""
    while _HANDLES and not _PENDING:
        _HANDLES.pop().remove()


def _mine(watches: Sequence[StepMonitor]) -> list[StepMonitor]:
    """Those of this thread, the newest first: a profiler is stopped by the thread that started it."""
    return [w for w in reversed(watches) if w.thread is threading.current_thread()]


def _listen() -> None:
    """Hear of the next optimizer step; with a closure, forward and backward run inside it, so its end counts too."""
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_pre_hook(_on_optimizer))
        _HANDLES.append(register_optimizer_step_post_hook(_on_optimizer))


def _on_optimizer(*_: Any) -> None:
    _settle_all()  # the hooks stay for now: the optimizer goes through them at this moment
