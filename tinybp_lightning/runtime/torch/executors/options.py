"""Decide which estimated options of compiled blocks to measure: those that a plan uses, if it gains enough by them.

A plan that uses estimates does not run: it tells which option to compile next. Of the options of equal blocks, the one
that most blocks use is compiled first; often the plan made then needs no other. But estimates of what the compiler
fuses are rough. So for the kinds of blocks in which a step spends its time (the layers of a transformer), all options
are measured as soon as not everything is kept.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Block, Chain
from tinybp_lightning.graph.ids import BlockId, OptionId
from tinybp_lightning.schedule.actions import Backward, Forward, ForwardSave, Schedule
from tinybp_lightning.schedule.planner.planner import Plan, Planner

__all__ = [
    "MeasuredPart",
    "estimated_options",
    "measured_part",
    "options_to_measure",
    "prefer_measured",
    "with_measured",
]

_HEAVY = 0.1
"""A kind of blocks with this share of a plain step's seconds has all its options measured."""
_WORTH = 0.01
"""A plan that is faster by a smaller share is not worth compiling for: measured seconds vary as much."""


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    """A chain without its estimated options. `numbers[block]`: the number in the whole chain of each option left."""

    chain: Chain
    numbers: tuple[tuple[OptionId, ...], ...]

    def renumbered(self, schedule: Schedule) -> Schedule:
        """Return a schedule for `chain` as one for the whole chain."""
        actions = tuple(
            replace(a, option=self.numbers[a.block][a.option]) if isinstance(a, (Backward, ForwardSave)) else a
            for a in schedule.actions
        )
        return replace(schedule, actions=actions)


def measured_part(chain: Chain) -> MeasuredPart:
    """Return `chain` with its measured options only."""
    numbers = tuple(
        tuple(OptionId(o) for o, option in enumerate(block.options) if not option.is_estimated)
        for block in chain.blocks
    )
    blocks = tuple(
        replace(block, options=tuple(block.options[o] for o in mine))
        for block, mine in zip(chain.blocks, numbers, strict=True)
    )
    return MeasuredPart(replace(chain, blocks=blocks), numbers)


def prefer_measured(found: Plan, chain: Chain, planner_of: Callable[[Chain], Planner] = Planner) -> Plan:
    """Return `found`, the best plan on `chain`, or a plan that uses measured options only if that is about as fast."""
    backwards = [a for a in found.schedule.actions if isinstance(a, Backward)]
    if not any(chain.blocks[a.block].options[a.option].is_estimated for a in backwards):
        return found
    part = measured_part(chain)
    try:
        other = planner_of(part.chain).plan(budget_bytes=found.budget_bytes)
    except BudgetTooSmallError:
        return found
    if other.total_s > found.total_s * (1 + _WORTH):
        return found
    return replace(other, schedule=part.renumbered(other.schedule))


def estimated_options(chain: Chain) -> frozenset[tuple[int, int]]:
    """Return the estimated options of `chain`, as pairs of a block and an option's number."""
    return frozenset(
        (b, o) for b, block in enumerate(chain.blocks) for o, option in enumerate(block.options) if option.is_estimated
    )


def options_to_measure(chain: Chain, schedule: Schedule) -> frozenset[tuple[int, int]]:
    """Return which estimated options to measure next for a plan by `schedule`, as pairs like `estimated_options`.

    For each kind of block that is the option that most blocks use, and for heavy kinds all options; nothing if every
    block keeps what option 0 saves.
    """
    taken = {a.block: a.option for a in schedule.actions if isinstance(a, Backward)}
    num_forwards = sum(isinstance(a, (Forward, ForwardSave)) for a in schedule.actions)
    if num_forwards == len(chain.blocks) and not any(taken.values()):
        return frozenset()
    # Blocks of one structure may be compiled apart, for other constants or strides: some are measured and some are not.
    kinds: dict[tuple[str, tuple[bool, ...]], list[int]] = {}
    for b, block in enumerate(chain.blocks):
        are_estimated = tuple(option.is_estimated for option in block.options)
        kinds.setdefault((block.signature, are_estimated), []).append(b)
    plain_s = [block.forward_s + block.options[0].backward_s for block in chain.blocks]
    seconds = {kind: sum(plain_s[b] for b in blocks) for kind, blocks in kinds.items()}
    wanted: set[tuple[int, int]] = set()
    for kind, blocks in kinds.items():
        options = chain.blocks[blocks[0]].options
        estimated = [o for o, option in enumerate(options) if option.is_estimated]
        if seconds[kind] >= _HEAVY * sum(seconds.values()):
            wanted.update((blocks[0], o) for o in estimated)
            continue
        counts = Counter(taken[BlockId(b)] for b in blocks if taken[BlockId(b)] in estimated)
        if counts:
            option = counts.most_common(1)[0][0]
            wanted.add((next(b for b in blocks if taken[BlockId(b)] == option), option))
    return frozenset(wanted)


def with_measured(chain: Chain, measured: Chain) -> Chain:
    """Return `chain` with the blocks of `measured`, and the options that only `chain` has measured."""

    def block_of(mine: Block, new: Block) -> Block:
        options = tuple(
            replace(
                old,
                replay_s=min(old.replay_s, new.forward_s),
                save_peak_bytes=max(old.save_peak_bytes, new.forward_peak_bytes),
            )
            if found.is_estimated and not old.is_estimated
            else found
            for old, found in zip(mine.options, new.options, strict=True)
        )
        return replace(new, options=options)

    return replace(chain, blocks=tuple(map(block_of, chain.blocks, measured.blocks)))
