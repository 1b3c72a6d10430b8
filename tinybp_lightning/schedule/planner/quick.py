"""Which schedules need not be looked at? A bound on their seconds that costs next to nothing.

A block whose saved set is not held at the loss is run again. So within a budget only so much can be kept, and the rest
is replayed: a fractional knapsack, whose items are the blocks' options with the weights of `relaxed`, which add up to
no more than what any schedule holds there. It is the bound of `bound` with one price, that of the loss, at its best.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.bounds.relaxation import RelaxedOption, relaxed_options

__all__ = ["QuickBound"]


class QuickBound:
    """The least seconds of a step, by budget."""

    def __init__(self, chain: Chain) -> None:
        steps = list[tuple[float, float]]()
        self._forgotten_s = 0.0
        for block, options in zip(chain.blocks, relaxed_options(chain), strict=True):
            forgotten_s = min(option.replay_s + option.backward_s for option in options)
            self._forgotten_s += block.forward_s + forgotten_s
            steps += _steps(options, forgotten_s)
        # The bytes that save most come first: what they save together is concave.
        steps.sort(key=lambda step: step[1] / step[0] if step[0] else np.inf, reverse=True)
        self._taken_bytes = chain.tail_peak_bytes + chain.workspace_bytes
        self._bytes: NDArray[np.float64] = np.cumsum([0.0, *(size for size, _ in steps)])
        self._saved_s: NDArray[np.float64] = np.cumsum([0.0, *(seconds for _, seconds in steps)])

    def value_s(self, budget_bytes: int) -> float:
        """Return seconds that every legal schedule without offload within `budget_bytes` takes at least."""
        left_bytes = max(0, budget_bytes - self._taken_bytes)
        # To the right of equal sizes: what weighs nothing is kept.
        kept = int(np.searchsorted(self._bytes, left_bytes, side="right")) - 1
        saved_s = self._saved_s[kept]
        if kept + 1 < len(self._bytes):
            share = (left_bytes - self._bytes[kept]) / (self._bytes[kept + 1] - self._bytes[kept])
            saved_s += share * (self._saved_s[kept + 1] - self._saved_s[kept])
        return float(self._forgotten_s - saved_s)


def _steps(options: tuple[RelaxedOption, ...], forgotten_s: float) -> list[tuple[float, float]]:
    """Return what a block saves: so many bytes more, kept over the loss, for so many seconds less, steepest first."""
    hull = [(0.0, forgotten_s)]
    for corner in sorted((option.weight_bytes, option.backward_s) for option in options):
        if corner[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-1], corner) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(corner)
    return [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else -np.inf
