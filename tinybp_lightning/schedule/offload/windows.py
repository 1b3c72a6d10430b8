"""Which stored boundaries of a schedule can be away in host memory, from when to when, and what would that spare?

Between two reads a stored boundary is only waited for: a *gap*. Offloaded at its start, it can come back at any slot
before the read. `weave` puts both actions into the schedule; nothing else of the schedule changes.

# Note [The chain with boundaries away]
A planner that knows nothing of the link plans for `with_boundaries_away(chain)`, in which a stored boundary weighs
little or nothing. What is not stored still counts: a run counts the boundary it starts from, and a saved set the
boundary storages it aliases, as bytes of its own. A schedule for that chain is legal on the true one; what it costs
there is for the simulator to say.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tinybp_lightning.graph.chain import Block, Chain, SavedSet
from tinybp_lightning.graph.ids import BoundaryId, StorageId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Offload, Reload, Store
from tinybp_lightning.schedule.simulator import Machine

__all__ = ["Away", "Gap", "Played", "find_gaps", "hide_copies", "open_slots", "play", "weave", "with_boundaries_away"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Boundary `boundary` is stored and not read from slot `start` to slot `stop`; slot `k` is before action `k`."""

    boundary: int
    start: int
    stop: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Away:
    """A gap that is used: offloaded at its start, reloaded at slot `back`, which is after the start."""

    gap: Gap
    back: int


@dataclass(frozen=True, slots=True)
class Played:
    """What a woven schedule costs; `start_s[k]` and `peak_bytes[k]` are those of action `k` of the schedule before.

    `excess_bytes` is the sum over actions of what exceeds the budget: 0 for a schedule that keeps it.
    """

    total_s: float
    excess_bytes: int
    start_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]


def find_gaps(chain: Chain, actions: Sequence[Action]) -> tuple[Gap, ...]:
    """Return every gap of a legal schedule without offload, in order of their starts.

    **Returns:** gaps of boundaries that have bytes; one that no other action separates from its read is left out.
    """
    is_open = open_slots(chain, actions)
    cursor, swept, used = None, 0, dict[int, int]()
    gaps: list[Gap] = []
    for index, action in enumerate(actions):
        match action:
            case Forward(block) | ForwardSave(block):
                if block != cursor and block in used:
                    gaps.append(_gap(chain, block, used[block], index, is_open))
                    used[block] = index
                swept += swept < len(chain.blocks)
                # A replay that stops early leaves no cursor, and the backward that follows takes it anyway.
                cursor = block + 1
            case Backward():
                cursor = None
            case Store(boundary):
                used[boundary] = index
            case Drop(boundary):
                used.pop(boundary, None)
            case Offload() | Reload():
                raise AssertionError(f"`{action}`: gaps are looked for before anything is offloaded")
    return tuple(sorted((g for g in gaps if g.start < g.stop and g.size_bytes), key=lambda g: (g.start, g.boundary)))


def _gap(chain: Chain, boundary: int, used: int, read: int, is_open: Sequence[bool]) -> Gap:
    start = next(slot for slot in range(used + 1, read + 1) if is_open[slot])
    size_bytes = sum(chain.storage_bytes[s] for s in chain.boundaries[boundary].storages)
    return Gap(boundary, start, read, size_bytes)


def open_slots(chain: Chain, actions: Sequence[Action]) -> list[bool]:
    """Return for every slot whether it takes an action: none between a replay that stops early and its reader."""
    is_open = [True] * (len(actions) + 1)
    waiting: int | None = None
    num_swept = 0
    for index, action in enumerate(actions):
        match action:
            case ForwardSave(block) if num_swept >= len(chain.blocks):
                waiting = block
                continue
            case Forward() | ForwardSave():
                num_swept += 1
            case Drop() if waiting is not None:
                continue
            case Backward(block) if waiting == block:
                first = index
                while isinstance(actions[first - 1], Drop):
                    first -= 1
                is_open[first : index + 1] = [False] * (index + 1 - first)
            case _:
                pass
        waiting = None
    return is_open


def weave(actions: Sequence[Action], aways: Iterable[Away]) -> tuple[tuple[Action, ...], tuple[int, ...]]:
    """Return the schedule with the `Offload` and `Reload` of each of `aways`, and where each old action stands now."""
    offloads, reloads = dict[int, list[Away]](), dict[int, list[Away]]()
    for away in aways:
        offloads.setdefault(away.gap.start, []).append(away)
        reloads.setdefault(away.back, []).append(away)
    woven, place = list[Action](), list[int]()
    for slot, action in enumerate(actions):
        woven += [Offload(BoundaryId(one.gap.boundary)) for one in offloads.get(slot, ())]
        # The link brings back one after the other: what is read first comes first.
        soonest = sorted(reloads.get(slot, ()), key=lambda one: (one.gap.stop, one.gap.boundary))
        woven += [Reload(BoundaryId(one.gap.boundary)) for one in soonest]
        place.append(len(woven))
        woven.append(action)
    return tuple(woven), tuple(place)


def play(machine: Machine, actions: Sequence[Action], aways: Iterable[Away], *, budget_bytes: int) -> Played:
    """Return what the schedule costs with `aways`; it must be legal without them."""
    woven, place = weave(actions, aways)
    machine.reset()
    starts, peaks = list[float](), list[int]()
    for index in range(len(woven)):
        starts.append(machine.start()[1])
        machine.play(woven, index)
        peak = machine.action_peak_bytes
        if machine.at_tail:
            machine.tail()
            peak = max(peak, machine.action_peak_bytes)
        peaks.append(peak)
    firsts = [0, *(k + 1 for k in place[:-1])]
    return Played(
        total_s=machine.now_s,
        excess_bytes=sum(peak - budget_bytes for peak in peaks if peak > budget_bytes),
        start_s=tuple(starts[k] for k in place),
        peak_bytes=tuple(max(peaks[first : k + 1]) for first, k in zip(firsts, place, strict=True)),
    )


def hide_copies(
    gaps: Sequence[Gap], start_s: Sequence[float], is_open: Sequence[bool], *, link_bytes_per_s: float
) -> tuple[Away, ...]:
    """Return the gaps in which both copies fit beside compute, each boundary brought back as late as hides its copy.

    **Arguments:** `gaps`: in order of their starts; `start_s`: when each action starts.
    """
    out_free_s, leaving = 0.0, list[tuple[Gap, float]]()
    for gap in gaps:
        copy_s = gap.size_bytes / link_bytes_per_s
        end_s = max(out_free_s, start_s[gap.start]) + copy_s
        if end_s + copy_s <= start_s[gap.stop]:
            out_free_s = end_s
            leaving.append((gap, end_s))
    aways, back_s = list[Away](), float("inf")
    for gap, left_s in sorted(leaving, key=lambda one: -one[0].stop):
        begin_s = min(back_s, start_s[gap.stop]) - gap.size_bytes / link_bytes_per_s
        back = min(gap.stop, bisect_right(start_s, begin_s) - 1)
        while back > gap.start and not is_open[back]:
            back -= 1
        # A slot before the copy out has ended would make compute wait for it.
        if back > gap.start and start_s[back] >= left_s:
            aways.append(Away(gap, back))
            back_s = begin_s
    return tuple(sorted(aways, key=lambda one: (one.gap.start, one.gap.boundary)))


def with_boundaries_away(chain: Chain, *, staying_share: float) -> Chain:
    """Return the chain in which stored boundaries weigh `staying_share` of their bytes.

    See Note [The chain with boundaries away].
    """
    staying = tuple(int(staying_share * size) for size in chain.storage_bytes)
    spared = tuple(size - stays for size, stays in zip(chain.storage_bytes, staying, strict=True))

    def of(storages: Sequence[StorageId]) -> int:
        return sum(spared[s] for s in storages)

    def saved(option: SavedSet, input_bytes: int) -> SavedSet:
        alias_bytes = of(option.storages)
        replay_peak_bytes = option.replay_peak_bytes + alias_bytes + input_bytes
        return replace(
            option,
            saved_bytes=option.saved_bytes + alias_bytes,
            save_peak_bytes=max(option.save_peak_bytes + alias_bytes + input_bytes, replay_peak_bytes),
            replay_peak_bytes=replay_peak_bytes,
        )

    def block(before: Block, input_bytes: int) -> Block:
        options = tuple(saved(option, input_bytes) for option in before.options)
        return replace(before, forward_peak_bytes=before.forward_peak_bytes + input_bytes, options=options)

    blocks = tuple(block(b, of(chain.boundaries[i].storages)) for i, b in enumerate(chain.blocks))
    return replace(
        chain,
        storage_bytes=staying,
        blocks=blocks,
        tail_peak_bytes=chain.tail_peak_bytes + of(chain.boundaries[-1].storages),
    )
