"""What does each block cost, in seconds and bytes? Every unique block is run once with the step's real inputs.

The forward is walked block by block with only the current boundary alive, so measuring needs no more memory than the
widest single block. A block is run as the engine will run it: forward alone, forward that saves, replay with early
stop, backward; the allocator's events give the exact peaks. Parameters are passed as aliases, buffers as copies and
the generators are put back, so nothing of the user's is touched. Costs are kept per structural signature.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from tinybp_lightning.capture.torch.allocator import Segment, open_trace
from tinybp_lightning.capture.torch.inductor import compile_pieces
from tinybp_lightning.capture.torch.pieces import EXTERNAL, MADE, STATE, Piece, Program
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.graph.chain import Block, Boundary, Chain, SavedSet
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import StorageKind
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.runtime.torch.ambient import Autocast, autocast_as, random_state_now, set_random_state
from tinybp_lightning.runtime.torch.slots import Slot, SlotBook, StopReplay, forget, never_unpacked
from tinybp_lightning.runtime.torch.steps import Externals, GraphStep, has_storage

__all__ = ["BlockCosts", "compile_program", "measure_chain"]


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """One unique block, measured. `saved_reads` and `saved_made` are positions in its reads and in what it makes.

    `input_gradients`: for each position in its reads that got a gradient, the storage the gradient lives on (a number
    of its own for each) and that storage's bytes. The gradients of a concatenation's parts are views of one storage.
    """

    forward_s: float
    forward_peak_bytes: int
    saved_bytes: int
    saved_reads: tuple[int, ...]
    saved_made: tuple[int, ...]
    save_peak_bytes: int
    replay_s: float
    replay_peak_bytes: int
    backward_s: float
    backward_peak_bytes: int
    input_gradients: tuple[tuple[int, int, int], ...]


def measure_chain(
    program: Program,
    values: Sequence[Any],
    *,
    device: torch.device,
    devices: Sequence[torch.device],
    autocast: Sequence[Autocast],
    counts_gradients: bool,
    on_block: Callable[[int, int], None],
) -> Chain:
    """Return the `Chain` of a program, measured with the given external values.

    **Arguments:** `values`: one per graph input; `counts_gradients`: whether parameters' gradients are part of the
    budget; `on_block(done, total)`: called after each block, for progress.
    """
    random = random_state_now(devices)
    try:
        costs, wants = _walk(program, _aliases(program, values), device, autocast, on_block)
    finally:
        set_random_state(random)
    chain = _assemble(program, costs, wants, counts_gradients=counts_gradients)
    verify_chain(chain)
    return chain


def compile_program(
    program: Program,
    values: Sequence[Any],
    devices: Sequence[torch.device],
    on_piece: Callable[[int, int], None],
) -> Program:
    """Return the program with its pieces compiled by Inductor; nothing of the user's is touched."""
    random = random_state_now(devices)
    try:
        return compile_pieces(program, _aliases(program, values).values, on_piece=on_piece)
    finally:
        set_random_state(random)


def _aliases(program: Program, values: Sequence[Any]) -> Externals:
    """Aliases of parameters and inputs, copies of what the forward changes: measuring leaves no trace."""
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
) -> tuple[list[BlockCosts], list[list[bool]]]:
    known: dict[str, BlockCosts] = {}
    costs: list[BlockCosts] = []
    leaves: list[Any] = []
    wants: list[list[bool]] = [[]]
    for done, piece in enumerate(program.pieces):
        with autocast_as(autocast), torch.enable_grad():
            probe = _Probe(piece, externals, leaves, wants[-1], device)
            if piece.span.signature not in known:
                known[piece.span.signature] = probe.measure()
            costs.append(known[piece.span.signature])
            out = probe.run_dropping()
        wants.append([isinstance(t, torch.Tensor) and t.requires_grad for t in out])
        leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in out]
        on_block(done + 1, len(program.pieces))
    return costs, wants


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
    """Runs one block in every way the engine may, and reads the clock and the allocator."""

    def __init__(
        self, piece: Piece, externals: Externals, leaves: list[Any], wants: list[bool], device: torch.device
    ) -> None:
        self._piece = piece
        self._externals = externals
        self._leaves = leaves
        self._wants = wants
        self._device = device

    def _state(self) -> list[Any]:
        fresh = [
            t.detach().requires_grad_(wants) if isinstance(t, torch.Tensor) and wants else t
            for t, wants in zip(self._leaves, self._wants, strict=True)
        ]
        return [t.view_as(t) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in fresh]

    def _step(self) -> GraphStep:
        return GraphStep(self._piece, self._externals)

    def run_dropping(self) -> list[Any]:
        """Run forward, keep nothing but the outputs."""
        with torch.autograd.graph.saved_tensors_hooks(forget, never_unpacked):
            return self._step().first(self._state())

    def measure(self) -> BlockCosts:
        """Measure the block. See the module docstring for how."""
        saved, reads, made = self._saved_set()
        self._save_and_backward(lambda _: None, _Clock(self._device))  # warm up: kernels are picked, backward compiled
        trace = open_trace(self._device)
        clock = _Clock(self._device)
        trace.mark("forward")
        forward_s = clock.time(self.run_dropping)
        trace.mark("between")
        replay_s = self._replay(trace.mark, clock)
        trace.mark("between")
        run = self._save_and_backward(trace.mark, clock)
        trace.leave_out(run.parameter_gradients)
        parts = {s.label: s for s in _joined(trace.close())}
        save, back = parts["save"], parts["backward"]
        return BlockCosts(
            forward_s=forward_s,
            forward_peak_bytes=_peak(parts["forward"]),
            saved_bytes=saved,
            saved_reads=reads,
            saved_made=made,
            save_peak_bytes=max(_peak(save), saved),
            replay_s=min(replay_s, forward_s),
            replay_peak_bytes=max(min(_peak(parts["replay"]), max(_peak(save), saved)), saved),
            backward_s=run.backward_s,
            backward_peak_bytes=max(0, back.peak_bytes - back.start_bytes - run.seeded_bytes),
            input_gradients=run.input_gradients,
        )

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

    def _replay(self, mark: Callable[[str], None], clock: "_Clock") -> float:
        slots: list[Any] = []
        state = self._state()
        book = SlotBook(0, self._externals.storages, state)

        def pack(t: torch.Tensor) -> Any:
            slots.append(book.pack(t))
            return slots[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, never_unpacked):
            self._step().first(state)
        book.close()
        if book.num_replayed == 0:
            mark("replay")
            return 0.0

        def replay() -> None:
            with book.filling(stops_early=True) as fill, torch.autograd.graph.saved_tensors_hooks(fill, never_unpacked):
                try:
                    self._step().first(self._state())
                except StopReplay:
                    return

        mark("replay")
        seconds = clock.time(replay)
        for slot in slots:
            if isinstance(slot, Slot):
                slot.value = None
        return seconds

    def _save_and_backward(self, mark: Callable[[str], None], clock: "_Clock") -> "_BackwardRun":
        state = self._state()
        reads = [(k, state[s.index]) for k, s in enumerate(self._piece.reads) if s.origin == STATE]
        reads = [(k, t) for k, t in reads if isinstance(t, torch.Tensor) and t.requires_grad]
        inputs = [t for _, t in reads]
        parameters = [self._externals.values[s.index] for s in self._piece.reads if s.origin == EXTERNAL]
        parameters = list({id(p): p for p in parameters if isinstance(p, torch.Tensor) and p.requires_grad}.values())
        mark("save")
        out = self._step().first(state)
        made = [t for s, t in zip(self._piece.state, out, strict=True) if s.origin == MADE]
        made = [t for t in made if isinstance(t, torch.Tensor) and t.requires_grad]
        if not made:
            mark("backward")
            return _BackwardRun(0.0, 0, (), ())
        seeded_bytes = sum(t.numel() * t.element_size() for t in made)
        loss = cast("torch.Tensor", _Seed.apply(*made))
        del out, made
        grads: list[torch.Tensor | None] = []
        mark("backward")
        seconds = clock.time(lambda: grads.extend(torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)))
        numbers: dict[int, int] = {}
        mine = tuple(
            (k, numbers.setdefault(storage_key(g), len(numbers)), g.untyped_storage().nbytes())
            for (k, _), g in zip(reads, grads, strict=False)
            if g is not None
        )
        return _BackwardRun(seconds, seeded_bytes, mine, tuple(g for g in grads[len(inputs) :] if g is not None))


@dataclass(frozen=True, slots=True)
class _BackwardRun:
    """One measured backward: `seeded_bytes` of output gradients went in, `input_gradients` came out."""

    backward_s: float
    seeded_bytes: int
    input_gradients: tuple[tuple[int, int, int], ...]
    parameter_gradients: tuple[torch.Tensor, ...]


class _Clock:
    """Times a call, waiting for the device on both sides."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, call: Callable[[], Any]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


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


def _assemble(
    program: Program, costs: Sequence[BlockCosts], wants: Sequence[Sequence[bool]], *, counts_gradients: bool
) -> Chain:
    graph = program.graph
    ids: dict[StorageId, StorageId] = {}
    sizes: list[int] = []

    def chain_id(value: ValueId) -> StorageId | None:
        storage = graph.values[value].storage
        if storage is None:
            return None
        if storage not in ids:
            ids[storage] = StorageId(len(sizes))
            owned = graph.storages[storage].kind is StorageKind.ACTIVATION
            sizes.append(graph.storages[storage].size_bytes if owned else 0)
        return ids[storage]

    def chain_ids(values: Sequence[ValueId]) -> tuple[StorageId, ...]:
        return tuple(sorted({s for v in values if (s := chain_id(v)) is not None}))

    frontiers = [chain_ids(values) for values in program.boundaries]
    gradients = [_gradient_bytes(program, i, costs, wants) for i in range(len(program.boundaries))]
    parameters = [0] * len(program.pieces)
    if counts_gradients:
        parameters = _parameter_gradient_bytes(program)
    else:
        gradients = [own + shared for own, shared in zip(gradients, _shared_gradient_bytes(program), strict=True)]
    blocks: list[Block] = []
    for i, (piece, c) in enumerate(zip(program.pieces, costs, strict=True)):
        before, after = program.boundaries[i], program.boundaries[i + 1]
        made = [v for v, s in zip(after, piece.state, strict=True) if s.origin == MADE]
        saved = [before[piece.reads[k].index] for k in c.saved_reads] + [made[k] for k in c.saved_made]
        made_bytes = sum(sizes[s] for s in set(frontiers[i + 1]) - set(frontiers[i]))
        forward_peak = max(c.forward_peak_bytes, made_bytes)
        save_peak = max(c.save_peak_bytes, forward_peak, c.saved_bytes + made_bytes)
        option = SavedSet(
            name="all",
            storages=chain_ids(saved),
            saved_bytes=c.saved_bytes,
            save_peak_bytes=save_peak,
            replay_s=c.replay_s,
            replay_peak_bytes=c.replay_peak_bytes,
            backward_s=c.backward_s,
            backward_peak_bytes=c.backward_peak_bytes,
        )
        span = piece.span
        blocks.append(Block(span.name, span.signature, c.forward_s, forward_peak, parameters[i], (option,)))
    boundaries = tuple(Boundary(f, g) for f, g in zip(frontiers, gradients, strict=True))
    workspace_bytes = _bookkeeping_bytes(program)
    return Chain(tuple(sizes), tuple(blocks), boundaries, workspace_bytes=workspace_bytes)


def _bookkeeping_bytes(program: Program) -> int:
    """What the engine itself keeps for replays: generator states, and buffers as they were before each block."""
    state_bytes = torch.get_rng_state().nbytes
    graph = program.graph
    buffers = [graph.values[graph.inputs[i]] for piece in program.pieces for i in piece.volatile]
    num_random = sum(piece.is_random for piece in program.pieces)
    return num_random * state_bytes + sum(_dense_bytes(v.shape, v.dtype) for v in buffers)


def _gradient_bytes(
    program: Program, boundary: int, costs: Sequence[BlockCosts], wants: Sequence[Sequence[bool]]
) -> int:
    """Bytes of the gradients of one boundary's leaves, once every later block's backward has run.

    A gradient that one block made is held as that block made it, with the whole storage it lives on; one that several
    blocks contributed to was summed into a tensor of its own.
    """
    graph = program.graph
    total = 0
    storages: dict[tuple[int, int], int] = {}
    for value, wanted in zip(program.boundaries[boundary], wants[boundary], strict=True):
        if not wanted:
            continue
        made = _contributions(program, boundary, value, costs)
        if len(made) == 1:
            (block, number, size_bytes), *_ = made
            storages[block, number] = size_bytes
        else:
            total += _dense_bytes(graph.values[value].shape, graph.values[value].dtype)
    return total + sum(storages.values())


def _contributions(
    program: Program, boundary: int, value: ValueId, costs: Sequence[BlockCosts]
) -> list[tuple[int, int, int]]:
    """Return (block, storage number, bytes) of each gradient that blocks after `boundary` give `value`."""
    found: list[tuple[int, int, int]] = []
    for block in range(boundary, len(program.pieces)):
        before = program.boundaries[block]
        for position, number, size_bytes in costs[block].input_gradients:
            if before[program.pieces[block].reads[position].index] == value:
                found.append((block, number, size_bytes))
    if value in program.boundaries[-1]:
        value_bytes = _dense_bytes(program.graph.values[value].shape, program.graph.values[value].dtype)
        found.append((len(program.pieces), value, value_bytes))  # the caller's own gradient for an output
    return found


def _dense_bytes(shape: Sequence[int], dtype: str) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count * getattr(torch, dtype).itemsize


def _uses(program: Program) -> dict[int, list[int]]:
    """Blocks that read each external that wants a gradient, in order."""
    uses: dict[int, list[int]] = {}
    for i, piece in enumerate(program.pieces):
        for s in piece.reads:
            if s.origin == EXTERNAL and program.graph.values[program.graph.inputs[s.index]].requires_grad:
                uses.setdefault(s.index, []).append(i)
    return uses


def _shared_gradient_bytes(program: Program) -> list[int]:
    """Bytes, at each boundary, of gradients of parameters used twice: autograd holds one until the other is in."""
    sums = [0] * len(program.boundaries)
    for index, blocks in _uses(program).items():
        value = program.graph.values[program.graph.inputs[index]]
        for boundary in range(blocks[0] + 1, blocks[-1] + 1):
            sums[boundary] += _dense_bytes(value.shape, value.dtype)
    return sums


def _parameter_gradient_bytes(program: Program) -> list[int]:
    """Gradient bytes that each block's backward leaves behind; a parameter used twice counts at its last use."""
    sums = [0] * len(program.pieces)
    for index, blocks in _uses(program).items():
        value = program.graph.values[program.graph.inputs[index]]
        sums[blocks[-1]] += _dense_bytes(value.shape, value.dtype)
    return sums
