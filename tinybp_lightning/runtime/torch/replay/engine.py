"""Who fills the saved tensors back in? One `Run` per forward: it owns the chain and plays the script.

Note [Flat replay]
    The user's autograd graph is kept; only what its nodes *saved* is virtual. In the first sweep a dropped block runs
    under `saved_tensors_hooks`: each saved tensor becomes a `Slot`. When autograd asks for a slot of block i, the
    engine plays block i's segment: it advances from the nearest stored boundary (saved tensors of these forwards are
    thrown away), re-runs block i and fills the slots that are still alive. Because the original nodes stay,
    `AccumulateGrad`, DDP and FSDP hooks fire once each and in order, and peak memory is the schedule's.

Note [Order]
    Within one backward autograd runs nodes in descending order of creation, so blocks come in descending order and
    each segment finds what the one before left. A second backward (`retain_graph`), a partial `autograd.grad`, or a
    saved tensor read by hand come out of order: these are *rescued* from the nearest stored boundary, exact but off
    the schedule, and counted.

Note [Buffers]
    A block that changes a buffer in place (BatchNorm statistics) must do so once per step. Its externals that some
    block changes are copied before the first run, and each replay works on a copy of that copy.
"""

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, assert_never, cast

import torch

from tinybp_lightning.capture.torch.op_filter import filtered_by
from tinybp_lightning.capture.torch.private import graph_task_id
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.graph.ids import BlockId, BoundaryId
from tinybp_lightning.runtime.torch.replay.ambient import (
    Autocast,
    RandomState,
    autocast_as,
    closing_regions,
    random_state_now,
    set_random_state,
)
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs, RunnableBlock, fresh_leaves
from tinybp_lightning.runtime.torch.replay.check import CheckedSavedTensors, is_checking
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, ReplayStep
from tinybp_lightning.runtime.torch.replay.saved_tensors import (
    Reference,
    SavedTensors,
    Slot,
    StopReplay,
    forget,
    never_unpacked,
)
from tinybp_lightning.schedule.actions import Backward, Drop, Forward, ForwardSave, Offload, Reload, Store

__all__ = ["Run", "RunStats"]


@dataclass(slots=True)
class RunStats:
    """What one run did in backward."""

    replayed_blocks: int = 0
    advanced_blocks: int = 0
    out_of_order_blocks: int = 0
    replay_s: float = 0.0


@dataclass(slots=True)
class _Stored:
    """A boundary's leaves, detached, with the versions they had when stored."""

    leaves: list[Any]
    versions: list[int | None]

    def check(self, reader: str) -> None:
        """Raise `ReplayError` if a leaf was changed in place since."""
        for leaf, version in zip(self.leaves, self.versions, strict=True):
            if version is not None and leaf._version != version:
                raise ReplayError(
                    f"block `{reader}` cannot be replayed: the activation of shape {tuple(leaf.shape)} before it was "
                    f"changed in place after it was stored (version {leaf._version}, expected {version}). "
                    "Use the out-of-place form of the op that changes it."
                )


class Run:
    """One forward of a chain of steps and the backwards that follow it.

    **Arguments:** `program`: what to play, each block by its option there; `externals`: of this forward;
    `devices`: whose generators to guard; `autocast`: in force around the forward; `holds`: keep what is saved in the
    first sweep too, until `let_go` is called, if ever; `checks`: compare what replays save with the first sweep's, see
    `CheckedSavedTensors`.
    """

    def __init__(
        self,
        program: ReplayProgram,
        externals: NonBoundaryInputs,
        *,
        devices: Sequence[torch.device],
        autocast: Sequence[Autocast],
        holds: bool = False,
        checks: bool = False,
    ) -> None:
        self._held: list[weakref.ref[Slot]] | None = [] if holds else None
        self.stats = RunStats()
        self.program = program
        self._externals = externals
        self._devices = tuple(devices)
        self._autocast = tuple(autocast)
        self._steps: list[RunnableBlock] = []
        self._random: dict[int, RandomState] = {}
        self._last_random: RandomState | None = None
        self._book = CheckedSavedTensors if is_checking(asked=checks) else SavedTensors
        self._books: dict[int, SavedTensors] = {}
        self._requires_grad: list[list[bool]] = []
        self._stored: dict[int, _Stored] = {}
        self._cursor: tuple[int, list[Any]] | None = None
        self._next_backward = len(program.kept)
        self._graph_task: int | None = None
        # CPU and device autograd threads may both unpack; a replay may itself meet a slot of an earlier run.
        self._lock = threading.RLock()

    # ---- first sweep -------------------------------------------------------------------------------------------

    def begin(self, root: list[Any]) -> None:
        """Start the chain from the leaves of boundary 0 (externally held; `[]` where externals carry everything)."""
        self._stored[0] = _stored(root)
        self._requires_grad.append([_wants_grad(t) for t in root])

    def sweep(self, step: RunnableBlock, state: list[Any]) -> list[Any]:
        """Run the next step for the first time and return the leaves of the boundary after it."""
        index = len(self._steps)
        self._steps.append(step)
        if step.is_random:
            self._random[index] = self._random_state()
        if self.program.kept[index]:
            with closing_regions(), filtered_by(None):
                out = step.first(state)
        else:
            book = self._book(
                index, self._externals.storages, state, name=step.name, is_out_of_place=step.is_out_of_place
            )
            self._books[index] = book
            pack = book.pack if self._held is None else self._holding(book)
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)
            with hooks, closing_regions(), filtered_by(book.note_skippable):
                out = step.first(state)
            book.close()
        if not step.is_random and self._random.pop(index, None) is not None:
            self._last_random = None
        self._requires_grad.append([_wants_grad(t) for t in out])
        if BoundaryId(index + 1) in self.program.stored:
            self._stored[index + 1] = _stored(out)
        return out

    def _holding(self, book: SavedTensors) -> Callable[[torch.Tensor], Slot | Reference]:
        held = cast("list[weakref.ref[Slot]]", self._held)

        def pack(t: torch.Tensor) -> Slot | Reference:
            packed = book.pack(t)
            if isinstance(packed, Slot):
                packed.fill(t.detach())
                held.append(weakref.ref(packed))
            return packed

        return pack

    def let_go(self) -> None:
        """Drop what a run that `holds` has kept: from here on it is as if it had dropped it at once."""
        for reference in self._held or ():
            slot = reference()
            if slot is not None:
                slot.value = None
        self._held = None

    def dropped_bytes(self, index: int, outputs: Sequence[Any]) -> int:
        """Return the bytes that block `index` gave up in the first sweep; its `outputs` live on in any case."""
        book = self._books.get(index)
        return 0 if book is None else book.dropped_bytes(outputs)

    def _random_state(self) -> RandomState:
        now = random_state_now(self._devices)
        if self._last_random is None or not now.same_as(self._last_random):
            self._last_random = now
        return self._last_random

    # ---- backward ----------------------------------------------------------------------------------------------

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, Reference):
            return packed.tensor_checked(self._steps[packed.block].name)
        with self._lock:
            if self._held is not None:
                return packed.read(self._steps[packed.block].name)
            task = graph_task_id()
            if packed.value is None:
                self._materialise(BlockId(packed.block), task)
            return packed.take(self._steps[packed.block].name)

    def _materialise(self, block: BlockId, task: int) -> None:
        started = time.perf_counter()
        in_order = block < self._next_backward and (self._graph_task in (None, task)) and task >= 0
        with self._restoring_random_state():
            if in_order:
                self._graph_task = task
                first, self._next_backward = self._next_backward - 1, int(block)
                for b in range(first, block - 1, -1):
                    self._play(self.program.steps[b])
            else:
                self._rescue(block)
        self.stats.replay_s += time.perf_counter() - started

    def _rescue(self, block: BlockId) -> None:
        """Fill block's slots from the nearest stored boundary, leaving stored ones on the way. See Note [Order]."""
        self.stats.out_of_order_blocks += 1
        start = max(b for b in self._stored if b <= block)
        stride = math.isqrt(block - start) + 1
        moves: list[ReplayStep] = []  # one list: the cursor does not outlive a `_play`
        for b in range(start, block):
            moves.append(ReplayStep(Forward(BlockId(b)), stops_early=False))
            if (b + 1 - start) % stride == 0 and b + 1 < block:
                moves.append(ReplayStep(Store(BoundaryId(b + 1)), stops_early=False))
        self._play([*moves, ReplayStep(ForwardSave(block), stops_early=True)])
        for b in [b for b in self._stored if b > block and b not in self.program.pinned]:
            del self._stored[b]

    def _play(self, moves: Sequence[ReplayStep]) -> None:
        for move in moves:
            match move.action:
                case Forward(block=block):
                    self._forward(block)
                case ForwardSave(block=block):
                    self._forward_save(block, stops_early=move.stops_early)
                case Store(boundary=boundary):
                    assert self._cursor is not None and self._cursor[0] == boundary, "verify_schedule missed a Store"
                    self._stored[boundary] = _stored(self._cursor[1])
                case Drop(boundary=boundary):
                    self._stored.pop(boundary, None)
                case Backward() | Offload() | Reload():
                    raise AssertionError(f"replay_program_of left {move.action} in a segment")
                case _ as never:
                    assert_never(never)
        self._cursor = None

    def _forward(self, block: BlockId) -> None:
        self.stats.advanced_blocks += 1
        state = self._read(block)
        with torch.autograd.graph.saved_tensors_hooks(forget, never_unpacked), self._as_first_run(block):
            out = self._steps[block].again(state)
        self._cursor = (block + 1, [_detached(t) for t in out])

    def _forward_save(self, block: BlockId, *, stops_early: bool) -> None:
        book = self._books.get(block)
        if book is None:  # kept in the first sweep: its tensors are where autograd put them
            if not stops_early:
                self._forward(block)
            return
        state = self._read(block)
        book.fill_views(state)
        if stops_early and book.num_replayed == 0:
            book.check_values()
            return
        self.stats.replayed_blocks += 1
        out: list[Any] | None = None
        with (
            contextlib.suppress(StopReplay),
            self._as_first_run(block),
            book.filling(stops_early=stops_early) as pack,
            torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked),
        ):
            out = self._steps[block].again(state)
        state.clear()
        book.check_values()
        if out is not None:
            book.check_complete()
        if out is not None and not stops_early:
            self._cursor = (block + 1, [_detached(t) for t in out])

    def _read(self, block: BlockId) -> list[Any]:
        """Return the leaves before `block` as a first run would see them: same gradients wanted, not graph leaves."""
        if self._cursor is not None and self._cursor[0] == block:
            leaves = self._cursor[1]
        else:
            stored = self._stored[block]
            stored.check(self._steps[block].name)
            leaves = stored.leaves
        self._cursor = None
        return fresh_leaves(leaves, self._requires_grad[block])

    @contextlib.contextmanager
    def _as_first_run(self, block: int) -> Generator[None]:
        if block in self._random:
            set_random_state(self._random[block])
        # Gradients stay on even where nothing is saved: without them other kernels would be picked.
        with torch.enable_grad(), autocast_as(self._autocast), closing_regions(), filtered_by(None):
            yield

    @contextlib.contextmanager
    def _restoring_random_state(self) -> Generator[None]:
        if not self._random:
            yield
            return
        state = random_state_now(self._devices)
        try:
            yield
        finally:
            set_random_state(state)


def _stored(leaves: Sequence[Any]) -> _Stored:
    detached = [_detached(t) for t in leaves]
    return _Stored(detached, [t._version if isinstance(t, torch.Tensor) else None for t in detached])


def _detached(t: Any) -> Any:
    return t.detach() if isinstance(t, torch.Tensor) else t


def _wants_grad(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.requires_grad
