"""Hold what one block's first run saved, and fill it in again when the block is replayed.

Every saved tensor of a dropped block is one of three things. A *reference* aliases a non-boundary input (a parameter,
the batch): autograd holds it as it is. A *view* aliases a leaf of the boundary before the block, and is rebuilt from
that leaf. Everything else must be *replayed*. In place of the last two autograd holds a `Slot`, which is filled only if
autograd still holds it: this module keeps weak references.

Note [Saved again]
    Several ops may save one tensor: the three products that read what one norm made. The replay need not reach the
    later ones, so it repeats only the first: the later slots are filled with views of what the first op saved. That
    holds as long as nothing changes the tensor in place between the two, and a change may hide from the version counter
    (`x.data.add_`). So it is done only for blocks whose ops are known not to change any activation.

Note [Skippable ops]
    A block's code marks the ops whose results no saved tensor is made of, according to the recorded graph. The first
    run notes which positions each of them saved. A replay that stops early runs such an op until the last of these
    positions is filled, or not at all. If an op that the record calls silent did save something (in a dtype that the
    record did not see), the replay runs all of them.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tinybp_lightning.capture.torch.ambient import closing_regions
from tinybp_lightning.capture.torch.op_filter import filtered_by
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.runtime.torch.replay.bits import UnwrittenOutputs, same_bits
from tinybp_lightning.runtime.torch.replay.blocks import has_storage
from tinybp_lightning.runtime.torch.replay.source_op import fills_after_saving, running_op

__all__ = ["ADVICE", "Reference", "SavedTensors", "Slot", "discarding", "never_unpacked"]

ADVICE = (
    "The block does not do the same thing twice: one of its ops is not deterministic "
    "(torch.use_deterministic_algorithms(True) makes it so, or names it), or it reads state that it changes "
    "(a counter, a cache, a generator of its own). `tbp.keep(module)` makes a module run only once."
)


def discarding() -> contextlib.AbstractContextManager[Any]:
    """Throw away what the body saves: its graph never runs backward."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, never_unpacked)


def never_unpacked(_: Any) -> torch.Tensor:
    """Unpack hook of a graph that never runs backward."""
    raise AssertionError("a replayed graph never runs backward")


class _StopReplay(Exception):  # noqa: N818 - control flow, never an error
    """The replay has filled the last saved tensor of its block, or of a skippable op; what that makes is not read."""


class _Filling(contextlib.AbstractContextManager[Callable[[torch.Tensor], None]]):
    """Ends its body at `_StopReplay`.

    It is a class because a generator that swallows an exception makes a cycle in CPython 3.12: the traceback, and with
    it what the frames of the replay hold, would stay until the garbage collector runs.
    """

    def __init__(
        self, saved: "SavedTensors", body: contextlib.AbstractContextManager[Callable[[torch.Tensor], None]]
    ) -> None:
        self._saved = saved
        self._body = body

    def __enter__(self) -> Callable[[torch.Tensor], None]:
        return self._body.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._body.__exit__(kind, error, trace)
        if not isinstance(error, _StopReplay):
            return False
        self._saved.stop()
        return True


@dataclass(slots=True, weakref_slot=True, eq=False)
class Slot:
    """What autograd holds in place of one saved tensor: `value` is filled just before autograd needs it."""

    block: int
    position: int
    value: torch.Tensor | None = None
    version: int = 0

    def fill(self, value: torch.Tensor) -> None:
        """Put in a tensor that shares its version counter with the one that the replay goes on with."""
        self.value, self.version = value, value._version

    def read(self, reader: str) -> torch.Tensor:
        """Return the tensor. Raises `ReplayError` if it is missing, or changed since it was filled."""
        if self.value is None:
            raise ReplayError(
                f"block `{reader}` saved tensor {self.position} in the forward, but its replay did not. {ADVICE}"
            )
        if self.value._version != self.version:  # autograd leaves this check to the pack hook's owner
            raise ReplayError(
                f"block `{reader}` needs a tensor of shape {tuple(self.value.shape)} for its gradient, but changed it "
                f"in place after it was saved (version {self.value._version}, expected {self.version}). Plain training "
                "cannot do that either: use the out-of-place form of the op that changes it."
            )
        return self.value


@dataclass(frozen=True, slots=True)
class Reference:
    """A saved tensor that aliases a non-boundary input: held and checked as plain autograd does."""

    block: int
    tensor: torch.Tensor
    version: int

    def tensor_checked(self, reader: str) -> torch.Tensor:
        """Return the tensor. Raises `ReplayError` if it was changed in place since the forward."""
        if self.tensor._version != self.version:
            raise ReplayError(
                f"block `{reader}` needs a tensor of shape {tuple(self.tensor.shape)} for its gradient, but it was "
                f"changed in place after the forward (version {self.tensor._version}, expected {self.version}). Call "
                "backward before that change, or change a copy."
            )
        return self.tensor


@dataclass(frozen=True, slots=True)
class _View:
    """How a slot's tensor views its source, from whose first element `offset_bytes` is counted."""

    slot: "weakref.ref[Slot]"
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset_bytes: int

    def of(self, source: torch.Tensor) -> torch.Tensor:
        """Return the view of `source`, which holds what the first run's source held."""
        base = source.detach()
        start_bytes = _offset_bytes(base) + self.offset_bytes
        if self.dtype != base.dtype:
            whole = torch.empty(0, dtype=self.dtype, device=base.device)
            return whole.set_(base.untyped_storage(), start_bytes // whole.element_size(), self.shape, self.stride)
        return base.as_strided(self.shape, self.stride, start_bytes // base.element_size())


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor that later saved tensors may view, as the first run met it; `held` keeps its storage from reuse."""

    version: int
    offset_bytes: int
    views: list[_View]
    held: torch.Tensor | None = None

    def add_view(self, slot: Slot, t: torch.Tensor) -> None:
        offset_bytes = _offset_bytes(t) - self.offset_bytes
        self.views.append(_View(weakref.ref(slot), t.dtype, t.shape, t.stride(), offset_bytes))


@dataclass(frozen=True, slots=True)
class _Positions:
    """What one op saved: positions from `start` to `stop`. Those that a replay must fill end at `needed`."""

    start: int
    needed: int
    stop: int


class SavedTensors:
    """One block's saved tensors, in the order in which autograd saved them.

    **Arguments:** `outer_storages`: of the non-boundary inputs; `state`: the leaves that the block starts from;
    `is_out_of_place`: its ops are known not to change any activation; `holds`: fill the slots at once, until `release`.
    """

    def __init__(
        self,
        block: int,
        outer_storages: frozenset[int],
        state: Sequence[Any],
        *,
        name: str | None = None,
        is_out_of_place: bool = False,
        holds: bool = False,
    ) -> None:
        self._block = block
        self._name = str(block) if name is None else name
        self._outer_storages = outer_storages
        self._is_out_of_place = is_out_of_place
        self._holds = holds
        self._forms: list[tuple[torch.Size, torch.dtype, torch.device]] = []  # for a replay to match
        self._slots: list[Callable[[], Slot | None]] = []  # weak references
        self._views_of_leaf: dict[int, list[_View]] = {}
        self._views_of_saved: dict[int, list[_View]] = {}  # by the position of the source
        self._leaves: dict[int, _Source] = {}  # by storage, during the first run
        for i, t in enumerate(state):
            if isinstance(t, torch.Tensor) and has_storage(t) and storage_key(t) not in self._leaves:
                views = self._views_of_leaf[i] = []
                self._leaves[storage_key(t)] = _Source(t._version, _offset_bytes(t), views, held=t)
        self._saved_first: dict[int, _Source] = {}  # by storage
        # Weak references keep a storage's identity, not its bytes: no later storage can be mistaken for it.
        self._dropped: dict[int, tuple[StorageWeakRef, int]] = {}
        self._skippable: dict[int, _Positions] = {}  # by the op's number
        self._may_skip = True
        self._stop_op_at = -1
        self.num_replayed = 0

    def pack(self, t: torch.Tensor) -> Slot | Reference:
        """Take a saved tensor, and return what autograd holds instead."""
        position = len(self._slots)
        self._forms.append((t.shape, t.dtype, t.device))
        key = storage_key(t) if has_storage(t) else None
        if key is not None and key in self._outer_storages:
            self._slots.append(lambda: None)
            return Reference(self._block, t.detach() if t.grad_fn is not None else t, t._version)
        slot = Slot(self._block, position)
        if self._holds:
            slot.fill(t.detach())
        self._slots.append(weakref.ref(slot))
        if key is not None:
            for source in (self._leaves.get(key), self._saved_first.get(key)):
                if source is not None and source.version == t._version:
                    source.add_view(slot, t)
                    return slot
            self._dropped[key] = (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes())
            if self._is_out_of_place:
                views = self._views_of_saved[position] = []
                self._saved_first[key] = _Source(t._version, _offset_bytes(t), views)
        self.num_replayed = position + 1
        return slot

    def note_skippable(self, number: int, run: Callable[[], Any], *, is_silent: bool) -> Any:
        """Run a skippable op, and note what it saves. See Note [Skippable ops]."""
        start = len(self._slots)
        result = run()
        self._skippable[number] = saved = _Positions(start, max(start, self.num_replayed), len(self._slots))
        if is_silent and saved.needed > start:
            self._may_skip = False
        return result

    def close(self) -> None:
        """End the first run: release the leaves."""
        self._leaves.clear()

    def release(self) -> None:
        """Empty the slots."""
        for slot_of in self._slots:
            if (slot := slot_of()) is not None:
                slot.value = None

    def held_bytes(self, outputs: Sequence[Any]) -> int:
        """Return the bytes of the storages that the block saved, and holds, and that its `outputs` do not keep alive.

        An op whose results are no longer needed (distances of which only the nearest is) has let go of what it saved.
        """
        kept = {storage_key(t) for t in outputs if isinstance(t, torch.Tensor) and has_storage(t)}
        slots = [slot for slot_of in self._slots if (slot := slot_of()) is not None]
        held = {storage_key(s.value) for s in slots if s.value is not None and has_storage(s.value)}
        return sum(size_bytes for key, (_, size_bytes) in self._dropped.items() if key in held - kept)

    def fill_views(self, state: Sequence[Any]) -> None:
        """Fill the slots that view the boundary's leaves."""
        for leaf, views in self._views_of_leaf.items():
            self._fill_each(views, state[leaf])

    def filling(self, *, stops_early: bool) -> contextlib.AbstractContextManager[Callable[[torch.Tensor], None]]:
        """Fill the slots that are still alive with what the body, a replay, saves; the context is the pack hook.

        With `stops_early` the body is left at the last saved tensor that a slot waits for.
        """
        self._filled, self._is_stopped = 0, False
        return _Filling(self, self._packing(stops_early=stops_early))

    @contextlib.contextmanager
    def _packing(self, *, stops_early: bool) -> Generator[Callable[[torch.Tensor], None]]:
        def pack(t: torch.Tensor) -> None:
            position = self._filled
            self._filled += 1
            self._check_form(position, t)
            self.note_value(position, t)
            if (slot := self._slots[position]()) is not None:
                slot.fill(t.detach())  # not detached, a saved output would hold itself alive (a cycle gc cannot see)
            self._fill_each(self._views_of_saved.get(position, ()), t)
            if stops_early and self._filled in (self.num_replayed, self._stop_op_at) and not fills_after_saving():
                raise _StopReplay

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked)
        skipping = filtered_by(self._run_skippable) if stops_early else contextlib.nullcontext()
        with closing_regions(), skipping, hooks:
            yield pack

    @contextlib.contextmanager
    def comparing(self, changing: Collection[int], *, compares_values: bool) -> Generator[None]:
        """Compare what the body, a whole replay, saves with the slots, which are still filled.

        **Arguments:** `changing`: storages that the first run may have changed since it saved them (statistics);
        `compares_values`: not the forms alone. That takes a dispatch mode, under which nothing compiled runs.

        **Raises:** `ReplayError` at the first tensor that differs.
        """
        self._filled, self._is_stopped = 0, False
        unwritten = UnwrittenOutputs()

        def pack(t: torch.Tensor) -> None:
            position = self._filled
            self._filled += 1
            self._check_form(position, t)
            slot = self._slots[position]()
            held = None if slot is None else slot.value
            if slot is None or held is None or held._version != slot.version or fills_after_saving():
                return  # nobody needs it, or its value then is not to be had
            if not compares_values or t in unwritten or (has_storage(held) and storage_key(held) in changing):
                return
            if not same_bits(held, t):
                raise self._error(f"saved other values than the forward, first by {running_op()}")

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked)
        with hooks, unwritten if compares_values else contextlib.nullcontext():
            yield

    def stop(self) -> None:
        """Note that the replay stopped early."""
        self._is_stopped = True

    def note_value(self, position: int, t: torch.Tensor) -> None:
        """Hear which tensor a replay gave `position`; only `CheckedSavedTensors` listens."""

    def check_values(self) -> None:
        """End a replay; only `CheckedSavedTensors` has something to compare."""

    def check_complete(self) -> None:
        """Raise `ReplayError` if the replay ran to its end and saved fewer tensors than the first run."""
        if not self._is_stopped and self._filled != len(self._slots):
            raise self._error(f"saved {self._filled} tensors, the forward {len(self._slots)}")

    def _fill_each(self, views: Sequence[_View], source: torch.Tensor) -> None:
        for view in views:
            if (slot := view.slot()) is not None:
                slot.fill(value := view.of(source))
                self.note_value(slot.position, value)

    def _run_skippable(self, number: int, run: Callable[[], Any], *, is_silent: bool) -> Any:
        """Run the op up to its last saved tensor that a slot waits for. See Note [Skippable ops]."""
        if not self._may_skip:
            return run()
        saved = self._skippable[number]
        self._check_num_filled(saved.start)
        if saved.needed > saved.start:
            self._stop_op_at = saved.needed
            try:
                with closing_regions():  # the op cannot leave what it entered if it is stopped
                    result = run()
            except _StopReplay:
                if self._filled == self.num_replayed:
                    raise
            else:
                self._check_num_filled(saved.stop)
                return result
            finally:
                self._stop_op_at = -1
        self._filled = saved.stop
        return None

    def _check_num_filled(self, expected: int) -> None:
        if self._filled != expected:
            raise self._error(
                f"has saved {self._filled} tensors where it had saved {expected} in the forward: before {running_op()}"
            )

    def _check_form(self, position: int, t: torch.Tensor) -> None:
        if position >= len(self._forms):
            raise self._error(f"saved more than its {len(self._forms)} tensors: {running_op()} saved another")
        form, expected = (t.shape, t.dtype, t.device), self._forms[position]
        if form != expected:
            raise self._error(
                f"saved {_words(*form)} at position {position}, expected {_words(*expected)}: {running_op()} saved it"
            )

    def _error(self, what: str) -> ReplayError:
        return ReplayError(f"the replay of block `{self._name}` {what}. {ADVICE}")


def _words(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{tuple(shape)} {dtype} on {device}"


def _offset_bytes(t: torch.Tensor) -> int:
    return int(t.storage_offset()) * t.element_size()
