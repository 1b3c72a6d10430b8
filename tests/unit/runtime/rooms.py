"""Budgets for pilots."""

__all__ = ["FixedRoom"]


class FixedRoom:
    """A budget that nothing changes."""

    cap_bytes: int | None = None
    optimizer_bytes = 0

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes

    def __call__(self, plain_peak_bytes: int) -> int:
        return self._budget_bytes
