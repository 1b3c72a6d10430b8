"""What does the engine run? A `RunnableBlock`: one block as a function from one boundary's leaves to the next one's.

A boundary's state is a flat list of leaves. `NonBoundaryInputs` (parameters, buffers, the batch) are not part of any
boundary: the caller holds them for the whole step, so they are passed by reference and cost nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.errors import ReplayError

__all__ = ["GraphBlock", "NonBoundaryInputs", "RunnableBlock", "copies", "fresh_leaves", "has_storage"]


class RunnableBlock(Protocol):
    """One block, runnable any number of times with the same result."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers, so that its generator state must be kept; asked again after `first`."""
        ...

    @property
    def is_out_of_place(self) -> bool:
        """Whether its ops are known to change no activation, so that what is saved twice is the same both times."""
        ...

    def first(self, state: list[Any]) -> list[Any]:
        """Run for the first time: take the leaves of boundary i (emptied), return those of boundary i + 1."""
        ...

    def again(self, state: list[Any]) -> list[Any]:
        """Run again: the same results, without repeating side effects such as running statistics."""
        ...


@dataclass(slots=True)
class NonBoundaryInputs:
    """The values of one forward that no boundary carries, and the versions of those that are tensors."""

    values: list[Any]
    versions: list[int | None]
    storages: frozenset[int]

    @classmethod
    def of(cls, values: Sequence[Any]) -> "NonBoundaryInputs":
        """Note the versions and storages of `values` as they are now."""
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        return cls(
            list(values),
            [v._version if isinstance(v, torch.Tensor) else None for v in values],
            frozenset(storage_key(t) for t in tensors if has_storage(t)),
        )

    def value(self, index: int, reader: str) -> Any:
        """Return external `index` for a replay. Raises `ReplayError` if it was changed in place since the forward."""
        value, version = self.values[index], self.versions[index]
        if version is not None and value._version != version:
            raise ReplayError(
                f"block `{reader}` cannot be replayed: an input or parameter of shape {tuple(value.shape)} was changed "
                f"in place after the forward (version {value._version}, expected {version}). "
                "Call backward before optimizer.step(), or change a copy."
            )
        return value


def has_storage(t: torch.Tensor) -> bool:
    """Whether `t` is a plain tensor whose storage can be compared (not a subclass that hides its own)."""
    return type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided


def fresh_leaves(leaves: Sequence[Any], wants: Sequence[bool]) -> list[Any]:
    """Return aliases of a boundary's leaves as a first run would see them: same gradients wanted, not graph leaves.

    A tensor that is no graph leaf may be changed in place, as in the forward. Memory is shared with `leaves`.
    """
    with torch.enable_grad():
        return [
            _interior(t.detach().requires_grad_()) if isinstance(t, torch.Tensor) and wanted else t
            for t, wanted in zip(leaves, wants, strict=True)
        ]


def _interior(t: torch.Tensor) -> torch.Tensor:
    return t.view_as(t)


def copies(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return graph leaves with the same values, strides and wish for a gradient; what shared memory still does."""
    counts = Counter(storage_key(t) for t in tensors.values() if has_storage(t))
    storages: dict[int, torch.UntypedStorage] = {}
    return {i: _copy(t, counts, storages).requires_grad_(t.requires_grad) for i, t in tensors.items()}


def _copy(t: torch.Tensor, counts: Mapping[int, int], storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    if not has_storage(t) or t.is_conj() or t.is_neg():
        return t.detach().clone()
    key = storage_key(t)
    if counts[key] == 1 and t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes:
        return t.detach().clone()  # a tenth of what the general way costs: a norm has three buffers
    if key not in storages:
        storages[key] = t.untyped_storage().clone()
    whole = torch.empty(0, dtype=t.dtype, device=t.device)
    return whole.set_(storages[key], t.storage_offset(), t.shape, t.stride())


class GraphBlock:
    """A piece of a traced graph, bound to the externals of one forward, and the option by which all its runs go."""

    def __init__(self, piece: Piece, externals: NonBoundaryInputs, option: int = 0) -> None:
        self._piece = piece
        self._call = piece.calls[option]
        self._externals = externals
        self._snapshots: dict[int, torch.Tensor] = {}

    @property
    def name(self) -> str:
        """For messages."""
        return self._piece.span.name

    @property
    def is_random(self) -> bool:
        """Whether some op of it draws random numbers."""
        return self._piece.is_random

    @property
    def is_out_of_place(self) -> bool:
        """Whether no op of it changes an activation."""
        return self._piece.is_out_of_place

    def first(self, state: list[Any]) -> list[Any]:
        """Run for the first time, on the caller's own values."""
        values = self._externals.values
        # What the forward changes in place is kept as it was: a replay works on a copy of that (Note [Buffers]).
        self._snapshots = copies({i: values[i] for i in self._piece.guarded})
        if not self._piece.is_compiled:
            return self._run(state, {})
        # A compiled block may save what it was given where the user's code saves a copy (AOTAutograd takes a `clone`
        # for nothing): it must not be given what a later block changes. It works on copies, which are written back.
        # A parameter is given as it is, or its gradient would be the copy's.
        taken = {i: t for i, t in self._snapshots.items() if not t.requires_grad}
        written = [i for i in self._piece.written if i in taken]
        working = taken | copies({i: taken[i] for i in written})
        results = self._run(state, working)
        for i in written:
            values[i].copy_(working[i])
        return results

    def again(self, state: list[Any]) -> list[Any]:
        """Run again, on copies of what the forward changed, and on memory without values where none is read."""
        values = self._externals.values
        instead = copies(self._snapshots)
        for s in self._piece.reads:
            if s.origin != EXTERNAL or s.index in instead:
                continue
            if s.index in self._piece.volatile:
                instead[s.index] = torch.empty_like(values[s.index])
            else:
                self._externals.value(s.index, self.name)  # checks that it is what it was
        return self._run(state, instead)

    def _run(self, state: list[Any], instead: Mapping[int, torch.Tensor]) -> list[Any]:
        """Run the piece, on `instead` where it names an external."""
        values = self._externals.values
        arguments = [
            (instead[s.index] if s.index in instead else values[s.index]) if s.origin == EXTERNAL else state[s.index]
            for s in self._piece.reads
        ]
        carried = {s.index: state[s.index] for s in self._piece.state if s.origin == STATE}
        state.clear()
        made = self._call(arguments)
        return [made[s.index] if s.origin == MADE else carried[s.index] for s in self._piece.state]
