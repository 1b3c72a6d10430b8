"""What does one option of one block need and take? It is run in every way the engine may run it.

Forward alone, forward that saves, replay with early stop, backward: the clock says how long, the allocator how much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from tinybp_lightning.capture.torch.op_filter import filtered_by
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.runtime.torch.measure.allocator import Segment, open_trace
from tinybp_lightning.runtime.torch.measure.chain_builder import BlockSizes
from tinybp_lightning.runtime.torch.measure.timer import Timer, Timing
from tinybp_lightning.runtime.torch.replay.blocks import GraphBlock, NonBoundaryInputs, fresh_leaves, has_storage
from tinybp_lightning.runtime.torch.replay.saved_tensors import SavedTensors, Slot, StopReplay, forget, never_unpacked

__all__ = ["BlockProfile", "BlockProfiler", "Layout", "Seed"]

_NOTHING = Timing(0.0, 0.0)

Layout = tuple[tuple[int, ...], int, int]
"""Strides, offset, and the elements of the storage of a gradient that is no contiguous tensor of its own."""


@dataclass(frozen=True, slots=True)
class Seed:
    """Number `index` of what a block makes gets a gradient, of this layout: the parts of a concatenation get views.

    An op may have to copy such a gradient before it can use it.
    """

    index: int
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """One option of a unique block: its bytes, and the seconds of running it each way, of device and host.

    `layouts`: of the gradients that its backward makes, by position in its reads; contiguous ones are left out.
    """

    sizes: BlockSizes
    forward: Timing
    replay: Timing
    backward: Timing
    layouts: tuple[tuple[int, Layout], ...] = ()
    is_estimated: bool = False


class _Start(torch.autograd.Function):
    """Ends a block's graph: its backward makes the output gradients inside the engine, as a next block would."""

    @staticmethod
    def forward(ctx: Any, layouts: Sequence[Layout | None], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.likes = [
            (t.shape, layout, t.dtype, t.device) if t.is_floating_point() or t.is_complex() else None
            for t, layout in zip(outputs, layouts, strict=True)
        ]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return (None, *(None if like is None else _zeros(*like) for like in ctx.likes))


def _zeros(shape: torch.Size, layout: Layout | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if layout is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    stride, offset, size = layout
    return torch.zeros(size, dtype=dtype, device=device).as_strided(shape, stride, offset)


def _layout_of(t: torch.Tensor) -> Layout | None:
    """Return the layout of a gradient; `None` for a contiguous tensor with a storage of its own."""
    if not has_storage(t) or (t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes):
        return None
    return tuple(t.stride()), int(t.storage_offset()), t.untyped_storage().nbytes() // t.element_size()


def _seeded_bytes(t: torch.Tensor, layout: Layout | None) -> int:
    return t.element_size() * (t.numel() if layout is None else layout[2])


class BlockProfiler:
    """Runs one option of a block in every way the engine may, and reads the clock and the allocator."""

    def __init__(
        self,
        piece: Piece,
        option: int,
        externals: NonBoundaryInputs,
        leaves: list[Any],
        wants: list[bool],
        seeds: tuple[Seed, ...],
        clock: Timer,
    ) -> None:
        self._piece = piece
        self._option = option
        self._externals = externals
        self._leaves = leaves
        self._wants = wants
        self._seeds = seeds
        self._clock = clock

    def _state(self) -> list[Any]:
        return fresh_leaves(self._leaves, self._wants)

    def _step(self) -> GraphBlock:
        return GraphBlock(self._piece, self._externals, self._option)

    def run_dropping(self) -> list[Any]:
        """Run forward, keep nothing but the outputs."""
        with torch.autograd.graph.saved_tensors_hooks(forget, never_unpacked):
            return self._step().first(self._state())

    def measure(self) -> BlockProfile:
        """Measure the block. See the module docstring for how."""
        saved, reads, made = self._saved_set()
        self._save_and_backward(lambda _: None)  # kernels are picked, backward compiled
        warm = self._save_and_backward(lambda _: None, is_held=False).backward
        trace = open_trace(self._clock.device)
        try:
            trace.mark("forward")
            forward = self._clock.time_repeatable(self.run_dropping)
            trace.mark("between")
            replay = self._replay(trace.mark)
            trace.mark("between")
            run = self._save_and_backward(trace.mark)
            trace.leave_out(run.parameter_gradients)
            parts = {s.label: s for s in _joined(trace.close())}
        except BaseException:
            trace.abandon()
            raise
        save, back = parts["save"], parts["backward"]
        sizes = BlockSizes(
            forward_peak_bytes=_peak(parts["forward"]),
            saved_bytes=saved,
            saved_reads=reads,
            saved_made=made,
            save_peak_bytes=max(_peak(save), saved),
            replay_peak_bytes=max(min(_peak(parts["replay"]), max(_peak(save), saved)), saved),
            backward_peak_bytes=max(0, back.peak_bytes - back.start_bytes - run.seeded_bytes),
            input_gradients=run.input_gradients,
        )
        backward = run.backward.at_most(warm).without_host(self._clock.idle_backward_s)
        return BlockProfile(sizes, forward, replay, backward, run.layouts)

    def _saved_set(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Return private saved bytes, and which reads and results of the block its saved tensors alias."""
        held: list[torch.Tensor] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            held.append(t.detach())
            return t.detach()

        state = self._state()
        inputs = {s.index: state[s.index] for s in self._piece.reads if s.origin == STATE}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self._step().first(state)
        keys = {storage_key(t): t.untyped_storage().nbytes() for t in held if has_storage(t)}
        for key in self._externals.storages:
            keys.pop(key, None)
        reads = tuple(
            k
            for k, s in enumerate(self._piece.reads)
            if s.origin == STATE and isinstance(t := inputs[s.index], torch.Tensor) and storage_key(t) in keys
        )
        made = {
            s.index: t
            for s, t in zip(self._piece.state, out, strict=True)
            if s.origin == MADE and isinstance(t, torch.Tensor)
        }
        made_saved = tuple(k for k, t in sorted(made.items()) if storage_key(t) in keys)
        for t in [*(inputs.values()), *made.values()]:
            keys.pop(storage_key(t), None)
        return sum(keys.values()), reads, made_saved

    def _replay(self, mark: Callable[[str], None]) -> Timing:
        slots: list[Any] = []
        state = self._state()
        book = SavedTensors(0, self._externals.storages, state, is_out_of_place=self._piece.is_out_of_place)

        def pack(t: torch.Tensor) -> Any:
            slots.append(book.pack(t))
            return slots[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked), filtered_by(book.note_skippable):
            self._step().first(state)
        book.close()
        if book.num_replayed == 0:
            mark("replay")
            return _NOTHING

        def empty() -> None:
            for slot in slots:
                if isinstance(slot, Slot):
                    slot.value = None

        def replay() -> None:
            empty()  # as a replay finds them: what the last one filled would be counted
            with book.filling(stops_early=True) as fill, torch.autograd.graph.saved_tensors_hooks(fill, never_unpacked):
                try:
                    self._step().first(self._state())
                except StopReplay:
                    return

        mark("replay")
        spent = self._clock.time_repeatable(replay)
        empty()
        return spent

    def _save_and_backward(self, mark: Callable[[str], None], *, is_held: bool = True) -> "_BackwardRun":
        state = self._state()
        reads = [(k, state[s.index]) for k, s in enumerate(self._piece.reads) if s.origin == STATE]
        reads = [(k, t) for k, t in reads if isinstance(t, torch.Tensor) and t.requires_grad]
        inputs = [t for _, t in reads]
        parameters = [self._externals.values[s.index] for s in self._piece.reads if s.origin == EXTERNAL]
        parameters = list({id(p): p for p in parameters if isinstance(p, torch.Tensor) and p.requires_grad}.values())
        mark("save")
        out = self._step().first(state)
        results = {s.index: t for s, t in zip(self._piece.state, out, strict=True) if s.origin == MADE}
        seeded = [(results[seed.index], seed.layout) for seed in self._seeds]
        seeded = [(t, layout) for t, layout in seeded if isinstance(t, torch.Tensor) and t.requires_grad]
        if not seeded:
            mark("backward")
            return _BackwardRun(_NOTHING, 0, (), (), ())
        seeded_bytes = sum(_seeded_bytes(t, layout) for t, layout in seeded)
        made, layouts = [t for t, _ in seeded], [layout for _, layout in seeded]
        loss = cast("torch.Tensor", _Start.apply(layouts, *made))
        del out, results, seeded, made
        grads: list[torch.Tensor | None] = []
        mark("backward")
        spent = self._clock.time(
            lambda: grads.extend(torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)),
            is_held=is_held,
        )
        numbers: dict[int, int] = {}
        mine = tuple(
            (k, numbers.setdefault(storage_key(g), len(numbers)), g.untyped_storage().nbytes())
            for (k, _), g in zip(reads, grads, strict=False)
            if g is not None
        )
        made_layouts = tuple(
            (k, layout)
            for (k, _), g in zip(reads, grads, strict=False)
            if g is not None and (layout := _layout_of(g)) is not None
        )
        parameter_gradients = tuple(g for g in grads[len(inputs) :] if g is not None)
        return _BackwardRun(spent, seeded_bytes, mine, made_layouts, parameter_gradients)


@dataclass(frozen=True, slots=True)
class _BackwardRun:
    """One measured backward: `seeded_bytes` of output gradients went in, `input_gradients` came out."""

    backward: Timing
    seeded_bytes: int
    input_gradients: tuple[tuple[int, int, int], ...]
    layouts: tuple[tuple[int, Layout], ...]
    parameter_gradients: tuple[torch.Tensor, ...]


def _peak(segment: Segment) -> int:
    return max(0, segment.peak_bytes - segment.start_bytes)


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbours of one label (a mark set by `leave_out` splits a segment)."""
    joined: list[Segment] = []
    for s in segments:
        if joined and joined[-1].label == s.label:
            last = joined.pop()
            joined.append(Segment(s.label, last.start_bytes, max(last.peak_bytes, s.peak_bytes), s.end_bytes))
        else:
            joined.append(s)
    return joined
