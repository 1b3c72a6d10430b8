"""Where does a chain repeat itself, as `capped` sees it? Equal layers are bounded once.

The costs of a boundary depend on its moves, in bytes, seconds and indices of held sets, and on the costs of the next
one. Moves are compared as they are, not by keys: the bound is the same number with and without.
"""

from collections.abc import Hashable
from itertools import groupby

from tinybp_lightning.schedule.bounds.live_sets import HeldSets, KeptEnds
from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain
from tinybp_lightning.schedule.planner.layers import Layers, find_layers

__all__ = ["alike", "held_layers"]

_COUNTS = 3
"""How many ways to count less than a whole boundary are told apart, for one boundary and fork."""


def held_layers(relaxed: RelaxedChain, held: HeldSets) -> Layers:
    """Return the longest run of blocks that repeat themselves in what `capped` may do at them."""
    forward_s = relaxed.forward_s.tolist()
    few = find_layers([(forward_s[i], held.after_store(i)) for i in range(held.num_blocks)])
    if few.end - few.first < 2 * few.period + held.num_blocks // 4:
        return Layers(0, 0, 1)  # a short run saves little, and to compare all moves takes time
    return find_layers([_moves(relaxed, held, i) for i in range(held.num_blocks)])


def alike(ways: list[KeptEnds]) -> list[tuple[frozenset[int], list[KeptEnds]]]:
    """Group neighbours that count the same, with ascending lows; beyond some groups what all the rest count."""
    groups = [(counted, list(same)[::-1]) for counted, same in groupby(ways, key=lambda way: way.counted)]
    rest = groups[_COUNTS - 1 :]
    if len(rest) < 2:
        return groups
    counted = frozenset[int].intersection(*(counted for counted, _ in rest))
    return [*groups[: _COUNTS - 1], (counted, [way for _, same in reversed(rest) for way in same])]


def _moves(relaxed: RelaxedChain, held: HeldSets, i: int) -> Hashable:
    """All that the costs of boundary `i` depend on besides the next ones."""
    passes = tuple(held.after_pass(i, index) for index in range(held.num_passing(i)))
    keeps = tuple(tuple(held.keeps(i, index, left_bytes=relaxed.left_bytes)) for index in range(held.count(i)))
    forks = [fork for fork in range(i + 1, held.num_blocks + 1) if held.leaves_out(i, fork)]
    kept_holds = tuple((fork - i, _kept_holds(relaxed, held, i, fork)) for fork in forks)
    return float(relaxed.forward_s[i]), passes, keeps, held.after_store(i), kept_holds


def _kept_holds(relaxed: RelaxedChain, held: HeldSets, i: int, fork: int) -> Hashable:
    """The holds of boundary `i` for ends before `fork` that are all kept."""
    found: list[Hashable] = []
    for counted, same in alike(held.all_kept(i, fork, left_bytes=relaxed.left_bytes)):
        ways = tuple((way.low - i, way.need_bytes, way.seconds) for way in same)
        num_sets = held.count(i) if same[0].low == i else held.num_passing(i)
        found.append((ways, tuple(held.after_hold(i, index, counted) for index in range(num_sets))))
    return tuple(found)
