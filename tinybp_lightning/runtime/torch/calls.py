"""Turn the calls of a module's units, as steps were seen to make them, into the chain that is planned.

A step need not make all the calls that another makes (stochastic depth, a branch on data), nor with tensors of one
size. A plan for the `LargestStep` serves every smaller step, because calls are found by unit and number.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId
from tinybp_lightning.runtime.profile import StepMeasurement

__all__ = ["CallCost", "DroppedStep", "LargestStep"]

_LARGER = 1.02
"""Bytes that differ by less count as equal: allocators round, and a plan has that much slack."""


@dataclass(slots=True)
class CallCost:
    """The intercepted call `number` of `unit` in a step, measured while it ran.

    If it `is_dropped`, `saved_bytes` is what it saved for backward and `guard_bytes` what is kept to replay it.
    """

    unit: str
    number: int
    input_bytes: int
    forward_s: float = 0.0
    saved_bytes: int = 0
    guard_bytes: int = 0
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class DroppedStep:
    """A step that dropped what every one of its `calls` saved; `measured` if it was traced."""

    measured: StepMeasurement | None = None
    calls: tuple[CallCost, ...] = ()

    def working_bytes(self) -> dict[tuple[str, int], int]:
        """Return what each call's backward needed beside its saved set and what the forward left, by unit and number.

        Gradients of weights that several calls share wait there until the last of them, so calls of one unit differ.
        Where the graph is kept, so are the saved sets, and what the last backward needed beside its own comes on top of
        all that a plan keeps: it counts for every call.
        """
        if (measured := self.measured) is None:
            return {}
        peaks = measured.replay_peak_bytes
        working = {
            (call.unit, call.number): max(0, peaks.get(n, 0) - measured.forward_end_bytes - call.saved_bytes)
            for n, call in enumerate(self.calls)
        }
        return dict.fromkeys(working, max(working.values(), default=0)) if measured.keeps_graph else working


class LargestStep:
    """The calls of the largest step that may come: each call that some step made, with the most it was given and saved.

    It does not change: what is learned makes another.
    """

    def __init__(self, calls: Sequence[CallCost] = ()) -> None:
        self._calls = tuple(calls)
        self._places = {(call.unit, call.number): place for place, call in enumerate(calls)}

    def place(self, call: CallCost) -> int | None:
        """Return which block `call` is; `None` if it is unknown, or larger than it was known to be."""
        place = self._places.get((call.unit, call.number))
        if place is None or call.input_bytes > _LARGER * self._calls[place].input_bytes:
            return None
        return place

    def with_calls(self, calls: Sequence[CallCost]) -> "LargestStep":
        """Return the largest step after one that made `calls`: this object if it needs no change."""
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
        return self if tuple(known) == self._calls else LargestStep(known)

    def without(self, units: Collection[str]) -> "LargestStep":
        """Return the step without the calls of `units`: this object if it has none."""
        left = [call for call in self._calls if call.unit not in units]
        return self if len(left) == len(self._calls) else LargestStep(left)

    def is_whole(self, calls: Sequence[CallCost]) -> bool:
        """Return whether a step that made `calls` was as large as any may be."""
        made = {self.place(call): call for call in calls}
        return all(
            place in made and made[place].input_bytes * _LARGER >= known.input_bytes
            for place, known in enumerate(self._calls)
        )

    def chain(self, dropped: DroppedStep) -> Chain:
        """Return the calls as a chain whose boundaries are empty: what calls pass on is not the plan's to drop.

        What was alive when the forward of `dropped` ended, less what guards the replays, is alive in plain training
        too, and stands at boundary 0, which is live from outside. What the backward of a call needed beside that and
        its saved set is its block's; a call that was not seen counts as the one that needed most. A larger step has
        more of both, in proportion to its inputs.
        """
        live_bytes, working = 0, dropped.working_bytes()
        if (measured := dropped.measured) is not None:
            live_bytes = max(0, measured.forward_end_bytes - sum(c.guard_bytes for c in dropped.calls))
        all_calls, one_call = self._times_larger(dropped.calls)
        boundaries = tuple(Boundary((StorageId(0),), 0) for _ in range(len(self._calls) + 1))
        most_bytes = max(working.values(), default=0)
        blocks = tuple(
            _block(call, int(one_call * working.get((call.unit, call.number), most_bytes))) for call in self._calls
        )
        guard_bytes = sum(c.guard_bytes for c in self._calls)
        return Chain((int(all_calls * live_bytes),), blocks, boundaries, unmodelled_bytes=guard_bytes)

    def _times_larger(self, dropped: Sequence[CallCost]) -> tuple[float, float]:
        """Return how many times larger the inputs of this step are than those of `dropped`: of all calls, of any."""
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
