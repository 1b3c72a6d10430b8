"""Log a step's peak and recompute share to the progress bar and the logger.

A callback, first in the Trainer's list, logs in `on_train_batch_end`: that hook runs for automatic and manual
optimisation alike, before the bars read their metrics. `LightningModule.log` respects `log_every_n_steps`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinybp_lightning.runtime.profile import PlanReport, StepProfile

__all__ = ["StepLogMixin", "summarise"]


def summarise(profiles: Sequence["StepProfile"]) -> dict[str, float]:
    """Return the values to log for the `profiles` of one batch: the highest peak, and the share of time in replays.

    A peak that was not measured is the one that the plan predicts.
    """
    peaks_bytes = ((p.measured_peak_bytes, p.predicted_peak_bytes) for p in profiles)
    peak_bytes = max(predicted if measured is None else measured for measured, predicted in peaks_bytes)
    step_s, replay_s = sum(p.step_s for p in profiles), sum(p.replay_s for p in profiles)
    return {"hcb/peak_mib": peak_bytes / 2**20, "hcb/recompute_share": replay_s / step_s if step_s else 0.0}


class StepLogMixin:
    """Logs `hcb/peak_mib` and `hcb/recompute_share`: an observer and, with the namespace's `Callback`, a callback."""

    def __init__(self) -> None:
        super().__init__()
        self._profiles: list[StepProfile] = []

    def on_plan(self, plan: "PlanReport") -> None:
        """Do nothing: only finished steps are logged."""

    def on_replay(self, profile: "StepProfile") -> None:
        """Keep the profile until the batch ends."""
        self._profiles.append(profile)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the batch's summary, if the batch has a profile."""
        del outputs, batch, batch_idx
        profiles, self._profiles = self._profiles, []
        # A barebones Trainer has neither a bar nor a logger, and warns at every `log`.
        if not profiles or trainer.barebones:
            return
        # Without `batch_size`, Lightning would guess one and cache it for the user's metrics. It warns of `logger=True`
        # where there is no logger.
        values, has_logger = summarise(profiles), trainer.logger is not None
        pl_module.log_dict(values, prog_bar=True, logger=has_logger, on_step=True, on_epoch=False, batch_size=1)
