"""What would known methods do on this chain? Keep everything, checkpoint every block or every k-th, Revolve.

Counts of block forwards on a chain of `n` blocks, the first sweep's `n` included:

| schedule | forwards |
|---|---|
| `keep_all` | n |
| `per_block` | 2n |
| `every_k` | 2n, less the last segment, which is kept from the first sweep (as `checkpoint_sequential` does) |
| `revolve(s)` | 2n + `revolve_cost(n, s)`: first sweep, one replay of every block, advances |
| `revolve(s, keep_spine=True)` | as above, less the advances of the first descent, which the first sweep does |

`revolve` follows Griewank & Walther 2000 (*Algorithm 799: revolve*), `every_sqrt_n` Chen et al. 2016. All of them keep
option 0 of a block.
"""

from functools import lru_cache
from math import isqrt

import numpy as np

from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, BoundaryId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store

__all__ = ["every_k", "every_sqrt_n", "keep_all", "per_block", "revolve", "revolve_cost"]


def keep_all(chain: Chain) -> Schedule:
    """Return the schedule of plain training: every block keeps its saved set, nothing runs twice."""
    num_blocks = len(chain.blocks)
    return _schedule(num_blocks, [*_saves(0, num_blocks), *_backwards(0, num_blocks)])


def per_block(chain: Chain) -> Schedule:
    """Return what checkpointing every block does: every boundary stored, every block replayed, the last one too."""
    num_blocks = len(chain.blocks)
    actions: list[Action] = []
    for block in range(num_blocks):
        actions += _store(block)
        actions.append(Forward(BlockId(block)))
    for block in reversed(range(num_blocks)):
        actions += _leaf(block, stored=True)
    return _schedule(num_blocks, actions)


def every_k(chain: Chain, *, k: int) -> Schedule:
    """Return one level of checkpoints with a boundary stored every `k` blocks; the last segment is kept at once.

    **Raises:** `ConfigError` when `k` is below 1.
    """
    if k < 1:
        raise ConfigError(f"`k={k}` must be at least 1: it is the number of blocks between two stored boundaries.")
    num_blocks = len(chain.blocks)
    starts = range(0, num_blocks, k)
    last = starts[-1]
    actions: list[Action] = []
    for start in starts[:-1]:
        actions += _store(start)
        actions += _forwards(start, start + k)
    actions += [*_saves(last, num_blocks), *_backwards(last, num_blocks)]
    for start in reversed(starts[:-1]):
        first, *rest = _saves(start, start + k)
        actions += [first, *_drop(start), *rest, *_backwards(start, start + k)]
    return _schedule(num_blocks, actions)


def every_sqrt_n(chain: Chain) -> Schedule:
    """Return `every_k` with about `sqrt(n)` blocks in a segment."""
    return every_k(chain, k=max(1, isqrt(len(chain.blocks))))


def revolve_cost(num_blocks: int, num_slots: int) -> int:
    """Return Revolve's number of advances: forwards beside the first sweep and the replay of every block."""
    return int(_revolve_table(num_blocks, num_slots)[0][min(num_slots, num_blocks)][num_blocks])


def revolve(chain: Chain, *, num_slots: int, keep_spine: bool = False) -> Schedule:
    """Return Revolve's schedule with `num_slots` stored boundaries, the input among them.

    **Arguments:** `keep_spine`: store the boundaries of the first descent while the first sweep passes them.

    **Returns:** a schedule of exactly `2n + revolve_cost(n, num_slots)` forwards, fewer with `keep_spine`.

    **Raises:** `ConfigError` when `num_slots` is below 1.
    """
    if num_slots < 1:
        raise ConfigError(f"`num_slots={num_slots}` must be at least 1: boundary 0 takes the first slot.")
    num_blocks = len(chain.blocks)
    _, split = _revolve_table(num_blocks, num_slots)
    spine = _spine(num_blocks, num_slots, split) if keep_spine else []
    actions: list[Action] = []
    for block in range(num_blocks):
        actions += _store(block) if block in spine else []
        actions.append(Forward(BlockId(block)))
    # An explicit stack of (first, end, slots, whether the advance is still to do): chains of any length.
    pending: list[tuple[int, int, int]] = [(0, num_blocks, num_slots)]
    while pending:
        first, end, slots = pending.pop()
        if end - first == 1:
            actions += _leaf(first, stored=first in spine or _is_stored(actions, first))
        elif slots == 1:
            for block in reversed(range(first + 1, end)):
                actions += [*_forwards(first, block), *_leaf(block, stored=False)]
            actions += _leaf(first, stored=first > 0)
        else:
            middle = first + int(split[min(slots, num_blocks)][end - first])
            if middle not in spine:
                actions += _forwards(first, middle)
                # A single block runs from the cursor: storing its boundary would only be undone at once.
                actions += _store(middle) if end - middle > 1 else []
            pending += [(first, middle, slots), (middle, end, slots - 1)]
    return _schedule(num_blocks, actions)


def _is_stored(actions: list[Action], boundary: int) -> bool:
    """Whether the last word on `boundary` among `actions` is a `Store`."""
    for action in reversed(actions):
        if isinstance(action, Store | Drop) and action.boundary == boundary:
            return isinstance(action, Store)
    return False


def _spine(num_blocks: int, num_slots: int, split: tuple[np.ndarray, ...]) -> list[int]:
    first, spine = 0, list[int]()
    while num_blocks - first > 1 and num_slots > 1:
        first += int(split[min(num_slots, num_blocks)][num_blocks - first])
        num_slots -= 1
        spine.append(first)
    return spine


@lru_cache(maxsize=8)
def _revolve_table(num_blocks: int, num_slots: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return `(cost, split)` `[slots][length]`: `cost(n, s) = min over m of m + cost(m, s) + cost(n - m, s - 1)`."""
    length = np.arange(num_blocks + 1)
    costs, splits = [length * 0, length * (length - 1) // 2], [length * 0, length * 0]
    for _ in range(2, min(num_slots, num_blocks) + 1):
        fewer, cost, split = costs[-1], np.zeros(num_blocks + 1, np.int64), np.zeros(num_blocks + 1, np.int64)
        for n in range(2, num_blocks + 1):
            candidates = length[1:n] + cost[1:n] + fewer[n - 1 : 0 : -1]
            split[n] = 1 + int(np.argmin(candidates))
            cost[n] = candidates[split[n] - 1]
        costs.append(cost)
        splits.append(split)
    return tuple(costs), tuple(splits)


def _leaf(block: int, *, stored: bool) -> list[Action]:
    return [ForwardSave(BlockId(block)), *(_drop(block) if stored else []), Backward(BlockId(block))]


def _forwards(first: int, end: int) -> list[Action]:
    return [Forward(BlockId(block)) for block in range(first, end)]


def _saves(first: int, end: int) -> list[Action]:
    return [ForwardSave(BlockId(block)) for block in range(first, end)]


def _backwards(first: int, end: int) -> list[Action]:
    return [Backward(BlockId(block)) for block in reversed(range(first, end))]


def _store(boundary: int) -> list[Action]:
    return [Store(BoundaryId(boundary))] if boundary else []


def _drop(boundary: int) -> list[Action]:
    return [Drop(BoundaryId(boundary))] if boundary else []


def _schedule(num_blocks: int, actions: list[Action]) -> Schedule:
    return Schedule(num_blocks=num_blocks, actions=tuple(actions))
