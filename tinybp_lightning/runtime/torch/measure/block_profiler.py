"""Measure what one option of one block needs, by running it in every way the engine may run it.

Forward alone, forward that saves, replay with early stop, backward: the timer tells seconds, the allocator bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from tinybp_lightning.capture.torch.op_filter import filtered_by
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.runtime.torch.measure.allocator import Interval, open_trace
from tinybp_lightning.runtime.torch.measure.timer import Timer, Timing
from tinybp_lightning.runtime.torch.replay.blocks import GraphBlock, NonBoundaryInputs, fresh_leaves, has_storage
from tinybp_lightning.runtime.torch.replay.saved_tensors import SavedTensors, discarding, never_unpacked

__all__ = ["BlockProfile", "BlockProfiler", "Layout", "Seed"]

_NOTHING = Timing(0.0, 0.0)

Layout = tuple[tuple[int, ...], int, int]
"""Strides, offset, and the storage's number of elements, of a gradient that is not a contiguous tensor of its own."""

Seed = tuple[int, Layout | None]
"""Which of what a block makes gets a gradient, and its layout: an op may have to copy a view before it can use it."""


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """One option of a unique block: its bytes, and the seconds of forward, early-stopped replay and backward.

    `saved_reads` and `saved_made` are positions in its reads and in what it makes. `input_gradients`: for each position
    in its reads that got a gradient, the number of the storage that the gradient lives on, and that storage's bytes
    (the gradients of a concatenation's parts are views of one storage). `layouts`: of these gradients, by position,
    without the contiguous ones. `is_estimated`: it is not compiled yet, so its peaks and seconds were not measured.
    """

    forward_peak_bytes: int
    saved_bytes: int
    saved_reads: tuple[int, ...]
    saved_made: tuple[int, ...]
    save_peak_bytes: int
    replay_peak_bytes: int
    backward_peak_bytes: int
    forward: Timing
    replay: Timing
    backward: Timing
    input_gradients: tuple[tuple[int, int, int], ...] = ()
    layouts: tuple[tuple[int, Layout], ...] = ()
    is_estimated: bool = False


@dataclass(frozen=True, slots=True)
class _BackwardRun:
    """One backward: `seeded_bytes` of output gradients went in, `gradients` (by position in the reads) came out."""

    backward: Timing
    seeded_bytes: int
    gradients: tuple[tuple[int, torch.Tensor], ...]
    parameter_gradients: tuple[torch.Tensor, ...]


class _Start(torch.autograd.Function):
    """Ends a block's graph: its backward makes the output gradients inside the engine, as a next block would."""

    @staticmethod
    def forward(ctx: Any, layouts: Sequence[Layout | None], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.likes = [(t.shape, layout, t.dtype, t.device) for t, layout in zip(outputs, layouts, strict=True)]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return (None, *(_zeros(*like) for like in ctx.likes))


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


@dataclass(frozen=True, slots=True)
class BlockProfiler:
    """Runs one option of a block; `leaves` and `wants`: of the boundary before it, and which of them want gradients."""

    piece: Piece
    option: int
    inputs: NonBoundaryInputs
    leaves: list[Any]
    wants: list[bool]
    seeds: tuple[Seed, ...]
    timer: Timer

    def run_dropping(self) -> list[Any]:
        """Run forward, and keep nothing but the outputs."""
        with discarding():
            return self._first(self._state())

    def measure(self) -> BlockProfile:
        """Run the block in each way once to warm up, then in each way under a trace."""
        saved_bytes, saved_reads, saved_made = self._saved_set()
        self._save_and_backward(lambda _: None)  # torch picks kernels, and Inductor compiles backward
        warm = self._save_and_backward(lambda _: None, is_held=False).backward
        trace = open_trace(self.timer.device)
        try:
            trace.mark("forward")
            forward = self.timer.time_repeatable(self.run_dropping)
            trace.mark("between")
            replay = self._replay(trace.mark)
            trace.mark("between")
            run = self._save_and_backward(trace.mark)
            trace.leave_out(run.parameter_gradients)
            parts = {interval.label: interval for interval in trace.close()}
        finally:
            trace.abandon()
        save_peak_bytes = max(_peak(parts["save"]), saved_bytes)
        numbers: dict[int, int] = {}
        return BlockProfile(
            forward_peak_bytes=_peak(parts["forward"]),
            saved_bytes=saved_bytes,
            saved_reads=saved_reads,
            saved_made=saved_made,
            save_peak_bytes=save_peak_bytes,
            replay_peak_bytes=max(min(_peak(parts["replay"]), save_peak_bytes), saved_bytes),
            backward_peak_bytes=max(0, _peak(parts["backward"]) - run.seeded_bytes),
            forward=forward,
            replay=replay,
            backward=run.backward.at_most(warm).without_host(self.timer.idle_backward_s),
            input_gradients=tuple(
                (k, numbers.setdefault(storage_key(g), len(numbers)), g.untyped_storage().nbytes())
                for k, g in run.gradients
            ),
            layouts=tuple((k, layout) for k, g in run.gradients if (layout := _layout_of(g)) is not None),
        )

    def _state(self) -> list[Any]:
        return fresh_leaves(self.leaves, self.wants)

    def _first(self, state: list[Any]) -> list[Any]:
        return GraphBlock(self.piece, self.inputs, self.option).first(state)

    def _read(self, state: Sequence[Any]) -> dict[int, torch.Tensor]:
        """Return the tensors of the boundary before the block that it reads, by position in its reads."""
        read = {k: state[s.index] for k, s in enumerate(self.piece.reads) if s.origin == STATE}
        return {k: t for k, t in read.items() if isinstance(t, torch.Tensor)}

    def _made(self, out: Sequence[Any]) -> dict[int, torch.Tensor]:
        """Return the tensors that the block made, by number."""
        made = {s.index: t for s, t in zip(self.piece.state, out, strict=True) if s.origin == MADE}
        return {k: t for k, t in made.items() if isinstance(t, torch.Tensor)}

    def _saved_set(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Return private saved bytes, and which reads and results of the block its saved tensors alias."""
        held: list[torch.Tensor] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            held.append(t.detach())
            return t.detach()

        state = self._state()
        read = self._read(state)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made = self._made(self._first(state))
        sizes = {storage_key(t): t.untyped_storage().nbytes() for t in held if has_storage(t)}
        for key in self.inputs.storages:
            sizes.pop(key, None)
        saved_reads = tuple(k for k, t in read.items() if storage_key(t) in sizes)
        saved_made = tuple(k for k, t in sorted(made.items()) if storage_key(t) in sizes)
        for t in [*read.values(), *made.values()]:
            sizes.pop(storage_key(t), None)
        return sum(sizes.values()), saved_reads, saved_made

    def _replay(self, mark: Callable[[str], None]) -> Timing:
        state = self._state()
        saved = SavedTensors(0, self.inputs.storages, state, is_out_of_place=self.piece.is_out_of_place)
        packed: list[Any] = []  # holds the slots, which autograd lets go of with the first run's graph

        def pack(t: torch.Tensor) -> Any:
            packed.append(saved.pack(t))
            return packed[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked), filtered_by(saved.note_skippable):
            self._first(state)
        saved.close()

        def replay() -> None:
            saved.release()  # a replay finds its slots empty: what the last one filled must not count
            with saved.filling(stops_early=True):
                self._first(self._state())

        mark("replay")
        if saved.num_replayed == 0:
            return _NOTHING
        timing = self.timer.time_repeatable(replay)
        saved.release()
        return timing

    def _save_and_backward(self, mark: Callable[[str], None], *, is_held: bool = True) -> _BackwardRun:
        state = self._state()
        reads = [(k, t) for k, t in self._read(state).items() if t.requires_grad]
        parameters = [self.inputs.values[s.index] for s in self.piece.reads if s.origin == EXTERNAL]
        parameters = list({id(p): p for p in parameters if isinstance(p, torch.Tensor) and p.requires_grad}.values())
        mark("save")
        made = self._made(self._first(state))
        seeded = [(made[index], layout) for index, layout in self.seeds if index in made and made[index].requires_grad]
        if not seeded:
            mark("backward")
            return _BackwardRun(_NOTHING, 0, (), ())
        layouts = [layout for _, layout in seeded]
        seeded_bytes = sum(t.element_size() * (t.numel() if layout is None else layout[2]) for t, layout in seeded)
        loss = cast("torch.Tensor", _Start.apply(layouts, *(t for t, _ in seeded)))
        del made, seeded
        grads: list[torch.Tensor | None] = []
        wanted = [*(t for _, t in reads), *parameters]
        mark("backward")
        timing = self.timer.time(
            lambda: grads.extend(torch.autograd.grad(loss, wanted, allow_unused=True)), is_held=is_held
        )
        return _BackwardRun(
            timing,
            seeded_bytes,
            gradients=tuple((k, g) for (k, _), g in zip(reads, grads, strict=False) if g is not None),
            parameter_gradients=tuple(g for g in grads[len(reads) :] if g is not None),
        )


def _peak(interval: Interval) -> int:
    return max(0, interval.peak_bytes - interval.start_bytes)
