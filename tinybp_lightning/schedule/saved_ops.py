"""Choose which ops of one block backward finds saved, and which it repeats: all corners of the trade-off, exactly.

For each op `v` of the block's forward let `a_v` say that backward finds its result and `r_v` that backward repeats it.
What is available and not repeated is saved. Repeating needs the inputs: `r_v` implies `a_v` and `a_u` for each op `u`
that `v` reads. At a price of `p` seconds for a byte the best choice minimises

    sum_v seconds_v r_v + p sum_v bytes_v (a_v - r_v),    a_v = 1 where backward reads v.

All constraints are implications and the cost is linear: a minimum-weight closure, found by one maximum flow (Picard
1976; used for recomputation by PyTorch's min-cut partitioner and by Checkmate's successors). Sweeping the price gives
the corners of the convex hull of (saved bytes, repeated seconds), found here between two known corners at a time.

# Note [Ties]
Ops that cost the same per byte (the projections of an attention block) would enter or leave the saved set together, and
nothing between all and none would be found. The sweep therefore takes each op to be a little dearer than the one before
it; what it reports are the true seconds.
"""

# scipy is annotated in part only, so these rules would report it and not us.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from tinybp_lightning.errors import GraphError

__all__ = ["BlockOps", "SavedOps", "cheapest_saved_ops", "saved_ops_frontier"]

_TIE_BREAK = 0.02
_CAPACITY = 1e8
"""The sum of all finite capacities after scaling: flows are 32-bit integers."""
_MAX_CORNERS = 64


@dataclass(frozen=True, slots=True)
class BlockOps:
    """The forward ops of one block, in order; all fields have one entry for each.

    `inputs[v]`: the ops that `v` reads; what exists before the block (its boundary, parameters) is always available.
    `size_bytes`: of the storage that `v` makes, 0 for a view. `is_read`: backward reads the result. `can_save`: it is a
    tensor on a storage of its own. `can_repeat`: running it again gives the same result and does nothing else.
    """

    inputs: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    size_bytes: tuple[int, ...]
    is_read: tuple[bool, ...]
    can_save: tuple[bool, ...]
    can_repeat: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SavedOps:
    """One way to serve backward: the ops whose results are saved, those that are repeated, and what both cost."""

    saved: frozenset[int]
    repeated: frozenset[int]
    saved_bytes: int
    repeat_s: float


def cheapest_saved_ops(ops: BlockOps, *, seconds_per_byte: float) -> SavedOps:
    """Return the best choice at a price.

    **Raises:** `GraphError` if backward reads what can neither be saved nor repeated.
    """
    n = len(ops.inputs)
    save_s = np.array(ops.size_bytes, np.float64) * seconds_per_byte
    repeat_s = np.array(ops.seconds, np.float64)
    scale = _CAPACITY / max(float(save_s.sum() + repeat_s.sum()), 1e-30)
    # Choosing `a_v` costs what saving costs; choosing `r_v` too gives that back and costs the repetition.
    infinite = 2**30
    tails, heads, capacities = list[int](), list[int](), list[int]()

    def edge(tail: int, head: int, capacity: float) -> None:
        if capacity >= 1:
            tails.append(tail)
            heads.append(head)
            capacities.append(min(int(capacity), infinite))

    source, sink = 2 * n, 2 * n + 1
    for v in range(n):
        available, repeated = v, n + v
        if ops.is_read[v]:
            edge(source, available, infinite)
        if ops.can_save[v]:
            gain = (repeat_s[v] - save_s[v]) * scale
            edge(available, sink, save_s[v] * scale)
            edge(repeated, sink, gain)
            edge(source, repeated, -gain)
        else:  # available only if repeated
            edge(available, repeated, infinite)
            edge(repeated, sink, repeat_s[v] * scale)
        if not ops.can_repeat[v]:
            edge(repeated, sink, infinite)
        edge(repeated, available, infinite)
        for u in ops.inputs[v]:
            edge(repeated, u, infinite)
    shape = (2 * n + 2, 2 * n + 2)
    graph = csr_matrix((np.array(capacities, np.int32), (tails, heads)), shape=shape)
    residual = graph - maximum_flow(graph, source, sink).flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    chosen = np.zeros(2 * n + 2, bool)
    chosen[breadth_first_order(residual, source, return_predecessors=False)] = True
    return _checked(ops, chosen[:n], chosen[n : 2 * n])


def _checked(ops: BlockOps, available: NDArray[np.bool_], repeated: NDArray[np.bool_]) -> SavedOps:
    saved = frozenset(int(v) for v in np.flatnonzero(available & ~repeated))
    again = frozenset(int(v) for v in np.flatnonzero(repeated))
    needed = {v for v, is_read in enumerate(ops.is_read) if is_read} | {u for v in again for u in ops.inputs[v]}
    stuck = [v for v in saved if not ops.can_save[v]] + [v for v in again if not ops.can_repeat[v]]
    stuck += needed - saved - again  # where every cut is infinite, one of its edges is cut all the same
    if stuck:
        raise GraphError(
            f"backward needs op `{min(stuck)}`, which can neither be saved nor repeated: mark one of the two possible."
        )
    return SavedOps(saved, again, sum(ops.size_bytes[v] for v in saved), _seconds(ops, again))


def saved_ops_frontier(ops: BlockOps) -> tuple[SavedOps, ...]:
    """Return the corners of the hull of (saved bytes, repeated seconds), from the most bytes to the fewest.

    **Raises:** `GraphError` as `cheapest_saved_ops`.
    """
    n = len(ops.seconds)
    untied = replace(ops, seconds=tuple(s * (1 + _TIE_BREAK * v / n) for v, s in enumerate(ops.seconds)))
    total_s, total_bytes = sum(untied.seconds), sum(ops.size_bytes)
    # At these prices all repeating together costs less than any one byte, and the reverse.
    fewest = cheapest_saved_ops(untied, seconds_per_byte=1e3 * max(total_s, 1e-12))
    most = cheapest_saved_ops(untied, seconds_per_byte=1e-9 * max(total_s, 1e-12) / max(1, total_bytes))
    found = {most.saved_bytes: most, fewest.saved_bytes: fewest}
    pending = [(most, fewest)]
    while pending and len(found) < _MAX_CORNERS:
        high, low = pending.pop()
        if high.saved_bytes <= low.saved_bytes or low.repeat_s <= high.repeat_s:
            continue
        slope = (low.repeat_s - high.repeat_s) / (high.saved_bytes - low.saved_bytes)
        between = cheapest_saved_ops(untied, seconds_per_byte=slope)
        if low.saved_bytes < between.saved_bytes < high.saved_bytes:
            found[between.saved_bytes] = between
            pending += [(high, between), (between, low)]
    corners = (found[size_bytes] for size_bytes in sorted(found, reverse=True))
    return tuple(replace(corner, repeat_s=_seconds(ops, corner.repeated)) for corner in corners)


def _seconds(ops: BlockOps, repeated: frozenset[int]) -> float:
    return float(sum(ops.seconds[v] for v in sorted(repeated)))
