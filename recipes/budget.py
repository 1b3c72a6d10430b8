"""What does a comparison's activation budget come to, in bytes and as a share of plain training?"""

import math
import re

from tinybp_lightning.errors import BudgetError

__all__ = ["budget_bytes", "budget_share"]

UNITS_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def budget_bytes(budget: str, *, naive_peak_bytes: int) -> int:
    """Return the bytes that `budget` allows, given the activation peak of plain training.

    **Raises:** `BudgetError` when `budget` is neither a share such as `"30%"` nor bytes such as `"2GiB"`.
    """
    parsed = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]iB|B)?\s*", budget)
    if parsed is None or float(parsed[1]) == 0.0:
        raise BudgetError(f"`budget={budget}` is not a budget: pass a share (`30%`) or bytes (`500MiB`, `2GiB`).")
    amount = float(parsed[1])
    if parsed[2] == "%":
        return math.floor(naive_peak_bytes * amount / 100.0)
    return math.floor(amount * UNITS_BYTES[parsed[2] or "B"])


def budget_share(budget: str, *, naive_peak_bytes: int) -> float:
    """Return `budget` as a share of plain training's activation peak, at most 1.

    **Raises:** `BudgetError` when `budget` is in bytes and the peak is not known (0).
    """
    if budget.strip().endswith("%"):
        return min(1.0, budget_bytes(budget, naive_peak_bytes=10**9) / 10**9)
    if naive_peak_bytes <= 0:
        raise BudgetError(f"`budget={budget}` needs the plain run's peak to become a share: let mode `naive` run too.")
    return min(1.0, budget_bytes(budget, naive_peak_bytes=naive_peak_bytes) / naive_peak_bytes)
