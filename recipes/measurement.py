"""Define the records that `recipes.measure` makes. To import them does not load torch."""

from dataclasses import dataclass

from recipes.timeline import Timeline

__all__ = ["Measurement", "Versions"]


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of the packages that computed a result; empty for a package that is not installed."""

    python: str
    torch: str
    transformers: str
    diffusers: str
    torchvision: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """One mode's training run.

    `losses` are those of every optimizer step and of the profiled step after them. `wall_s` is the median of the timed
    steps, `first_step_s` the time of the first (compilation and planning included). Peaks are bytes above what was
    alive before the step: `activation_peak_bytes` without the parameters' gradients, `peak_bytes` with them.
    `residue_bytes` is what else is alive after the step. `reserved_peak_bytes` is the CUDA allocator's, for the whole
    process. `timeline` shows the activations of the profiled step, scaled to last `wall_s`.
    """

    losses: tuple[float, ...]
    wall_s: float
    step_walls_s: tuple[float, ...]
    first_step_s: float
    peak_bytes: int
    activation_peak_bytes: int
    residue_bytes: int
    reserved_peak_bytes: int | None
    timeline: Timeline
    gradients_sha256: str
    parameters_sha256: str
    buffers_sha256: str
    device: str
    versions: Versions
