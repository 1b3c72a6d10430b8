"""Play a schedule and count the bytes alive and the seconds passed at every action: the exact cost model.

Live bytes are the *set* of storages held for any reason (stored boundaries, the cursor, what saved sets alias), each
counted once, plus the private bytes of the saved sets alive, the gradient of the boundary the backward stands at, the
parameter gradients accumulated so far, what the code after the last block still holds, and the unmodelled bytes. The
model follows Beaumont et al., *Optimal checkpointing for heterogeneous chains*, with shared storages, early stop and
copies to host memory (Note [Two directions of one link]) added.

# Note [Where the loss stands]
The first sweep ends with the last block's first forward. Then, before any other action, comes the *tail*: the caller's
code after the last block, with the last boundary held. After it the last boundary is released (unless a saved set
aliases it) and its gradient is alive.

# Note [Two directions of one link]
Copies run beside compute, and each direction of the link moves one boundary after the other. The directions do not
share bandwidth: PCIe and NVLink are full duplex, and pinned copies were measured at the same rate both ways at once.

- `Offload` copies the storages of its boundary that have no host copy yet; another offloaded boundary may share some.
  They are on the device until the copy has ended, and are released before the first action after that.
- `Reload` copies those that nothing holds on the device. If one is still on its way out, the reload and compute wait
  for it. The bytes are taken at once; the first forward that reads the boundary waits for the end.
- A boundary dropped while its copy is under way is released when the copy has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.schedule.actions import (
    Action,
    Backward,
    Drop,
    Forward,
    ForwardSave,
    Offload,
    Reload,
    Schedule,
    Store,
)
from tinybp_lightning.schedule.arguments import check_link
from tinybp_lightning.schedule.verify import verify_schedule

__all__ = ["Machine", "Moment", "Timeline", "simulate"]


@dataclass(frozen=True, slots=True)
class Moment:
    """What one action does: bytes alive before, the most during, and after it; when it starts and ends."""

    before_bytes: int
    peak_bytes: int
    after_bytes: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule played in order: `moments[k]` belongs to `schedule.actions[k]`.

    `tail` is the moment after action `tail_after`, the last of the first sweep. `peak_action` is the index of the first
    action that reaches `peak_bytes`; it is `tail_after` with `peak_in_tail` set when the tail does.
    `recompute_s` is the time of forwards after the first sweep; `num_forwards[b]` counts every forward of block `b`;
    `wait_s` is the time that compute waits for copies to and from host memory.
    """

    moments: tuple[Moment, ...]
    tail: Moment
    tail_after: int
    peak_bytes: int
    peak_action: int
    peak_in_tail: bool
    total_s: float
    recompute_s: float
    num_forwards: tuple[int, ...]
    wait_s: float = 0.0


def simulate(chain: Chain, schedule: Schedule, *, link_bytes_per_s: float | None = None) -> Timeline:
    """Play `schedule` on `chain` and return what every action costs.

    **Arguments:** `link_bytes_per_s`: bandwidth to host memory in each direction, for schedules that offload.

    **Raises:** `ScheduleError` when the schedule is not legal, or offloads and no bandwidth is given; `ConfigError` for
    an argument of a wrong type.
    """
    verify_schedule(chain, schedule)
    machine = Machine(chain, link_bytes_per_s=link_bytes_per_s)
    moments: list[Moment] = []
    tail, tail_after = Moment(0, 0, 0, 0.0, 0.0), -1
    num_forwards = [0] * len(chain.blocks)
    for index, action in enumerate(schedule.actions):
        if isinstance(action, Forward | ForwardSave):
            num_forwards[action.block] += 1
        before, start_s = machine.start()
        machine.play(schedule.actions, index)
        moments.append(Moment(before, machine.action_peak_bytes, machine.live_bytes, start_s, machine.now_s))
        if machine.at_tail:
            before, now = machine.live_bytes, machine.now_s
            machine.tail()
            tail, tail_after = Moment(before, machine.action_peak_bytes, machine.live_bytes, now, now), index
    peak = max(tail.peak_bytes, *(moment.peak_bytes for moment in moments))
    peak_action = next((k for k, moment in enumerate(moments) if moment.peak_bytes == peak), tail_after)
    return Timeline(
        moments=tuple(moments),
        tail=tail,
        tail_after=tail_after,
        peak_bytes=peak,
        peak_action=peak_action,
        peak_in_tail=moments[peak_action].peak_bytes < peak,
        total_s=machine.now_s,
        recompute_s=machine.recompute_s,
        num_forwards=tuple(num_forwards),
        wait_s=machine.wait_s,
    )


class Machine:
    """The state a schedule acts on, in bytes and seconds. `reset` makes it new; one chain, many schedules."""

    def __init__(self, chain: Chain, *, link_bytes_per_s: float | None = None) -> None:
        self._chain = chain
        self._blocks = chain.blocks
        self._link_bytes_per_s = link_bytes_per_s
        size = chain.storage_bytes
        # Storages of 0 bytes weigh nothing: leave them out of every loop.
        self._boundary = [tuple(s for s in boundary.storages if size[s]) for boundary in chain.boundaries]
        self._saved_storages = [
            [tuple(s for s in option.storages if size[s]) for option in block.options] for block in chain.blocks
        ]
        self.reset()

    def reset(self) -> None:
        """Go back to the moment before the first action."""
        self._references = [0] * len(self._chain.storage_bytes)
        self._cursor: int | None = None
        self._stored: set[int] = {0}
        self._link = _Link(self._chain.storage_bytes, self._link_bytes_per_s)
        self._sweeping = True
        self.at_tail = False
        self.live_bytes = self._chain.unmodelled_bytes
        self.action_peak_bytes = 0
        self.now_s = self.recompute_s = self.wait_s = 0.0
        self._hold(self._boundary[0])

    def start(self) -> tuple[int, float]:
        """Let go of what copies to the host have freed by now; return live bytes and the time."""
        if self._link.leaving:
            for ended in self._link.take_ended(self.now_s):
                self._release(ended.storages)
        return self.live_bytes, self.now_s

    def play(self, actions: tuple[Action, ...], index: int) -> None:
        """Play `actions[index]`; `action_peak_bytes`, `live_bytes`, `now_s` and `at_tail` tell what came of it."""
        action = actions[index]
        self.action_peak_bytes = self.live_bytes
        match action:
            case Forward(block):
                self._run(block, self._blocks[block].forward_peak_bytes, self._blocks[block].forward_s)
                self._move_cursor(block + 1)
            case ForwardSave(block, option):
                self._forward_save(actions, index, block, option)
            case Backward(block, option):
                self._backward(block, option)
            case Store(boundary):
                self._stored.add(boundary)
                self._hold(self._boundary[boundary])
            case Drop(boundary):
                self._drop(boundary)
            case Offload(boundary):
                self._stored.remove(boundary)
                self._release(self._link.offload(self._boundary[boundary], self.now_s))
            case Reload(boundary):
                self._reload(boundary)
            case _:
                assert_never(action)
        self.action_peak_bytes = max(self.action_peak_bytes, self.live_bytes)

    def tail(self) -> None:
        """Run the caller's code after the last block. See Note [Where the loss stands]."""
        self.at_tail = self._sweeping = False
        self.action_peak_bytes = self.live_bytes + self._chain.tail_peak_bytes
        self._move_cursor(None)
        self.live_bytes += self._chain.boundaries[-1].gradient_bytes + self._chain.tail_live_bytes
        self.action_peak_bytes = max(self.action_peak_bytes, self.live_bytes)

    def _forward_save(self, actions: tuple[Action, ...], index: int, block: int, option: int) -> None:
        saved = self._blocks[block].options[option]
        stops_early = not self._sweeping and self._next_is_backward(actions, index, block)
        if stops_early:
            self._run(block, saved.replay_peak_bytes, saved.replay_s)
        else:
            self._run(block, saved.save_peak_bytes, self._blocks[block].forward_s)
        self.live_bytes += saved.saved_bytes
        self._hold(self._saved_storages[block][option])
        self._move_cursor(None if stops_early else block + 1)

    @staticmethod
    def _next_is_backward(actions: tuple[Action, ...], index: int, block: int) -> bool:
        following = next(actions[k] for k in range(index + 1, len(actions)) if not isinstance(actions[k], Drop))
        return isinstance(following, Backward) and following.block == block

    def _backward(self, block: int, option: int) -> None:
        costs, saved = self._blocks[block], self._blocks[block].options[option]
        self._move_cursor(None)
        gradient_bytes, boundaries = costs.parameter_gradient_bytes, self._chain.boundaries
        self.action_peak_bytes = self.live_bytes + saved.backward_peak_bytes + gradient_bytes
        self._release(self._saved_storages[block][option])
        self.live_bytes += boundaries[block].gradient_bytes - boundaries[block + 1].gradient_bytes
        self.live_bytes += gradient_bytes - saved.saved_bytes
        if block == 0:
            self.live_bytes -= self._chain.tail_live_bytes
        self.now_s += saved.backward_s

    def _run(self, block: int, new_bytes: int, seconds: float) -> None:
        if self._cursor != block:
            self._wait(self._link.arrival_s(self._boundary[block]))
        self.action_peak_bytes = self.live_bytes + new_bytes
        self.now_s += seconds
        self.at_tail = self._sweeping and block + 1 == len(self._blocks)
        if not self._sweeping:
            self.recompute_s += seconds

    def _drop(self, boundary: int) -> None:
        storages = self._boundary[boundary]
        if boundary not in self._stored:
            self._link.forget(storages)
            return
        self._stored.remove(boundary)
        arrival_s = self._link.arrival_s(storages)
        if arrival_s > self.now_s:
            self._link.leaving.append(_Leaving(arrival_s, storages))
        else:
            self._release(storages)

    def _reload(self, boundary: int) -> None:
        """Bring a boundary back. See Note [Two directions of one link]."""
        storages = self._boundary[boundary]
        held_by_copies = [s for one in self._link.leaving for s in one.storages]
        on_the_way = [s for s in storages if 0 < self._references[s] == held_by_copies.count(s)]
        self._wait(self._link.leaves_s(on_the_way))
        missing = [s for s in storages if not self._references[s]]
        self._link.reload(storages, missing, self.now_s)
        self._stored.add(boundary)
        self.action_peak_bytes = self.live_bytes
        self._hold(storages)

    def _wait(self, until_s: float) -> None:
        if until_s > self.now_s:
            self.wait_s += until_s - self.now_s
            self.now_s = until_s
            self.start()

    def _move_cursor(self, boundary: int | None) -> None:
        if boundary is not None:
            self._hold(self._boundary[boundary])
        if self._cursor is not None:
            self._release(self._boundary[self._cursor])
        self._cursor = boundary

    def _hold(self, storages: tuple[int, ...]) -> None:
        references, size = self._references, self._chain.storage_bytes
        for storage in storages:
            if not references[storage]:
                self.live_bytes += size[storage]
            references[storage] += 1
        self.action_peak_bytes = max(self.action_peak_bytes, self.live_bytes)

    def _release(self, storages: tuple[int, ...]) -> None:
        references, size = self._references, self._chain.storage_bytes
        for storage in storages:
            references[storage] -= 1
            if not references[storage]:
                self.live_bytes -= size[storage]


@dataclass(frozen=True, slots=True)
class _Leaving:
    """Storages that the device holds for a copy alone, until it ends."""

    end_s: float
    storages: tuple[int, ...]


class _Link:
    """The state of both directions, and of the copies in host memory."""

    def __init__(self, storage_bytes: Sequence[int], bytes_per_s: float | None) -> None:
        if bytes_per_s is not None:
            check_link(bytes_per_s)
        self._storage_bytes = storage_bytes
        self._bytes_per_s = bytes_per_s
        self._out_free_s = self._back_free_s = 0.0
        self._host_references = dict[int, int]()
        self._arrives_s = dict[int, float]()
        self.leaving: list[_Leaving] = []

    def offload(self, storages: tuple[int, ...], now_s: float) -> tuple[int, ...]:
        """Begin to copy out what has no host copy, and hold it till then; return what the device need not hold."""
        moved = tuple(s for s in storages if not self._host_references.get(s))
        for storage in storages:
            self._host_references[storage] = self._host_references.get(storage, 0) + 1
        # What is still arriving can leave again only when it is there.
        start_s = max(self._out_free_s, now_s, self.arrival_s(moved))
        self._out_free_s = start_s + self._copy_s(moved)
        self.leaving.append(_Leaving(self._out_free_s, moved))
        arriving = tuple(s for s in storages if s not in moved and self._arrives_s.get(s, 0.0) > now_s)
        if arriving:
            self.leaving.append(_Leaving(self.arrival_s(arriving), arriving))
        return tuple(s for s in storages if s not in moved and s not in arriving)

    def reload(self, storages: tuple[int, ...], missing: Sequence[int], now_s: float) -> None:
        """Begin to copy `missing` in, and let go of the host's copy of all `storages`."""
        self.forget(storages)
        if missing:
            self._back_free_s = max(self._back_free_s, now_s) + self._copy_s(missing)
            self._arrives_s.update(dict.fromkeys(missing, self._back_free_s))

    def forget(self, storages: tuple[int, ...]) -> None:
        """Let go of an offloaded boundary's host copies."""
        for storage in storages:
            self._host_references[storage] -= 1

    def leaves_s(self, storages: Sequence[int]) -> float:
        """Return when the last of `storages` that is on its way out has left; 0 where none is."""
        return max((one.end_s for one in self.leaving if any(s in storages for s in one.storages)), default=0.0)

    def arrival_s(self, storages: Sequence[int]) -> float:
        """Return when the last of `storages` that was copied in arrives; 0 where none was."""
        if not self._arrives_s:
            return 0.0
        return max((self._arrives_s.get(s, 0.0) for s in storages), default=0.0)

    def take_ended(self, now_s: float) -> list[_Leaving]:
        """Return what has left by now, once."""
        ended = [one for one in self.leaving if one.end_s <= now_s]
        self.leaving = [one for one in self.leaving if one.end_s > now_s]
        return ended

    def _copy_s(self, storages: Sequence[int]) -> float:
        if self._bytes_per_s is None:
            raise ScheduleError(
                "`link_bytes_per_s=None` but the schedule offloads: give the measured bandwidth to host memory."
            )
        return sum(self._storage_bytes[s] for s in storages) / self._bytes_per_s
