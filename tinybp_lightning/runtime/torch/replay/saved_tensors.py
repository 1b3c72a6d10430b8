"""Where do saved tensors go while they are virtual? A `SavedTensors` holds, for one block, what its first run saved.

Only slots that autograd still holds are filled: the book keeps weak references.

Note [Saved again]
    Several ops may save one tensor: the three products that read what one norm made. The replay need not get to the
    later ones, which repeats all products but the last: what they save is filled as a view of what the first one saved.
    That holds as long as nothing changes the tensor in place between the two, and a change may hide from the version
    counter (`x.data.add_`). So it is done for blocks whose ops are known to change no activation.

Note [Spare ops]
    A block's code marks the ops whose results no saved tensor is made of, by its record. The first run notes which
    positions each of them saved. A replay that stops early runs it until the last of these is filled, or not at all.
    Where one that should save nothing did save, in a dtype that the record did not see, all are run.
"""

import contextlib
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tinybp_lightning.capture.torch.op_filter import filtered_by
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.runtime.torch.replay.ambient import closing_regions
from tinybp_lightning.runtime.torch.replay.blocks import has_storage
from tinybp_lightning.runtime.torch.replay.places import fills_after_saving, running_op
from tinybp_lightning.runtime.torch.replay.slots import ADVICE, Alias, Reference, Slot, alias_of, offset_bytes, view_of

__all__ = ["SavedTensors", "StopOp", "StopReplay", "forget", "never_unpacked"]


def forget(_: torch.Tensor) -> Any:
    """Pack hook that throws a saved tensor away: its graph is never run backward."""
    return None


def never_unpacked(_: Any) -> torch.Tensor:
    """Unpack hook of a graph that is never run backward."""
    raise AssertionError("a replayed graph is never run backward")


class StopReplay(Exception):  # noqa: N818 - control flow, never an error
    """The last saved tensor of the block has been filled; its outputs are not wanted."""


class StopOp(Exception):  # noqa: N818 - control flow, never an error
    """The last saved tensor of a spare op has been filled; its result is not wanted."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What a replay must save again at the same position."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Positions:
    """What one op saved: positions from `start` to `stop`. Those that a replay must fill end at `needed`."""

    start: int
    needed: int
    stop: int


class SavedTensors:
    """One block's saved tensors, in the order in which autograd saved them.

    **Arguments:** `block`, `name`: its number, and what messages call it; `state`: the leaves that it starts from;
    `is_out_of_place`: whether its ops change no activation. See Note [Saved again].
    """

    def __init__(
        self,
        block: int,
        external_storages: frozenset[int],
        state: Sequence[Any],
        *,
        name: str | None = None,
        is_out_of_place: bool = False,
    ) -> None:
        self._block = block
        self._name = str(block) if name is None else name
        self._external = external_storages
        self._inputs: dict[int, tuple[int, torch.Tensor, int]] = {}
        for i, t in enumerate(state):
            if isinstance(t, torch.Tensor) and has_storage(t):
                self._inputs.setdefault(storage_key(t), (i, t, t._version))
        self._forms: list[_Form] = []
        self._slots: list[weakref.ref[Slot] | None] = []
        self._aliases: list[Alias] = []
        self._is_out_of_place = is_out_of_place
        self._saved_first: dict[int, tuple[int, int, int]] = {}  # by storage: position, offset in bytes, version
        self._again: dict[int, list[Alias]] = {}  # by the position that is filled with them
        # Weak references keep a storage's identity, not its bytes, so that the next one cannot be taken for it.
        self._dropped: dict[int, tuple[StorageWeakRef, int]] = {}
        self._spare: dict[int, _Positions] = {}  # by number: what the op saved
        self._may_leave_out = True
        self._stop_op_at = -1
        self.num_replayed = 0

    def pack(self, t: torch.Tensor) -> Slot | Reference:
        """First sweep: take a saved tensor, return what autograd holds instead."""
        position = len(self._slots)
        self._forms.append(_Form(t.shape, t.dtype, t.device))
        key = storage_key(t) if has_storage(t) else None
        if key is not None and key in self._external:
            self._slots.append(None)
            return Reference(self._block, t.detach() if t.grad_fn is not None else t, t._version)
        slot = Slot(self._block, position)
        self._slots.append(weakref.ref(slot))
        source = None if key is None else self._inputs.get(key)
        first = None if key is None else self._saved_first.get(key)
        if source is not None and source[2] == t._version:
            self._aliases.append(alias_of(slot, source[0], t, offset_bytes(source[1])))
        elif first is not None and first[2] == t._version:
            self._again.setdefault(first[0], []).append(alias_of(slot, first[0], t, first[1]))
        else:
            self.num_replayed = position + 1
            if key is not None:
                storage = t.untyped_storage()
                self._dropped[key] = (StorageWeakRef(storage), storage.nbytes())
                if self._is_out_of_place:
                    self._saved_first[key] = (position, offset_bytes(t), t._version)
        return slot

    def note_skippable(self, number: int, run: Callable[[], Any], *, is_silent: bool) -> Any:
        """First sweep: run a spare op, and note what it saves. See Note [Spare ops]."""
        start = len(self._slots)
        result = run()
        self._spare[number] = saved = _Positions(start, max(start, self.num_replayed), len(self._slots))
        if is_silent and saved.needed > start:
            self._may_leave_out = False
        return result

    def _run_spare(self, number: int, run: Callable[[], Any], *, is_silent: bool) -> Any:
        """Replay: run a spare op as far as its last saved tensor that is needed."""
        if not self._may_leave_out:
            return run()
        saved = self._spare[number]
        self._check_place(saved.start)
        if saved.needed > saved.start:
            self._stop_op_at = saved.needed
            try:
                with closing_regions():  # what it entered, and is not left to leave
                    result = run()
            except StopOp:
                pass
            else:
                self._check_place(saved.stop)
                return result
            finally:
                self._stop_op_at = -1
        self._filled = saved.stop
        return None

    def _check_place(self, expected: int) -> None:
        """Raise `ReplayError` if the replay has saved another number of tensors than the first run had by then."""
        if self._filled != expected:
            raise ReplayError(
                f"the replay of block `{self._name}` has saved {self._filled} tensors where it had saved {expected} in "
                f"the forward: before {_place()}. {ADVICE}"
            )

    def dropped_bytes(self, outputs: Sequence[Any]) -> int:
        """Return the bytes of the storages that the block saved and did not make its `outputs` of."""
        kept = {storage_key(t) for t in outputs if isinstance(t, torch.Tensor) and has_storage(t)}
        return sum(size_bytes for key, (_, size_bytes) in self._dropped.items() if key not in kept)

    def close(self) -> None:
        """End of the block's first run: let go of the inputs."""
        self._inputs.clear()

    def fill_aliases(self, state: Sequence[Any]) -> None:
        """Fill the slots that are views of the boundary's leaves."""
        for alias in self._aliases:
            slot = alias.slot()
            if slot is not None:
                slot.fill(view_of(state[alias.source], alias))

    def fill_again(self, position: int, t: torch.Tensor) -> None:
        """Fill the slots of what was saved again as views of `t`, which the replay saves at `position`."""
        for alias in self._again.get(position, ()):
            slot = alias.slot()
            if slot is not None:
                slot.fill(view_of(t, alias))

    @contextlib.contextmanager
    def filling(self, *, stops_early: bool) -> Generator[Callable[[torch.Tensor], torch.Tensor | None]]:
        """Give the pack hook of a replay: it fills the slots that are alive, in order."""
        self._filled = 0

        def pack(t: torch.Tensor) -> torch.Tensor | None:
            position = self._filled
            self._filled += 1
            self.check(position, t)
            reference = self._slots[position]
            slot = reference() if reference is not None else None
            if slot is not None:
                slot.fill(t.detach())  # not detached, a saved output would hold itself alive (a cycle gc cannot see)
            self.fill_again(position, t)
            if stops_early and self._filled in (self.num_replayed, self._stop_op_at) and not fills_after_saving():
                raise StopReplay if self._filled == self.num_replayed else StopOp
            return None

        leaving_out = filtered_by(self._run_spare) if stops_early else contextlib.nullcontext()
        with closing_regions(), leaving_out:
            yield pack

    def check_complete(self, name: str) -> None:
        """Raise `ReplayError` if the replay saved fewer tensors than the first run."""
        if self._filled != len(self._slots):
            raise ReplayError(
                f"block `{name}` saved {len(self._slots)} tensors in the forward and {self._filled} in its "
                f"replay. {ADVICE}"
            )

    def check_values(self) -> None:
        """End of a replay: nothing to compare, see `CheckedSavedTensors`."""

    def check(self, position: int, t: torch.Tensor) -> None:
        """Raise `ReplayError` if a replay must not save `t` at `position`."""
        if position >= len(self._forms):
            raise ReplayError(
                f"the replay of block `{self._name}` saved more than its {len(self._forms)} tensors: "
                f"{_place()} saved another. {ADVICE}"
            )
        form = self._forms[position]
        if (t.shape, t.dtype, t.device) != (form.shape, form.dtype, form.device):
            raise ReplayError(
                f"the replay of block `{self._name}` saved {tuple(t.shape)} {t.dtype} on {t.device} at position "
                f"{position}, expected {tuple(form.shape)} {form.dtype} on {form.device}: {_place()} saved it. {ADVICE}"
            )


def _place() -> str:
    return running_op() or "compiled code"
