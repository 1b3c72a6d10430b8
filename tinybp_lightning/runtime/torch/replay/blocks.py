"""Run one block as a function from one boundary's leaves to the next one's.

A boundary's state is a flat list of leaves. `NonBoundaryInputs` (parameters, buffers, the batch) are not part of any
boundary: the caller holds them for the whole step, so they are passed by reference and cost nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tinybp_lightning.capture.torch.ambient import has_generators_of_users
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.errors import ReplayError

__all__ = ["GraphBlock", "NonBoundaryInputs", "RunnableBlock", "copies", "fresh_leaves", "has_storage", "version_of"]


class RunnableBlock(Protocol):
    """One block, which the engine can run any number of times with the same result.

    `is_random`: it may draw random numbers. `is_out_of_place`: no op changes an activation.
    `has_regions`: its code changes settings, and may be stopped before it has changed them back.
    """

    name: str
    is_random: bool
    is_out_of_place: bool
    has_regions: bool

    def first(self, state: list[Any]) -> list[Any]:
        """Run for the first time: empty `state`, the leaves of boundary i, and return those of boundary i + 1."""
        ...

    def again(self, state: list[Any]) -> list[Any]:
        """Return the same results again, without repeating side effects such as running statistics."""
        ...


@dataclass(frozen=True, slots=True)
class NonBoundaryInputs:
    """The values of one forward that no boundary carries, and the versions of those that are tensors.

    `copies`: what replays read in place of some of them.
    """

    values: list[Any]
    versions: list[int | None]
    storages: frozenset[int]
    copies: Mapping[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    @classmethod
    def of(cls, values: Sequence[Any], copied: Iterable[int] = ()) -> "NonBoundaryInputs":
        """Note the versions and storages of `values` as they are now, and copy those at the positions `copied`."""
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        return cls(
            list(values),
            [version_of(v) for v in values],
            frozenset(storage_key(t) for t in tensors if has_storage(t)),
            copies({i: values[i] for i in copied}),
        )

    def check(self, index: int, reader: str) -> None:
        """Raise `ReplayError` if input `index`, which `reader` is about to read, was changed in place since."""
        value, version = self.values[index], self.versions[index]
        if version is not None and value._version != version:
            raise ReplayError(
                f"block `{reader}` cannot be replayed: an input or parameter of shape {tuple(value.shape)} was changed "
                f"in place after the forward (version {value._version}, expected {version}). "
                "Call backward before optimizer.step(), or change a copy."
            )


def version_of(value: Any) -> int | None:
    """Return how often a tensor was changed in place; `None` for what has no count (an inference tensor, a number)."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def has_storage(t: torch.Tensor) -> bool:
    """Return whether `t` is a plain tensor whose storage can be compared (not a subclass that hides its own)."""
    return type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided


def fresh_leaves(leaves: Sequence[Any], wants: Sequence[bool]) -> list[Any]:
    """Return aliases of a boundary's leaves as a first run sees them: not graph leaves, so they may change in place."""
    with torch.enable_grad():
        return [
            t.detach().requires_grad_().view_as(t) if isinstance(t, torch.Tensor) and wanted else t
            for t, wanted in zip(leaves, wants, strict=True)
        ]


def copies(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return copies as graph leaves, with the same values and strides; those that shared memory still do."""
    counts = Counter(storage_key(t) for t in tensors.values() if has_storage(t))
    storages: dict[int, torch.UntypedStorage] = {}
    return {i: _copy(t, counts, storages).requires_grad_(t.requires_grad) for i, t in tensors.items()}


def _copy(t: torch.Tensor, counts: Mapping[int, int], storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    if not has_storage(t) or t.is_conj() or t.is_neg():
        return t.detach().clone()
    key = storage_key(t)
    if counts[key] == 1 and t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes:
        return t.detach().clone()  # takes a tenth of the general way's time, and a norm has three buffers
    if key not in storages:
        storages[key] = t.untyped_storage().clone()
    whole = torch.empty(0, dtype=t.dtype, device=t.device)
    return whole.set_(storages[key], t.storage_offset(), t.shape, t.stride())


class GraphBlock:
    """A piece of a traced graph, bound to the non-boundary inputs of one forward and to the option of all its runs."""

    def __init__(self, piece: Piece, inputs: NonBoundaryInputs, option: int = 0) -> None:
        self.name = piece.span.name
        self.is_random = piece.is_random or has_generators_of_users()
        self.has_regions = piece.has_regions
        self.is_out_of_place = piece.is_out_of_place
        self._piece = piece
        self._call = piece.calls[option]
        self._inputs = inputs
        self._before: dict[int, torch.Tensor] = {}  # copies of the inputs that some block changes

    def first(self, state: list[Any]) -> list[Any]:
        """Run for the first time, on the caller's own values."""
        values = self._inputs.values
        self._before = copies({i: values[i] for i in self._piece.guarded})  # See Note [Buffers] in engine.py
        if not self._piece.is_compiled:
            return self._run(state, {})
        # A compiled block may save what it was given where the user's code saves a copy (AOTAutograd drops a `clone`),
        # so it must not be given what a later block changes. It works on copies, which are written back. A parameter is
        # given as it is: a copy would get its gradient.
        taken = {i: t for i, t in self._before.items() if not t.requires_grad}
        written = [i for i in self._piece.written if i in taken]
        working = taken | copies({i: taken[i] for i in written})
        results = self._run(state, working)
        for i in written:
            values[i].copy_(working[i])
        return results

    def again(self, state: list[Any]) -> list[Any]:
        """Run again on copies of what the forward changed, and on uninitialised memory where no value is read."""
        instead = copies(self._before)
        for s in self._piece.reads:
            if s.origin != EXTERNAL or s.index in instead:
                continue
            if s.index in self._inputs.copies:
                instead[s.index] = self._inputs.copies[s.index]
            elif s.index in self._piece.volatile:
                instead[s.index] = torch.empty_like(self._inputs.values[s.index])
            else:
                self._inputs.check(s.index, self.name)
        return self._run(state, instead)

    def _run(self, state: list[Any], instead: Mapping[int, torch.Tensor]) -> list[Any]:
        """Run the piece, with `instead` in place of the inputs that it names."""
        values = self._inputs.values
        arguments = [
            instead.get(s.index, values[s.index]) if s.origin == EXTERNAL else state[s.index] for s in self._piece.reads
        ]
        carried = {s.index: state[s.index] for s in self._piece.state if s.origin == STATE}
        state.clear()
        made = self._call(arguments)
        return [made[s.index] if s.origin == MADE else carried[s.index] for s in self._piece.state]
