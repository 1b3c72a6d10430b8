"""What does a measured step teach about a chain? The code after the last block, and what the model does not see."""

from dataclasses import replace

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMeasurement
from tinybp_lightning.schedule.actions import Schedule
from tinybp_lightning.schedule.simulator import simulate

__all__ = ["with_residual", "with_tail"]


def with_tail(chain: Chain, schedule: Schedule, measured: StepMeasurement) -> Chain:
    """Return `chain` with the tail that was `measured` while `schedule` was flown."""
    timeline = simulate(chain, schedule)
    chain = _without_gradients(chain, timeline.tail.after_bytes - measured.backward_start_bytes)
    timeline = simulate(chain, schedule)
    live = max(0, measured.backward_start_bytes - timeline.tail.after_bytes)
    peak = max(0, measured.tail_peak_bytes - measured.forward_end_bytes)
    return replace(chain, tail_peak_bytes=max(peak, live), tail_live_bytes=live)


def _without_gradients(chain: Chain, missing_bytes: int) -> Chain:
    """The caller's code did not make as many gradients for what the last block returns as was presumed."""
    *others, last = chain.boundaries
    gradient_bytes = last.gradient_bytes - min(max(0, missing_bytes), last.gradient_bytes)
    return replace(chain, boundaries=(*others, replace(last, gradient_bytes=gradient_bytes)))


def with_residual(chain: Chain, schedule: Schedule, *, peak_bytes: int, may_shrink: bool) -> Chain:
    """Return `chain` with a workspace by which the prediction for `schedule` is the `peak_bytes` that were measured.

    **Arguments:** `may_shrink`: whether a smaller one is learned as well.
    """
    residual = peak_bytes - simulate(chain, schedule).peak_bytes
    if residual <= 0 and not may_shrink:
        return chain
    return replace(chain, workspace_bytes=max(0, chain.workspace_bytes + residual))
