"""What does each block cost, in seconds and bytes? Every unique block is run once with the step's real inputs.

The forward is walked block by block with only the current boundary alive, so measuring needs no more memory than the
widest single block. A block is run as the engine will run it: forward alone, forward that saves, replay with early
stop, backward; the allocator's events give the exact peaks. Parameters are passed as aliases, buffers as copies and
the generators are put back, so nothing of the user's is touched. Costs are kept per structural signature. An option
that is not compiled yet cannot be run: it is estimated from its forecast and the measured option 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from tinybp_lightning.capture.torch.allocator import Segment, open_trace
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece, Program
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.runtime.torch.ambient import Autocast, autocast_as, random_state_now, set_random_state
from tinybp_lightning.runtime.torch.assemble import BlockCosts, BlockSizes, chain_of
from tinybp_lightning.runtime.torch.clock import Clock, Spent
from tinybp_lightning.runtime.torch.compiled import forecast_of, is_compiled
from tinybp_lightning.runtime.torch.forecast import Forecast
from tinybp_lightning.runtime.torch.slots import Slot, SlotBook, StopReplay, forget, never_unpacked
from tinybp_lightning.runtime.torch.steps import Externals, GraphStep, fresh_leaves, has_storage

__all__ = ["Measurements", "measure_chain", "measuring_values"]

_NOTHING = Spent(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Measured:
    """One option of a unique block: its bytes, and the seconds of running it each way, of device and host."""

    sizes: BlockSizes
    forward: Spent
    replay: Spent
    backward: Spent
    is_estimated: bool = False


Measurements = dict[tuple[Any, ...], dict[int, _Measured]]
"""The options measured so far of each unique block, by number."""


def measure_chain(
    program: Program,
    values: Sequence[Any],
    *,
    device: torch.device,
    devices: Sequence[torch.device],
    autocast: Sequence[Autocast],
    counts_gradients: bool,
    on_block: Callable[[int, int], None],
    known: Measurements,
) -> Chain:
    """Return the `Chain` of a program, measured with the given external values.

    **Arguments:** `values`: one per graph input; `counts_gradients`: whether parameters' gradients are part of the
    budget; `on_block(done, total)`: called after each block, for progress; `known`: what earlier calls measured of the
    program in the same situation, to which is added what is measured now.
    """
    random = random_state_now(devices)
    try:
        costs, wants = _walk(program, measuring_values(program, values), device, autocast, on_block, known)
    finally:
        set_random_state(random)
    chain = chain_of(program, costs, wants, counts_gradients=counts_gradients)
    verify_chain(chain)
    return chain


def measuring_values(program: Program, values: Sequence[Any]) -> Externals:
    """Return aliases of parameters and inputs, copies of what the forward changes: measuring leaves no trace."""
    volatile = {i for piece in program.pieces for i in piece.volatile}

    def alias(i: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fresh = value.detach().clone() if i in volatile else value.detach()
        return fresh.requires_grad_(value.requires_grad)

    return Externals.of([alias(i, v) for i, v in enumerate(values)])


def _walk(
    program: Program,
    externals: Externals,
    device: torch.device,
    autocast: Sequence[Autocast],
    on_block: Callable[[int, int], None],
    known: Measurements,
) -> tuple[list[tuple[BlockCosts, ...]], list[list[bool]]]:
    seeds = _seeds(program)
    measured: list[tuple[_Measured, ...]] = []
    leaves: list[Any] = []
    wants: list[list[bool]] = [[]]
    for done, piece in enumerate(program.pieces):
        with autocast_as(autocast), torch.enable_grad():
            key = piece.span.signature, seeds[done], piece.calls if piece.is_compiled else ()
            probes = [
                _Probe(piece, option, externals, leaves, wants[-1], seeds[done], device)
                for option in range(len(piece.calls))
            ]
            options = known.setdefault(key, {})
            for option, (probe, call) in enumerate(zip(probes, piece.calls, strict=True)):
                if option not in options and is_compiled(call):
                    options[option] = probe.measure()
            measured.append(_with_estimates(piece, options))
            out = probes[0].run_dropping()
        wants.append([isinstance(t, torch.Tensor) and t.requires_grad for t in out])
        leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in out]
        on_block(done + 1, len(program.pieces))
    return _costs(measured), wants


def _seeds(program: Program) -> list[tuple[int, ...]]:
    """Return what of each piece's values gets a gradient: what later pieces read, and where backward starts."""
    wanted = set(program.differentiated)
    seeds: list[tuple[int, ...]] = []
    for piece, before, after in reversed(
        list(zip(program.pieces, program.boundaries, program.boundaries[1:], strict=False))
    ):
        made = [(s.index, v) for s, v in zip(piece.state, after, strict=True) if s.origin == MADE]
        seeds.append(tuple(index for index, v in made if v in wanted))
        wanted.update(before[s.index] for s in piece.reads if s.origin == STATE)
    return seeds[::-1]


def _with_estimates(piece: Piece, measured: Mapping[int, _Measured]) -> tuple[_Measured, ...]:
    """Return each option of a block: measured, or estimated and as wrong as the measured one estimated best was."""
    estimates = {
        o: _estimated(measured[0], forecast, piece)
        for o, call in enumerate(piece.calls)
        if (forecast := forecast_of(call)) is not None
    }
    pairs = [(measured[o], estimate) for o, estimate in estimates.items() if o in measured]
    more_bytes = min((m.sizes.backward_peak_bytes - e.sizes.backward_peak_bytes for m, e in pairs), default=0)
    more_device_s = min((m.backward.device_s - e.backward.device_s for m, e in pairs), default=0.0)
    more_host_s = min((m.backward.host_s - e.backward.host_s for m, e in pairs), default=0.0)
    forward, backward = measured[0].forward, measured[0].backward
    # It repeats the whole forward at most.
    slowest = Spent(backward.device_s + forward.device_s, backward.host_s + forward.host_s)

    def corrected(e: _Measured) -> _Measured:
        peak_bytes = max(0, e.sizes.backward_peak_bytes + more_bytes)
        spent = Spent(max(0.0, e.backward.device_s + more_device_s), max(0.0, e.backward.host_s + more_host_s))
        sizes = replace(e.sizes, backward_peak_bytes=peak_bytes)
        return replace(e, sizes=sizes, backward=spent.at_most(slowest))

    return tuple(measured[o] if o in measured else corrected(estimates[o]) for o in range(len(piece.calls)))


def _estimated(first: _Measured, forecast: Forecast, piece: Piece) -> _Measured:
    """Estimate an option against the measured option 0.

    What option 0 saves beyond it, backward makes again and has alive at once: an option of two halves may need less,
    and so all are measured before a budget is called too small.
    """
    remade_bytes = max(0, first.sizes.saved_bytes - forecast.saved_bytes)
    share = forecast.repeated_share
    sizes = replace(
        first.sizes,
        saved_bytes=forecast.saved_bytes,
        saved_reads=tuple(k for k in forecast.saved_arguments if piece.reads[k].origin == STATE),
        saved_made=forecast.saved_results,
        save_peak_bytes=max(first.sizes.save_peak_bytes, forecast.saved_bytes),
        replay_peak_bytes=max(first.sizes.replay_peak_bytes, forecast.saved_bytes),
        backward_peak_bytes=first.sizes.backward_peak_bytes + remade_bytes,
    )
    backward = Spent(
        first.backward.device_s + share * first.forward.device_s, first.backward.host_s + share * first.forward.host_s
    )
    return replace(first, sizes=sizes, backward=backward, is_estimated=True)


def _costs(measured: Sequence[tuple[_Measured, ...]]) -> list[tuple[BlockCosts, ...]]:
    """Every option of every block in the seconds of whichever is slower over the whole step, device or host."""
    device_s = sum(first.forward.device_s + first.backward.device_s for first, *_ in measured)
    host_s = sum(first.forward.host_s + first.backward.host_s for first, *_ in measured)

    def seconds(spent: Spent) -> float:
        return spent.device_s if device_s >= host_s else spent.host_s

    def costs(m: _Measured) -> BlockCosts:
        return BlockCosts(
            sizes=m.sizes,
            forward_s=seconds(m.forward),
            replay_s=min(seconds(m.replay), seconds(m.forward)),
            backward_s=seconds(m.backward),
            is_estimated=m.is_estimated,
        )

    return [tuple(costs(m) for m in options) for options in measured]


class _Seed(torch.autograd.Function):
    """Ends a block's graph: its backward makes the output gradients inside the engine, as a next block would."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.likes = [(t.shape, t.dtype, t.device, t.is_floating_point() or t.is_complex()) for t in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return tuple(torch.zeros(s, dtype=d, device=v) if ok else None for s, d, v, ok in ctx.likes)


class _Probe:
    """Runs one option of a block in every way the engine may, and reads the clock and the allocator."""

    def __init__(
        self,
        piece: Piece,
        option: int,
        externals: Externals,
        leaves: list[Any],
        wants: list[bool],
        seeds: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._piece = piece
        self._option = option
        self._externals = externals
        self._leaves = leaves
        self._wants = wants
        self._seeds = seeds
        self._device = device

    def _state(self) -> list[Any]:
        return fresh_leaves(self._leaves, self._wants)

    def _step(self) -> GraphStep:
        return GraphStep(self._piece, self._externals, self._option)

    def run_dropping(self) -> list[Any]:
        """Run forward, keep nothing but the outputs."""
        with torch.autograd.graph.saved_tensors_hooks(forget, never_unpacked):
            return self._step().first(self._state())

    def measure(self) -> _Measured:
        """Measure the block. See the module docstring for how."""
        saved, reads, made = self._saved_set()
        clock = Clock(self._device)
        self._save_and_backward(lambda _: None, clock)  # kernels are picked, backward compiled
        warm = self._save_and_backward(lambda _: None, clock).backward
        trace = open_trace(self._device)
        try:
            trace.mark("forward")
            forward = clock.time_repeatable(self.run_dropping)
            trace.mark("between")
            replay = self._replay(trace.mark, clock)
            trace.mark("between")
            run = self._save_and_backward(trace.mark, clock)
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
        return _Measured(sizes, forward, replay, run.backward.at_most(warm))

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

    def _replay(self, mark: Callable[[str], None], clock: Clock) -> Spent:
        slots: list[Any] = []
        state = self._state()
        book = SlotBook(0, self._externals.storages, state, is_out_of_place=self._piece.is_out_of_place)

        def pack(t: torch.Tensor) -> Any:
            slots.append(book.pack(t))
            return slots[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked):
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
        spent = clock.time_repeatable(replay)
        empty()
        return spent

    def _save_and_backward(self, mark: Callable[[str], None], clock: Clock) -> "_BackwardRun":
        state = self._state()
        reads = [(k, state[s.index]) for k, s in enumerate(self._piece.reads) if s.origin == STATE]
        reads = [(k, t) for k, t in reads if isinstance(t, torch.Tensor) and t.requires_grad]
        inputs = [t for _, t in reads]
        parameters = [self._externals.values[s.index] for s in self._piece.reads if s.origin == EXTERNAL]
        parameters = list({id(p): p for p in parameters if isinstance(p, torch.Tensor) and p.requires_grad}.values())
        mark("save")
        out = self._step().first(state)
        made = [t for s, t in zip(self._piece.state, out, strict=True) if s.origin == MADE and s.index in self._seeds]
        made = [t for t in made if isinstance(t, torch.Tensor) and t.requires_grad]
        if not made:
            mark("backward")
            return _BackwardRun(_NOTHING, 0, (), ())
        seeded_bytes = sum(t.numel() * t.element_size() for t in made)
        loss = cast("torch.Tensor", _Seed.apply(*made))
        del out, made
        grads: list[torch.Tensor | None] = []
        mark("backward")
        spent = clock.time(lambda: grads.extend(torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)))
        numbers: dict[int, int] = {}
        mine = tuple(
            (k, numbers.setdefault(storage_key(g), len(numbers)), g.untyped_storage().nbytes())
            for (k, _), g in zip(reads, grads, strict=False)
            if g is not None
        )
        return _BackwardRun(spent, seeded_bytes, mine, tuple(g for g in grads[len(inputs) :] if g is not None))


@dataclass(frozen=True, slots=True)
class _BackwardRun:
    """One measured backward: `seeded_bytes` of output gradients went in, `input_gradients` came out."""

    backward: Spent
    seeded_bytes: int
    input_gradients: tuple[tuple[int, int, int], ...]
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
