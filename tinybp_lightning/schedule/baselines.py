"""Build the schedules of known methods: keep everything, checkpoint every block or every k-th, Revolve.

Counts of block forwards on a chain of `n` blocks, the first sweep's `n` included:

| schedule | forwards |
|---|---|
| `keep_all` | n |
| `per_block` | 2n |
| `every_k` | 2n, less the last segment, which is kept from the first sweep (as `checkpoint_sequential` does) |
| `revolve(s)` | 2n + `revolve_cost(n, s)`: first sweep, one replay of every block, advances |
| `revolve(s, keep_spine=True)` | as above, less the advances of the first descent, which the first sweep does |
| `keep_some`, `saved_knapsack`, `selective` | 2n, less the blocks that are kept |

`revolve` follows Griewank & Walther 2000 (*Algorithm 799: revolve*), `every_sqrt_n` Chen et al. 2016, `saved_knapsack`
torch's `activation_memory_budget` (`torch/_functorch/partitioners.py`), `selective` torch's selective activation
checkpointing. All of them keep option 0 of a block.
"""

from collections.abc import Collection
from functools import lru_cache
from math import ceil, isqrt

import numpy as np

from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, BoundaryId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store
from tinybp_lightning.schedule.arguments import check_count

__all__ = [
    "every_k",
    "every_sqrt_n",
    "keep_all",
    "keep_some",
    "per_block",
    "revolve",
    "revolve_cost",
    "saved_knapsack",
    "selective",
]

_KNAPSACK_SLOTS = 4096


def keep_all(chain: Chain) -> Schedule:
    """Return the schedule of plain training: every block keeps its saved set, nothing runs twice."""
    return keep_some(chain, kept=range(len(chain.blocks)), stored=())


def per_block(chain: Chain) -> Schedule:
    """Return what checkpointing every block does: every boundary stored, every block replayed, the last one too."""
    return keep_some(chain, kept=(), stored=range(len(chain.blocks)))


def every_k(chain: Chain, *, k: int) -> Schedule:
    """Return one level of checkpoints with a boundary stored every `k` blocks; the last segment is kept at once.

    **Raises:** `ConfigError` when `k` is below 1.
    """
    check_count("k", k, at_least=1, meaning="the number of blocks between two stored boundaries")
    starts = range(0, len(chain.blocks), k)
    return keep_some(chain, kept=range(starts[-1], len(chain.blocks)), stored=starts)


def every_sqrt_n(chain: Chain) -> Schedule:
    """Return `every_k` with about `sqrt(n)` blocks in a segment."""
    return every_k(chain, k=max(1, isqrt(len(chain.blocks))))


def keep_some(chain: Chain, *, kept: Collection[int], stored: Collection[int]) -> Schedule:
    """Return one level of recomputation: blocks that keep their saved set, and runs of others, each replayed at once.

    **Arguments:** `kept`: blocks that keep their saved set from the first sweep; `stored`: boundaries at which a run of
    others ends and the next begins. Those after a kept block are stored anyway: nothing else leads there.
    """
    num_blocks = len(chain.blocks)
    starts = [b for b in range(num_blocks) if b not in kept and (b in stored or b == 0 or b - 1 in kept)]
    actions: list[Action] = []
    for block in range(num_blocks):
        actions += _store(block) if block in starts else []
        actions += [ForwardSave(BlockId(block))] if block in kept else [Forward(BlockId(block))]
    end = num_blocks
    for block in reversed(range(num_blocks)):
        if block in kept:
            actions.append(Backward(BlockId(block)))
            end = block
        elif block in starts:
            actions += [ForwardSave(BlockId(block)), *_drop(block)]
            actions += [ForwardSave(BlockId(b)) for b in range(block + 1, end)]
            actions += [Backward(BlockId(b)) for b in reversed(range(block, end))]
            end = block
    return Schedule(num_blocks, tuple(actions))


def saved_knapsack(chain: Chain, *, saved_share: float) -> Schedule:
    """Return what torch's `activation_memory_budget` does: a knapsack over saved bytes, nothing recomputed twice.

    It keeps the saved sets that spare most time within `saved_share` of the bytes that plain training saves: 0 saves
    boundaries alone, 1 everything. A boundary that a replay passes is not worth saving to it, because that spares no
    recomputation: a run of blocks that are not kept is replayed at once.

    **Raises:** `ConfigError` when `saved_share` is not from 0 to 1.
    """
    if not 0 <= saved_share <= 1:
        raise ConfigError(f"`saved_share={saved_share}` must be from 0 to 1: a share of what plain training saves.")
    weights = _saved_bytes(chain)
    limit_bytes = int(saved_share * sum(weights))
    values = [block.forward_s for block in chain.blocks]
    return keep_some(chain, kept=_knapsack(weights, values, limit_bytes), stored=())


def selective(chain: Chain, *, signatures: Collection[str], k: int) -> Schedule:
    """Return selective checkpointing: regions of `k` blocks, in which blocks of some kinds keep their saved sets.

    **Arguments:** `signatures`: the kinds that are kept, as their `Block.signature`; none gives every `k`-th boundary.

    **Raises:** `ConfigError` when `k` is below 1.
    """
    check_count("k", k, at_least=1, meaning="the number of blocks in a region")
    kept = [b for b, block in enumerate(chain.blocks) if block.signature in signatures]
    return keep_some(chain, kept=kept, stored=range(0, len(chain.blocks), k))


def _saved_bytes(chain: Chain) -> list[int]:
    """Return what each block's saved set holds; a boundary storage is counted where it is saved first."""
    seen, found = set[int](), list[int]()
    for block in chain.blocks:
        new = [s for s in block.options[0].storages if s not in seen]
        seen.update(new)
        found.append(block.options[0].saved_bytes + sum(chain.storage_bytes[s] for s in new))
    return found


def _knapsack(weights: list[int], values: list[float], limit: int) -> set[int]:
    """Return the indices of the most valuable items within `limit`, weights rounded up to slots."""
    unit = max(1, ceil(limit / _KNAPSACK_SLOTS))
    num_slots = limit // unit
    best = np.zeros(num_slots + 1)
    taken: list[np.ndarray] = []
    slots = [-(-weight // unit) for weight in weights]
    for weight, value in zip(slots, values, strict=True):
        with_it = np.full(num_slots + 1, -np.inf)
        with_it[weight:] = best[: max(0, num_slots + 1 - weight)] + value
        taken.append(with_it > best)
        best = np.maximum(best, with_it)
    left, found = num_slots, set[int]()
    for index in reversed(range(len(weights))):
        if taken[index][left]:
            found.add(index)
            left -= slots[index]
    return found


def revolve_cost(num_blocks: int, num_slots: int) -> int:
    """Return Revolve's number of advances: forwards beside the first sweep and the replay of every block."""
    return int(_revolve_table(num_blocks, num_slots)[0][min(num_slots, num_blocks)][num_blocks])


def revolve(chain: Chain, *, num_slots: int, keep_spine: bool = False) -> Schedule:
    """Return Revolve's schedule with `num_slots` stored boundaries, the input among them.

    **Arguments:** `keep_spine`: store the boundaries of the first descent while the first sweep passes them.

    **Raises:** `ConfigError` when `num_slots` is below 1.
    """
    check_count("num_slots", num_slots, at_least=1, meaning="boundary 0 takes the first slot")
    num_blocks = len(chain.blocks)
    _, split = _revolve_table(num_blocks, num_slots)
    stored = _spine(num_blocks, num_slots, split) if keep_spine else set[int]()
    actions: list[Action] = []
    for block in range(num_blocks):
        actions += _store(block) if block in stored else []
        actions.append(Forward(BlockId(block)))
    # An explicit stack of (first, end, slots): chains of any length.
    pending: list[tuple[int, int, int]] = [(0, num_blocks, num_slots)]
    while pending:
        first, end, slots = pending.pop()
        if end - first == 1:
            actions += _leaf(first, stored=first in stored)
        elif slots == 1:
            for block in reversed(range(first + 1, end)):
                actions += [*_forwards(first, block), *_leaf(block, stored=False)]
            actions += _leaf(first, stored=first > 0)
        else:
            middle = first + int(split[min(slots, num_blocks)][end - first])
            if middle not in stored:
                actions += _forwards(first, middle)
                # A single block runs from the cursor: storing its boundary would only be undone at once.
                if end - middle > 1:
                    stored.add(middle)
                    actions += _store(middle)
            pending += [(first, middle, slots), (middle, end, slots - 1)]
    return Schedule(num_blocks, tuple(actions))


def _spine(num_blocks: int, num_slots: int, split: tuple[np.ndarray, ...]) -> set[int]:
    first, spine = 0, set[int]()
    for slots in range(num_slots, 1, -1):
        if num_blocks - first > 1:
            first += int(split[min(slots, num_blocks)][num_blocks - first])
            spine.add(first)
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


def _store(boundary: int) -> list[Action]:
    return [Store(BoundaryId(boundary))] if boundary else []


def _drop(boundary: int) -> list[Action]:
    return [Drop(BoundaryId(boundary))] if boundary else []
