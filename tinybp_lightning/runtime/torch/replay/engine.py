"""Play a replay program: fill the saved tensors of dropped blocks again when autograd asks for them.

Note [Flat replay]
    The user's autograd graph is kept. In the first sweep a dropped block runs under `saved_tensors_hooks`, and each
    saved tensor becomes a `Slot`. When autograd asks for a slot of block i, the engine plays block i's steps: it
    advances from the nearest stored boundary, runs block i again and fills the slots that are still alive. Because the
    original nodes stay, `AccumulateGrad`, DDP and FSDP hooks run once each and in order.

Note [Order]
    Within one backward autograd runs nodes in descending order of creation, so blocks come in descending order. A
    second backward (`retain_graph`), a partial `autograd.grad`, or a saved tensor read by hand comes out of order. Such
    a block is recomputed from the nearest stored boundary: the values are exact, but the schedule does not hold.

Note [Buffers]
    A block that changes a buffer in place (BatchNorm statistics) must do so once per step. The non-boundary inputs that
    some block changes are copied before the first run, and each replay works on a copy of that copy.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch

from tinybp_lightning.capture.torch.ambient import (
    AmbientState,
    RandomState,
    Settings,
    closing_regions,
    keeping_casts,
    random_state_now,
    set_random_state,
    settings_now,
    switch_settings,
)
from tinybp_lightning.capture.torch.op_filter import filtered_by
from tinybp_lightning.capture.torch.private import graph_task_id
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.graph.ids import BlockId, BoundaryId
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs, RunnableBlock, fresh_leaves, version_of
from tinybp_lightning.runtime.torch.replay.check import CheckedSavedTensors, is_checking
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, ReplayStep
from tinybp_lightning.runtime.torch.replay.saved_tensors import Reference, SavedTensors, Slot, discarding
from tinybp_lightning.schedule.actions import Drop, Forward, ForwardSave, Store

__all__ = ["Run", "RunStats"]


@dataclass(slots=True)
class RunStats:
    """What one run did in backward."""

    replayed_blocks: int = 0
    advanced_blocks: int = 0
    out_of_order_blocks: int = 0
    replay_s: float = 0.0

    @classmethod
    def sum_of(cls, stats: "Sequence[RunStats]") -> "RunStats":
        """Return what several runs of one step did."""
        return cls(
            replayed_blocks=sum(s.replayed_blocks for s in stats),
            advanced_blocks=sum(s.advanced_blocks for s in stats),
            out_of_order_blocks=sum(s.out_of_order_blocks for s in stats),
            replay_s=sum(s.replay_s for s in stats),
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    """A boundary's leaves, detached, with the versions they had when they were stored."""

    leaves: list[Any]
    versions: list[int | None]

    @classmethod
    def of(cls, leaves: Sequence[Any]) -> "_Stored":
        detached = [_detached(t) for t in leaves]
        return cls(detached, [version_of(t) for t in detached])

    def checked(self, reader: str) -> list[Any]:
        """Return the leaves. Raises `ReplayError` if one was changed in place since."""
        for leaf, version in zip(self.leaves, self.versions, strict=True):
            if version is not None and leaf._version != version:
                raise ReplayError(
                    f"block `{reader}` cannot be replayed: the activation of shape {tuple(leaf.shape)} before it was "
                    f"changed in place after it was stored (version {leaf._version}, expected {version}). "
                    "Use the out-of-place form of the op that changes it."
                )
        return self.leaves


class Run:
    """One forward of a chain of blocks, and the backwards that follow it.

    **Arguments:** `devices`: whose generators to guard; `generators`: others that the blocks, Python code, may draw
    from; `settings`: in force around the forward, by default those of now; `holds`: keep what the blocks save until
    `let_go` is called; `checks`: compare what replays save with what the first sweep saved; `on_replay`: called before
    each replay.
    """

    def __init__(
        self,
        program: ReplayProgram,
        inputs: NonBoundaryInputs,
        *,
        devices: Sequence[torch.device],
        settings: Settings | None = None,
        generators: Sequence[AmbientState] | None = None,
        holds: bool = False,
        checks: bool = False,
        on_replay: Callable[[], None] | None = None,
    ) -> None:
        self.program = program
        self._on_replay = on_replay
        self.stats = RunStats()
        self._inputs = inputs
        self._devices = tuple(devices)
        self._generators = generators
        self._settings = settings_now() if settings is None else settings
        self._holds = holds
        self._new_saved = CheckedSavedTensors if is_checking(asked=checks) else SavedTensors
        self._blocks: list[RunnableBlock] = []
        self._saved: dict[int, SavedTensors] = {}  # of the dropped blocks
        self._random: dict[int, RandomState] = {}
        self._requires_grad: list[list[bool]] = []
        self._stored: dict[int, _Stored] = {}
        self._cursor: tuple[int, list[Any]] | None = None
        self._next_backward = len(program.kept)
        self._graph_task: int | None = None
        # CPU and device autograd threads may both unpack, and a replay may itself unpack a slot of an earlier run.
        self._lock = threading.RLock()

    def begin(self, root: list[Any]) -> None:
        """Start the chain from the leaves of boundary 0, which the caller holds (`[]` if no block reads a leaf)."""
        self._stored[0] = _Stored.of(root)
        self._requires_grad.append([_wants_grad(t) for t in root])

    def sweep(self, block: RunnableBlock, state: list[Any]) -> list[Any]:
        """Run the next block for the first time and return the leaves of the boundary after it."""
        index = len(self._blocks)
        self._blocks.append(block)
        random = random_state_now(self._devices, self._generators) if block.is_random else None
        if self.program.kept[index]:
            with filtered_by(None):
                out = block.first(state)
        else:
            self._saved[index] = saved = self._new_saved(
                index,
                self._inputs.storages,
                state,
                name=block.name,
                is_out_of_place=block.is_out_of_place,
                holds=self._holds,
            )
            hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, self._unpack)
            with hooks, filtered_by(saved.note_skippable):
                out = block.first(state)
            saved.close()
        if random is not None:
            moved = random.moved(random_state_now(self._devices, self._generators))
            if moved.states:
                self._random[index] = moved
        self._requires_grad.append([_wants_grad(t) for t in out])
        if BoundaryId(index + 1) in self.program.stored:
            self._stored[index + 1] = _Stored.of(out)
        return out

    def first_difference(self, index: int, changing: Collection[int], *, compares_values: bool) -> str | None:
        """Replay block `index`, whose slots a run that `holds` has filled; return what differs, `None` if nothing.

        **Arguments:** `changing`: storages whose values are not compared; `compares_values`: of what is saved, not the
        forms alone, which code that somebody has compiled does not allow.
        """
        saved, random = self._saved[index], random_state_now(self._devices, self._generators)
        try:
            with self._as_first_run(BlockId(index)), saved.comparing(changing, compares_values=compares_values):
                self._blocks[index].again(self._read(BlockId(index)))
            saved.check_complete()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything when it runs a second time
            return str(error).splitlines()[0] if isinstance(error, ReplayError) else repr(error)
        finally:
            set_random_state(random)
        return None

    def let_go(self) -> None:
        """Release what a run that `holds` has kept: from here on it behaves as if it had dropped it at once."""
        self._holds = False
        for saved in self._saved.values():
            saved.release()

    def held_bytes(self, index: int, outputs: Sequence[Any]) -> int:
        """Return the bytes that block `index` holds until `let_go`, without its `outputs`, which live on."""
        saved = self._saved.get(index)
        return 0 if saved is None else saved.held_bytes(outputs)

    def random_bytes(self, index: int) -> int:
        """Return the bytes that the states of the generators take that block `index` drew from."""
        return self._random[index].size_bytes if index in self._random else 0

    def _unpack(self, packed: Slot | Reference) -> torch.Tensor:
        name = self._blocks[packed.block].name
        if isinstance(packed, Reference):
            return packed.tensor_checked(name)
        with self._lock:
            if packed.value is None and not self._holds:
                self._materialise(BlockId(packed.block), graph_task_id())
            value = packed.read(name)
            if not self._holds:
                packed.value = None
            return value

    def _materialise(self, block: BlockId, task: int) -> None:
        """Fill the block's slots, by the program if this is the next backward in order. See Note [Order]."""
        if self._on_replay is not None:
            self._on_replay()
        started = time.perf_counter()
        random = random_state_now(self._devices, self._generators) if self._random else None
        try:
            if block < self._next_backward and self._graph_task in (None, task) and task >= 0:
                first, self._next_backward, self._graph_task = self._next_backward - 1, int(block), task
                for b in range(first, block - 1, -1):
                    self._play(self.program.steps[b])
            else:
                self._recompute_out_of_order(block)
        finally:
            if random is not None:
                set_random_state(random)
        self.stats.replay_s += time.perf_counter() - started

    def _recompute_out_of_order(self, block: BlockId) -> None:
        """Fill the block's slots from the nearest stored boundary, and store boundaries on the way."""
        self.stats.out_of_order_blocks += 1
        start = max(b for b in self._stored if b <= block)
        stride = math.isqrt(block - start) + 1
        steps: list[ReplayStep] = []  # one list, because `_play` drops the cursor at its end
        for b in range(start, block):
            steps.append(ReplayStep(Forward(BlockId(b)), stops_early=False))
            if (b + 1 - start) % stride == 0 and b + 1 < block:
                steps.append(ReplayStep(Store(BoundaryId(b + 1)), stops_early=False))
        self._play([*steps, ReplayStep(ForwardSave(block), stops_early=True)])
        for b in [b for b in self._stored if b > block and b not in self.program.pinned]:
            del self._stored[b]

    def _play(self, steps: Sequence[ReplayStep]) -> None:
        for step in steps:
            match step.action:
                case Forward(block=block):
                    self._forward(block)
                case ForwardSave(block=block):
                    self._forward_save(block, stops_early=step.stops_early)
                case Store(boundary=boundary):
                    assert self._cursor is not None and self._cursor[0] == boundary, "verify_schedule missed a Store"
                    self._stored[boundary] = _Stored.of(self._cursor[1])
                case Drop(boundary=boundary):
                    self._stored.pop(boundary, None)
                case _:
                    assert_never(step.action)
        self._cursor = None

    def _forward(self, block: BlockId) -> None:
        self.stats.advanced_blocks += 1
        state = self._read(block)
        with discarding(), self._as_first_run(block):
            out = self._blocks[block].again(state)
        self._cursor = (block + 1, [_detached(t) for t in out])

    def _forward_save(self, block: BlockId, *, stops_early: bool) -> None:
        if (saved := self._saved.get(block)) is None:  # kept in the first sweep: autograd has its tensors
            if not stops_early:
                self._forward(block)
            return
        state = self._read(block)
        saved.fill_views(state)
        if stops_early and saved.num_replayed == 0:
            saved.check_values()
            return
        self.stats.replayed_blocks += 1
        with self._as_first_run(block), saved.filling(stops_early=stops_early):
            out = self._blocks[block].again(state)
        state.clear()
        saved.check_values()
        saved.check_complete()
        if not stops_early:
            self._cursor = (block + 1, [_detached(t) for t in out])

    def _read(self, block: BlockId) -> list[Any]:
        """Return the leaves before `block` as a first run would see them, and drop the cursor."""
        cursor, self._cursor = self._cursor, None
        if cursor is not None and cursor[0] == block:
            leaves = cursor[1]
        else:
            leaves = self._stored[block].checked(self._blocks[block].name)
        return fresh_leaves(leaves, self._requires_grad[block])

    @contextlib.contextmanager
    def _as_first_run(self, block: BlockId) -> Generator[None]:
        if block in self._random:
            set_random_state(self._random[block])
        before = settings_now()
        may_change = before != self._settings or self._blocks[block].has_regions
        if before != self._settings:
            switch_settings(self._settings, {})
        closing = closing_regions() if self._blocks[block].has_regions else contextlib.nullcontext()
        try:
            # Gradients stay enabled even where nothing is saved: without them torch would pick other kernels.
            with torch.enable_grad(), keeping_casts(), closing, filtered_by(None):
                yield
        finally:
            if may_change:
                switch_settings(before, {})


def _detached(t: Any) -> Any:
    return t.detach() if isinstance(t, torch.Tensor) else t


def _wants_grad(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.requires_grad
