"""Convert a comparison's activation budget to bytes, or to a share of plain training's peak."""

import math

from tinybp_lightning.config import BudgetKind, parse_budget
from tinybp_lightning.errors import BudgetError

__all__ = ["budget_bytes", "budget_share"]


def budget_bytes(budget: str, *, naive_peak_bytes: int) -> int:
    """Return the bytes that `budget` allows, given the activation peak of plain training.

    **Raises:** `BudgetError` when `budget` is neither a share such as `"30%"` nor bytes such as `"2GiB"`.
    """
    parsed = parse_budget(budget, BudgetKind.ACTIVATION)
    if parsed.fraction is not None:
        return math.floor(naive_peak_bytes * parsed.fraction)
    assert parsed.size_bytes is not None
    return parsed.size_bytes


def budget_share(budget: str, *, naive_peak_bytes: int) -> float:
    """Return `budget` as a share of plain training's activation peak, at most 1.

    **Raises:** `BudgetError` when `budget` cannot be read, or is in bytes and the peak is unknown (0).
    """
    parsed = parse_budget(budget, BudgetKind.ACTIVATION)
    if parsed.fraction is not None:
        return parsed.fraction
    if naive_peak_bytes <= 0:
        raise BudgetError(f"`budget={budget}` needs plain training's peak to become a share: run `naive` first.")
    assert parsed.size_bytes is not None
    return min(1.0, parsed.size_bytes / naive_peak_bytes)
