"""What do the calls of a module's parts cost, and which of them does a step make?

A step need not make all that another makes (stochastic depth, a branch on data), nor with tensors of one size. So a
`CallBook` holds the largest step that may come, by what has been seen: each call that some step made, with the most
that it was given and saved. A plan for that serves every smaller step, by which call is meant and not by its place.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId
from tinybp_lightning.runtime.torch.measure.step_monitor import StepMeasurement

__all__ = ["CallBook", "CallCost"]

_LARGER = 1.02
"""Bytes that differ by less are the same: allocators round, and a plan has that much room."""


@dataclass(slots=True)
class CallCost:
    """One intercepted call, measured while it ran. `number`: which call of `unit` in the step it is.

    `input_bytes` are those of the tensors that it was given. Where it `is_dropped`, `saved_bytes` is what it saved and
    `guard_bytes` what replaying it keeps; both are 0 where it is not.
    """

    unit: str
    number: int
    input_bytes: int
    forward_s: float = 0.0
    saved_bytes: int = 0
    guard_bytes: int = 0
    is_dropped: bool = False


class CallBook:
    """The calls of the largest step there may be, in one order. It does not change: what is learned makes another."""

    def __init__(self, calls: Sequence[CallCost] = ()) -> None:
        self._calls = tuple(calls)
        self._places = {(call.unit, call.number): place for place, call in enumerate(calls)}

    def place(self, call: CallCost) -> int | None:
        """Return the block that `call` is; `None` where it is not known, or larger than it was known to be."""
        place = self._places.get((call.unit, call.number))
        if place is None or call.input_bytes > _LARGER * self._calls[place].input_bytes:
            return None
        return place

    def with_calls(self, calls: Sequence[CallCost]) -> "CallBook":
        """Return the book with the calls of a step taken in: this one where the largest step is what it was."""
        known, places, at = list(self._calls), dict(self._places), -1
        for call in calls:
            place = places.get((call.unit, call.number))
            if place is None:
                at += 1
                known.insert(at, call)
                places = {(k.unit, k.number): n for n, k in enumerate(known)}
                continue
            at, largest = place, known[place]
            is_larger = call.input_bytes > _LARGER * largest.input_bytes
            if is_larger or call.saved_bytes > _LARGER * largest.saved_bytes:
                known[place] = replace(
                    call,
                    input_bytes=max(call.input_bytes, largest.input_bytes),
                    saved_bytes=max(call.saved_bytes, largest.saved_bytes),
                    guard_bytes=max(call.guard_bytes, largest.guard_bytes),
                )
        return self if tuple(known) == self._calls else CallBook(known)

    def without(self, units: Collection[str]) -> "CallBook":
        """Return the book without the calls of `units`: this one where it has none."""
        left = [call for call in self._calls if call.unit not in units]
        return self if len(left) == len(self._calls) else CallBook(left)

    def is_whole(self, calls: Sequence[CallCost]) -> bool:
        """Return whether a step was as large as any may be."""
        made = {self.place(call): call for call in calls}
        return all(
            place in made and made[place].input_bytes * _LARGER >= known.input_bytes
            for place, known in enumerate(self._calls)
        )

    def chain(self, measured: StepMeasurement | None, dropped: Sequence[CallCost]) -> Chain:
        """Return the calls as a chain with nothing between the blocks: what they hold there is not the plan's to drop.

        What was alive when the forward ended, less what guards the replays, is alive in plain training too (boundary 0,
        held throughout); what backward had beside that and the widest saved set is any block's backward. A larger step
        has more of both: as much as more is given to its calls.

        **Arguments:** `measured`: a step with every block dropped, and `dropped` its calls.
        """
        widest_bytes = max((c.saved_bytes for c in dropped), default=0)
        held_bytes = working_bytes = 0
        if measured is not None:
            held_bytes = max(0, measured.forward_end_bytes - sum(c.guard_bytes for c in dropped))
            working_bytes = max(0, measured.peak_bytes - measured.forward_end_bytes - widest_bytes)
        all_calls, one_call = self._times_larger(dropped)
        boundaries = tuple(Boundary((StorageId(0),), 0) for _ in range(len(self._calls) + 1))
        blocks = tuple(_block(call, int(one_call * working_bytes)) for call in self._calls)
        guard_bytes = sum(c.guard_bytes for c in self._calls)
        return Chain((int(all_calls * held_bytes),), blocks, boundaries, workspace_bytes=guard_bytes)

    def _times_larger(self, dropped: Sequence[CallCost]) -> tuple[float, float]:
        """How many times what a step's calls were given is given to all of the largest step, and to any one of it."""
        given_bytes = sum(call.input_bytes for call in dropped)
        if not given_bytes:
            return 1.0, 1.0
        largest = [(call, self._places.get((call.unit, call.number))) for call in dropped if call.input_bytes]
        each = [self._calls[place].input_bytes / call.input_bytes for call, place in largest if place is not None]
        return max(1.0, sum(call.input_bytes for call in self._calls) / given_bytes), max([1.0, *each])


def _block(call: CallCost, working_bytes: int) -> Block:
    option = SavedSet(
        name="all",
        storages=(),
        saved_bytes=call.saved_bytes,
        save_peak_bytes=call.saved_bytes,
        replay_s=call.forward_s,
        replay_peak_bytes=call.saved_bytes,
        backward_s=call.forward_s,
        backward_peak_bytes=working_bytes,
    )
    return Block(call.unit, call.unit, call.forward_s, 0, 0, (option,))
