"""Follow one training step from its forward to the end of its backward, and measure what it needs.

We run the forward, so we see it begin and end. A pre-hook on the nodes that made the outputs hears backward begin, and
a callback of the autograd engine hears it end. A *traced* monitor also reads the allocator (`measure.allocator`).

Note [Stopping a trace]
    A profiler must not be stopped inside a backward callback: the engine restores the thread's state afterwards, and
    the dead profiler with it. So the callback only marks the end. The trace is closed at the next moment outside
    backward that we hear of: an optimizer step, the next forward, or a look at the profile.
"""

import atexit
import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from tinybp_lightning.capture.torch.private import graph_task_id, keeps_graph, queue_callback
from tinybp_lightning.config import Budget, BudgetKind
from tinybp_lightning.errors import HCBWarning
from tinybp_lightning.runtime.profile import StepMeasurement
from tinybp_lightning.runtime.torch.measure.allocator import (
    AllocatorTrace,
    Interval,
    LostTraceError,
    can_trace,
    open_trace,
    tracing_lock,
)

__all__ = ["StepMonitor", "settle_pending", "stop_listening", "stop_tracing"]


_REPLAY = "replay "  # begins the label of an interval, before the call's number


class StepMonitor:
    """Follows one forward and the first backward through it; traces it if wanted, unless another trace is open.

    `measured`: what the trace showed. `is_disturbed`: another target's step began before this one's ended, so what was
    measured belongs to both. `is_lost`: other code destroyed the recording. `is_pending`: backward has ended, and the
    trace is still open.
    """

    def __init__(
        self, device: torch.device, parameters: Sequence[torch.Tensor], budget: Budget, *, wants_trace: bool
    ) -> None:
        self.thread = threading.current_thread()
        self.measured: StepMeasurement | None = None
        self.step_s = 0.0
        self.ended = self.is_pending = self.is_disturbed = self.is_lost = False
        self._started = time.perf_counter()
        self._forward_s = 0.0
        self._backward_started = 0.0
        self._keeps_graph = False
        self._on_end: Callable[[StepMonitor], None] | None = None
        self._counts_gradients = budget.kind is BudgetKind.MEMORY
        _MONITORS.num_started += 1
        self._number = _MONITORS.num_started
        self._parameters: list[torch.Tensor] = []  # whose gradients a trace tells from activations
        self._trace: AllocatorTrace | None = None
        if wants_trace:
            self._parameters = [p for p in parameters if p.is_leaf and p.requires_grad]
            # `zero_grad()` may come after the forward: gradients of earlier steps are then let go of within this one.
            self._trace = _MONITORS.trace_for(self, device, self._gradients() if self._counts_gradients else [])
        self._mark("forward")

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _mark(self, label: str) -> None:
        if self._trace is not None:
            self._trace.mark(label)

    @contextlib.contextmanager
    def apart(self) -> Generator[None]:
        """Leave out of the measured peak what the body, a part of the forward, needs only this once."""
        self._mark("apart")
        try:
            yield
        finally:
            self._mark("forward")

    @property
    def has_ended(self) -> bool:
        """Whether backward has ended, or the step was abandoned."""
        return self.ended or self.is_pending

    def goes_on(self) -> None:
        """Note that another forward begins that belongs to the same step."""
        self._mark("forward")

    def replay_begins(self, number: int) -> None:
        """Note that what the call `number` saved is made again, because its backward comes next."""
        if self._backward_started and not self.has_ended:
            self._mark(f"{_REPLAY}{number}")

    def give_up(self) -> None:
        """Go on to follow the step, but take its measurement for lost."""
        self.untrace()
        self.measured, self.is_lost = None, True

    def forward_ended(self, outputs: Sequence[Any], on_end: Callable[["StepMonitor"], None]) -> None:
        """Note the end of the forward; call `on_end(self)` once backward has ended."""
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
        self._keeps_graph = keeps_graph()
        self._mark("backward")
        queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self.step_s = self._forward_s + time.perf_counter() - self._backward_started
        self.is_disturbed = _MONITORS.num_started > self._number
        if self._trace is None:
            self._tell()
            return
        self._mark("after")
        if not self._counts_gradients:
            self._trace.leave_out(self._gradients())
        self._parameters.clear()
        self.is_pending = True  # See Note [Stopping a trace]
        _MONITORS.listen()

    def settle(self) -> None:
        """Close the trace of a step whose backward has ended, and tell `on_end`."""
        if (trace := self._take_trace()) is not None:
            try:
                self.measured = replace(_measured(trace.close()), keeps_graph=self._keeps_graph)
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
        if (trace := self._take_trace()) is not None:
            trace.abandon()

    def _take_trace(self) -> AllocatorTrace | None:
        trace, self._trace, self.is_pending = self._trace, None, False
        if self in _MONITORS.tracing:
            _MONITORS.tracing.remove(self)
        return trace

    def abandon(self) -> None:
        """Release everything and measure nothing: the step will not end. Harmless if it has ended."""
        if self.ended:
            return
        self._on_end = None
        if self.thread is threading.current_thread():  # otherwise the thread that opened the trace closes it
            self.untrace()
            self.ended = True


def _measured(intervals: Sequence[Interval]) -> StepMeasurement:
    parts = {i.label: i for i in intervals}
    tail = parts["tail"]
    replays: dict[int, int] = {}
    for i in intervals:
        if i.label.startswith(_REPLAY):
            number = int(i.label.removeprefix(_REPLAY))
            replays[number] = max(i.peak_bytes, replays.get(number, 0))
    own = [i.peak_bytes for i in intervals if i.label in ("forward", "tail", "backward")]
    return StepMeasurement(
        max([*own, *replays.values()]), tail.start_bytes, tail.peak_bytes, parts["backward"].start_bytes, replays
    )


class _StepMonitors:
    """The process's monitors with open traces, which each thread settles for itself: only it can stop its profiler."""

    def __init__(self) -> None:
        self.num_started = 0
        self.tracing: list[StepMonitor] = []
        self._handles: list[RemovableHandle] = []

    def trace_for(
        self, monitor: StepMonitor, device: torch.device, alive: Sequence[torch.Tensor]
    ) -> AllocatorTrace | None:
        """Return a trace that `monitor` reads, if one can be opened; see `open_trace` for `alive`."""
        if graph_task_id() != -1:
            return None  # See Note [Stopping a trace]
        with tracing_lock() as is_mine:
            if is_mine:
                self._untrace_ended_threads()  # stopping those later would stop this trace too
            if not (is_mine and can_trace(device)):
                return None
            trace = open_trace(device, alive=alive)
            self.tracing.append(monitor)
            atexit.unregister(self.stop_tracing)
            atexit.register(self.stop_tracing)  # a profiler left on crashes the process when it ends
            return trace

    def listen(self) -> None:
        """Hear the next optimizer step: its begin, and its end, as a closure runs forward and backward inside it."""
        if not self._handles:
            registers = (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
            self._handles += [register(self._settle_mine) for register in registers]

    def settle_pending(self) -> None:
        """Close this thread's traces of steps whose backward has ended. Call it outside of backward only."""
        self._remove_hooks()
        self._settle_mine()

    def stop_listening(self) -> None:
        """Remove the hooks if nothing waits for an optimizer's step."""
        if not any(m.is_pending for m in self.tracing):
            self._remove_hooks()

    def stop_tracing(self) -> None:
        """Give up this thread's traces, and those of threads that have ended, because there is one profiler."""
        self.settle_pending()
        for monitor in self._mine():
            monitor.untrace()
        with tracing_lock() as is_mine:
            if is_mine:
                self._untrace_ended_threads()

    def _settle_mine(self, *_: Any) -> None:
        # The hooks stay when an optimizer calls this: it goes through them at this moment.
        for monitor in self._mine():
            if monitor.is_pending:
                monitor.settle()

    def _mine(self) -> list[StepMonitor]:
        return [m for m in reversed(self.tracing) if m.thread is threading.current_thread()]

    def _untrace_ended_threads(self) -> None:
        """Stop, under the lock, the traces of threads that have ended: nobody can read them any more."""
        for monitor in [m for m in self.tracing if not m.thread.is_alive()]:
            monitor.untrace()

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()


_MONITORS = _StepMonitors()
settle_pending = _MONITORS.settle_pending
stop_listening = _MONITORS.stop_listening
stop_tracing = _MONITORS.stop_tracing
