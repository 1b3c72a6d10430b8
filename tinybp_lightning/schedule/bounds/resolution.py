"""How finely can the bound of `capped` count? As finely as a few seconds allow."""

from dataclasses import dataclass

from tinybp_lightning.schedule.bounds.live_sets import HeldSets
from tinybp_lightning.schedule.bounds.periods import held_layers
from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain
from tinybp_lightning.schedule.planner.layers import Layers

__all__ = ["Resolution", "affordable"]

_WORK = 2.5e9
"""About how many elementary steps a bound may take: two or three seconds."""
_MOST_WORK = 7e9
"""And one with the fewest slots: hardly more, since where few fit most costs are infinite."""
_MAX_BLOCKS = 420
_SETS = (128, 64, 32, 16, 8, 4, 2)
_MIN_SLOTS, _ENOUGH_SLOTS, _MAX_SLOTS = 32, 100, 600


@dataclass(frozen=True, slots=True)
class Resolution:
    """How finely `capped_bound_s` counts: about `num_slots` pieces of the bytes left, and at most `max_sets` held sets
    at each boundary. Finer is slower and closer.
    """

    num_slots: int
    max_sets: int


def affordable(relaxed: RelaxedChain) -> Resolution | None:
    """Return the resolution that a bound of this chain can have in a few seconds; `None` if too few for a useful one.

    Held sets are worth more than slots, beyond a number of slots that tells the budget from the next.
    """
    if relaxed.num_blocks > _MAX_BLOCKS:
        return None
    best, most = None, max(_SETS) + 1
    for max_sets in _SETS:
        if max_sets >= most:
            continue  # there are no more: the sets would be the same
        held = HeldSets(relaxed.chain, max_sets=max_sets)
        most = max(held.count(i) for i in range(held.num_blocks))
        layers = held_layers(relaxed, held)
        num_forks = _num_forks(held, layers)
        num_slots = min(_MAX_SLOTS, int(_WORK / num_forks))
        if num_slots >= _ENOUGH_SLOTS:
            return Resolution(num_slots, max_sets)
        if not best and _MOST_WORK / num_forks >= _MIN_SLOTS:
            best = Resolution(max(num_slots, _MIN_SLOTS), max_sets)
            if layers.end > layers.first:
                return best
    return best


def _num_forks(held: HeldSets, layers: Layers) -> float:
    """At each boundary and for each of its held sets: every end of its own with every fork before it, from every low.

    The loss is one more end.
    """
    num_forks = 1.0
    for i in range(held.num_blocks):
        left, passing = held.num_blocks - i + 1, held.num_passing(i)
        new = held.num_blocks - layers.first_new(i) + 1
        # Of `left` ends the last `new` ones have each fork before them.
        forks = sum((left - k) ** 2 / 2 for k in range(new))
        found = passing * forks + (held.count(i) - passing) * sum(left - k for k in range(new))
        num_forks += found * (2 if held.leaves_out(i, min(i + 2, held.num_blocks)) else 1)
    return num_forks
