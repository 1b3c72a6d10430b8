"""What does every schedule hold at least, and in what order may we assume it works? The relaxation of `bound`.

A *moment* is the loss or the start of a block's backward. Moments within replays are left out, which can only lower a
bound. Schedules that offload are not covered.

# Note [Why the bounds hold]
Take any schedule, and its *provenance*: a run of a block read its boundary either from the cursor, that is from the
run just before, or from a boundary that an earlier run left in store. So runs form a tree from boundary 0. For each
block, the run whose saved set its backward uses is an *end*; the loss is one more; runs that lead to no end may go.
What is held at a moment are the tree's edges and the saved sets across it, each storage once. A run *serves* the ends
below it.

1. Uncross. Of two runs of a block between the same two moments, the first is enough. Take runs `x` before `y` of one
   block, where `x` serves `c` and `y` serves `d > c`. Where the path of `x` holds a boundary while the path of `y`
   passes it, let the path of `y` read that one. If there is no such place, the path of `y` runs block `c` after that
   of `x` did, yet before the backward of `d` and so before that of `c`: save `c` there. Either way no run is added,
   and what is held at each moment is a subset of what was. In the end, of the runs of one block an earlier one serves
   higher ends: each run, and each thing held, serves an interval of ends `q .. j-1`.
2. Count less. For each storage choose one end `r` that may use it; `b` is the first boundary that contains it. Only
   these count it: the saved set of end `r`, if it holds it; a boundary from `b` to `r` that contains it and serves an
   interval with `r` in it; and boundary `b` itself when it serves ends above `r` alone. No two of these are held at
   once, so weights add up to the bytes held at most. For intervals of things held at one moment are disjoint; two
   copies of a boundary are one; with end `r` saved, a later run of block `r` serves ends below it, by (1); and with a
   boundary above `b` held for `r`, what serves higher ends reads that one, not `b`, by (1). Now a thing held has a
   weight that depends on itself and its interval, not on the moment.
3. Be lazy. Consider the first run that is not on the way to the end next due: it replaces a boundary, held for `q ..
   j-1` with `j` not yet due, by other things held for the same ends. If those weigh no more, make the change when the
   boundary was made: that run was on its way to an end above `j` and passed all that is needed, so runs are saved. If
   they weigh more, make it at the next change or when `j` is due. Either way less is held at every moment, and no
   time is lost. Repeat: every run is on the way to the end next due.

So a bound may assume: from boundary `i` at hand, to serve the ends `low .. end-1`, a schedule keeps block `i` (if
`low = i`); or runs it and goes on from `i+1` (if `low > i`); or *forks*: holds boundary `i` for `low .. q-1` and lets
what follows serve `q .. end-1` first. At a moment it holds the weights of what it holds. `bound` minimises over just
these. `capped` takes the same moves and counts sets in place of weights: `held` has its own argument for (2) and (3).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.chain import Chain

__all__ = ["RelaxedChain", "RelaxedOption", "relax", "relaxed_options"]

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RelaxedOption:
    """A saved set as the bounds see it: its weight while held, the bytes at its backward's moment, and seconds."""

    weight_bytes: float
    backward_bytes: float
    backward_s: float
    replay_s: float


@dataclass(frozen=True, slots=True, eq=False)
class RelaxedChain:
    """A chain whose held things have weights: see Note [Why the bounds hold].

    `first_bytes[i, j] + passed_bytes[i, j] - passed_bytes[i, q]` is the weight of boundary `i` held for the ends
    `q .. j-1`, the loss being end `n`: of the storages it is the first to contain, and of those that it passes on.
    `loss_bytes` is alive at the loss whatever is held. `options[b]` are those of block `b` that fit at all.
    """

    chain: Chain
    num_blocks: int
    left_bytes: int
    first_bytes: _Floats
    passed_bytes: _Floats
    loss_bytes: float
    forward_s: _Floats
    options: tuple[tuple[RelaxedOption, ...], ...]


def relax(chain: Chain, *, budget_bytes: int) -> RelaxedChain:
    """Return the relaxation of `chain` within `budget_bytes`."""
    num_blocks = len(chain.blocks)
    left_bytes = budget_bytes - chain.workspace_bytes
    end_of, first_in = _ends(chain)
    first = np.zeros((num_blocks + 1, num_blocks + 1))
    passed = np.zeros_like(first)
    for i, boundary in enumerate(chain.boundaries):
        for storage in boundary.storages:
            matrix = first if first_in[storage] == i else passed
            matrix[i, end_of[storage]] += chain.storage_bytes[storage]
    zero = np.zeros((num_blocks + 1, 1))
    return RelaxedChain(
        chain=chain,
        num_blocks=num_blocks,
        left_bytes=left_bytes,
        first_bytes=np.hstack([zero, np.cumsum(first, axis=1)]),
        passed_bytes=np.hstack([zero, np.cumsum(passed, axis=1)]),
        loss_bytes=float(first[-1, -1] + passed[-1, -1]) + chain.tail_peak_bytes,
        forward_s=np.array([block.forward_s for block in chain.blocks]),
        options=relaxed_options(chain, left_bytes=left_bytes),
    )


def relaxed_options(chain: Chain, *, left_bytes: int | None = None) -> tuple[tuple[RelaxedOption, ...], ...]:
    """Return the options of every block; with `left_bytes` those whose saved set and backward fit by themselves."""
    end_of, _ = _ends(chain)
    found, gradients_bytes = list[tuple[RelaxedOption, ...]](), 0
    for b in reversed(range(len(chain.blocks))):
        block = chain.blocks[b]
        gradients_bytes += block.parameter_gradient_bytes
        standing_bytes = chain.tail_live_bytes + chain.boundaries[b + 1].gradient_bytes + gradients_bytes
        options: list[RelaxedOption] = []
        for option in block.options:
            counted_bytes = sum(chain.storage_bytes[s] for s in option.storages if end_of[s] == b)
            weight_bytes = option.saved_bytes + counted_bytes
            held_bytes = option.saved_bytes + sum(chain.storage_bytes[s] for s in option.storages)
            if left_bytes is None or held_bytes + standing_bytes + option.backward_peak_bytes <= left_bytes:
                backward_bytes = weight_bytes + standing_bytes + option.backward_peak_bytes
                options.append(RelaxedOption(weight_bytes, backward_bytes, option.backward_s, option.replay_s))
        found.append(tuple(options))
    return tuple(reversed(found))


def _ends(chain: Chain) -> tuple[list[int], list[int]]:
    """Return, for every storage, the end that counts it and the first boundary that contains it.

    Any end from that boundary on is valid. A good one is where plans hold the storage: the last block that reads it and
    whose saved set holds it, else the last boundary that contains it.
    """
    end_of, first_in = [0] * len(chain.storage_bytes), [-1] * len(chain.storage_bytes)
    for i, boundary in enumerate(chain.boundaries):
        for storage in boundary.storages:
            first_in[storage] = i if first_in[storage] < 0 else first_in[storage]
            end_of[storage] = i
    for b, block in enumerate(chain.blocks):
        for storage in set(block.options[0].storages) & set(chain.boundaries[b].storages):
            end_of[storage] = b
    return end_of, first_in
