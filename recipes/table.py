"""Compare the modes with plain training, in rows and in a Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.budget import budget_bytes
from recipes.config import CompareConfig
from recipes.markdown import markdown_rows
from recipes.measurement import Measurement
from recipes.modes import Mode
from recipes.outcome import Failed, Finished, Outcome

__all__ = ["Row", "Sameness", "comparison_rows", "markdown_report", "naive_of"]

MEBIBYTE = 2**20
HEADER = (
    "mode",
    "loss",
    "ms a step",
    "× naive",
    "activation peak, MiB",
    "× naive",
    "predicted, MiB",
    "with gradients, MiB",
    "losses = naive",
    "gradients = naive",
    "parameters = naive",
    "buffers = naive",
)


@dataclass(frozen=True, slots=True)
class Sameness:
    """Whether a mode computed the bits of plain training; `largest_loss_gap` is the largest difference of a loss."""

    has_same_losses: bool
    has_same_gradients: bool
    has_same_parameters: bool
    has_same_buffers: bool
    largest_loss_gap: float


@dataclass(frozen=True, slots=True)
class Row:
    """One mode that trained. Ratios and `sameness` refer to plain training; they are `None` if that failed."""

    mode: Mode
    loss: float
    wall_s: float
    wall_ratio: float | None
    activation_peak_bytes: int
    activation_ratio: float | None
    predicted_peak_bytes: int | None
    peak_bytes: int
    sameness: Sameness | None


def naive_of(outcomes: Sequence[Outcome]) -> Measurement | None:
    """Return the measurement of plain training among `outcomes`, or `None` when it failed or did not run."""
    found = (o.measurement for o in outcomes if isinstance(o, Finished) and o.mode is Mode.naive)
    return next(found, None)


def comparison_rows(outcomes: Sequence[Outcome]) -> tuple[Row | Failed, ...]:
    """Return one row for each finished outcome, in order, and the failed ones unchanged."""
    naive = naive_of(outcomes)
    return tuple(outcome if isinstance(outcome, Failed) else _row(outcome, naive) for outcome in outcomes)


def _row(outcome: Finished, naive: Measurement | None) -> Row:
    measured = outcome.measurement
    return Row(
        mode=outcome.mode,
        loss=measured.losses[-1],
        wall_s=measured.wall_s,
        wall_ratio=None if naive is None else measured.wall_s / naive.wall_s,
        activation_peak_bytes=measured.activation_peak_bytes,
        activation_ratio=None if naive is None else measured.activation_peak_bytes / naive.activation_peak_bytes,
        predicted_peak_bytes=None if outcome.prediction is None else outcome.prediction.peak_bytes,
        peak_bytes=measured.peak_bytes,
        sameness=None if naive is None else _sameness(measured, naive),
    )


def _sameness(measured: Measurement, naive: Measurement) -> Sameness:
    gaps = [abs(ours - theirs) for ours, theirs in zip(measured.losses, naive.losses, strict=True)]
    return Sameness(
        has_same_losses=measured.losses == naive.losses,
        has_same_gradients=measured.gradients_sha256 == naive.gradients_sha256,
        has_same_parameters=measured.parameters_sha256 == naive.parameters_sha256,
        has_same_buffers=measured.buffers_sha256 == naive.buffers_sha256,
        largest_loss_gap=max(gaps),
    )


def markdown_report(config: CompareConfig, outcomes: Sequence[Outcome]) -> str:
    """Return the table of `outcomes` as Markdown, with notes on how to read it."""
    rows = [_cells(row) for row in comparison_rows(outcomes)]
    alignment = ["---", *["---:"] * 7, *[":---:"] * 4]
    table = markdown_rows(HEADER, alignment, rows)
    return f"# {_title(config, outcomes)}\n\n{table}\n\n{_notes(config, outcomes)}\n"


def _title(config: CompareConfig, outcomes: Sequence[Outcome]) -> str:
    sources = (outcome.source for outcome in outcomes if isinstance(outcome, Finished))
    return f"{next(sources, config.model.name.value)}, size {config.size.name}, budget {config.budget}"


def _notes(config: CompareConfig, outcomes: Sequence[Outcome]) -> str:
    method = (
        f"{config.size.steps} optimizer steps, of which {config.size.warmup_steps} are not timed; seed {config.seed}. "
        "A step is a forward and a backward; its time is the median. Peaks are bytes above what was alive before the "
        "step; the activation peak leaves out the parameters' gradients. Losses, gradients, parameters and buffers are "
        "compared bit for bit; a number is the largest difference of a loss."
    )
    notes = [method]
    naive = naive_of(outcomes)
    if naive is not None:
        allowed_mib = budget_bytes(config.budget, naive_peak_bytes=naive.activation_peak_bytes) / MEBIBYTE
        versions = f"torch {naive.versions.torch}, Python {naive.versions.python}"
        notes.append(f"Budget: {allowed_mib:.1f} MiB of activations. {naive.device}; {versions}.")
    return "\n\n".join(notes)


def _cells(row: Row | Failed) -> list[str]:
    match row:
        case Failed():
            error = row.error.replace("|", "\\|")
            return [row.mode.value, f"failed: {error}", *[""] * (len(HEADER) - 2)]
        case Row():
            return [
                row.mode.value,
                f"{row.loss:.6f}",
                f"{row.wall_s * 1e3:.1f}",
                _ratio(row.wall_ratio),
                _mebibytes(row.activation_peak_bytes),
                _ratio(row.activation_ratio),
                _mebibytes(row.predicted_peak_bytes),
                _mebibytes(row.peak_bytes),
                *_sameness_cells(row.sameness),
            ]


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _mebibytes(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / MEBIBYTE:.2f}"


def _sameness_cells(sameness: Sameness | None) -> list[str]:
    if sameness is None:
        return [""] * 4
    states = (sameness.has_same_gradients, sameness.has_same_parameters, sameness.has_same_buffers)
    losses = "yes" if sameness.has_same_losses else f"{sameness.largest_loss_gap:.1e}"
    return [losses, *("yes" if is_same else "no" for is_same in states)]
