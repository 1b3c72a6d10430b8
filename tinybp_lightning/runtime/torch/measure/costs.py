"""What does each block cost, in seconds and bytes? Every unique block is run once with the step's real inputs.

The forward is walked block by block with only the current boundary alive, so measuring needs no more memory than the
widest single block. A block is run as the engine will run it: forward alone, forward that saves, replay with early
stop, backward; the allocator's events give the exact peaks. Parameters are passed as aliases, buffers as copies and
the generators are put back, so nothing of the user's is touched. Costs are kept per structural signature. An option
that is not compiled yet cannot be run: it is estimated from its forecast and the measured option 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tinybp_lightning.analysis.estimate import count_operations
from tinybp_lightning.capture.torch.pieces import MADE, STATE, Piece, Program
from tinybp_lightning.config import Costs
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import ValueId
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.runtime.torch.executors.executor import Executor, Forecast
from tinybp_lightning.runtime.torch.measure.block_profiler import BlockProfile, BlockProfiler, Layout, Seed
from tinybp_lightning.runtime.torch.measure.chain_builder import BlockCosts, chain_of
from tinybp_lightning.runtime.torch.measure.timer import Timer, Timing
from tinybp_lightning.runtime.torch.replay.ambient import Autocast, autocast_as, random_state_now, set_random_state
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs

__all__ = ["Measurements", "measure_chain", "measuring_values"]

Measurements = dict[tuple[Any, ...], dict[int, BlockProfile]]
"""The options measured so far of each unique block, by number."""


def measure_chain(
    program: Program,
    values: Sequence[Any],
    *,
    executor: Executor,
    device: torch.device,
    devices: Sequence[torch.device],
    autocast: Sequence[Autocast],
    counts_gradients: bool,
    on_block: Callable[[int, int], None],
    known: Measurements,
    kind: Costs = Costs.SECONDS,
) -> Chain:
    """Return the `Chain` of a program, measured with the given external values.

    **Arguments:** `values`: one per graph input; `executor`: prepared the program; `counts_gradients`: whether
    parameters' gradients are part of the budget; `on_block(done, total)`: called after each block, for progress;
    `known`: what earlier calls measured of the program in the same situation, to which is added what is measured now;
    `kind`: operations are counted instead of seconds, which are those of `count_operations` then.
    """
    random = random_state_now(devices)
    try:
        clock = Timer(device, step_bytes=sum(s.size_bytes for s in program.graph.storages))
        measured, wants = _walk(program, measuring_values(program, values), clock, executor, autocast, on_block, known)
    finally:
        set_random_state(random)
    costs = _costs(measured) if kind is Costs.SECONDS else _counted(program, measured)
    chain = chain_of(program, costs, wants, counts_gradients=counts_gradients)
    verify_chain(chain)
    return chain


def measuring_values(program: Program, values: Sequence[Any]) -> NonBoundaryInputs:
    """Return aliases of parameters and inputs, copies of what the forward changes: measuring leaves no trace."""
    volatile = {i for piece in program.pieces for i in piece.volatile}

    def alias(i: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fresh = value.detach().clone() if i in volatile else value.detach()
        return fresh.requires_grad_(value.requires_grad)

    return NonBoundaryInputs.of([alias(i, v) for i, v in enumerate(values)])


def _walk(
    program: Program,
    externals: NonBoundaryInputs,
    clock: Timer,
    executor: Executor,
    autocast: Sequence[Autocast],
    on_block: Callable[[int, int], None],
    known: Measurements,
) -> tuple[list[tuple[BlockProfile, ...]], list[list[bool]]]:
    """Measure every block; again, where the blocks behind it were seen to hand it gradients of another layout."""
    seeds = _seeds(program)
    measured, wants = _pass(program, seeds, externals, clock, executor, autocast, on_block, known)
    laid_out = _laid_out(program, seeds, measured)
    if laid_out != seeds:
        measured, wants = _pass(program, laid_out, externals, clock, executor, autocast, _no_progress, known)
    return measured, wants


def _no_progress(_: int, __: int) -> None:
    """The blocks have been counted once."""


def _pass(
    program: Program,
    seeds: Sequence[tuple[Seed, ...]],
    externals: NonBoundaryInputs,
    clock: Timer,
    executor: Executor,
    autocast: Sequence[Autocast],
    on_block: Callable[[int, int], None],
    known: Measurements,
) -> tuple[list[tuple[BlockProfile, ...]], list[list[bool]]]:
    measured: list[tuple[BlockProfile, ...]] = []
    leaves: list[Any] = []
    wants: list[list[bool]] = [[]]
    for done, piece in enumerate(program.pieces):
        with autocast_as(autocast), torch.enable_grad():
            key = piece.span.signature, seeds[done], executor.code_of(piece)
            probes = [
                BlockProfiler(piece, option, externals, leaves, wants[-1], seeds[done], clock)
                for option in range(len(piece.calls))
            ]
            options = known.setdefault(key, {})
            for option, (probe, call) in enumerate(zip(probes, piece.calls, strict=True)):
                if option not in options and executor.is_ready(call):
                    options[option] = probe.measure()
            measured.append(_with_estimates(piece, options, executor))
            out = probes[0].run_dropping()
        wants.append([isinstance(t, torch.Tensor) and t.requires_grad for t in out])
        leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in out]
        on_block(done + 1, len(program.pieces))
    return measured, wants


def _seeds(program: Program) -> list[tuple[Seed, ...]]:
    """Return what of each piece's values gets a gradient: what later pieces read, and where backward starts."""
    wanted = set(program.differentiated)
    seeds: list[tuple[Seed, ...]] = []
    for piece, before, after in reversed(
        list(zip(program.pieces, program.boundaries, program.boundaries[1:], strict=False))
    ):
        made = [(s.index, v) for s, v in zip(piece.state, after, strict=True) if s.origin == MADE]
        seeds.append(tuple(Seed(index) for index, v in made if v in wanted))
        wanted.update(before[s.index] for s in piece.reads if s.origin == STATE)
    return seeds[::-1]


def _laid_out(
    program: Program, seeds: Sequence[tuple[Seed, ...]], measured: Sequence[tuple[BlockProfile, ...]]
) -> list[tuple[Seed, ...]]:
    """Return `seeds` with the layouts of the gradients that later pieces were seen to make.

    Of values that one piece alone reads: what several contribute to is summed into a tensor of its own.
    """
    found: dict[ValueId, list[Layout | None]] = {v: [None] for v in program.differentiated}
    for piece, before, (first, *_) in zip(program.pieces, program.boundaries, measured, strict=False):
        layouts = dict(first.layouts)
        for k, s in enumerate(piece.reads):
            if s.origin == STATE:
                found.setdefault(before[s.index], []).append(layouts.get(k))
    laid_out: list[tuple[Seed, ...]] = []
    for piece, after, mine in zip(program.pieces, program.boundaries[1:], seeds, strict=True):
        made = {s.index: v for s, v in zip(piece.state, after, strict=True) if s.origin == MADE}
        layouts = [found.get(made[seed.index], []) for seed in mine]
        laid_out.append(
            tuple(
                replace(seed, layout=only[0]) if len(only) == 1 else seed
                for seed, only in zip(mine, layouts, strict=True)
            )
        )
    return laid_out


def _with_estimates(piece: Piece, measured: Mapping[int, BlockProfile], executor: Executor) -> tuple[BlockProfile, ...]:
    """Return each option of a block: measured, or estimated and as wrong as the measured one estimated best was."""
    estimates = {
        o: _estimated(measured[0], forecast, piece)
        for o, call in enumerate(piece.calls)
        if (forecast := executor.forecast(call)) is not None
    }
    pairs = [(measured[o], estimate) for o, estimate in estimates.items() if o in measured]
    more_bytes = min((m.sizes.backward_peak_bytes - e.sizes.backward_peak_bytes for m, e in pairs), default=0)
    more_device_s = min((m.backward.device_s - e.backward.device_s for m, e in pairs), default=0.0)
    more_host_s = min((m.backward.host_s - e.backward.host_s for m, e in pairs), default=0.0)
    forward, backward = measured[0].forward, measured[0].backward
    # It repeats the whole forward at most.
    slowest = Timing(backward.device_s + forward.device_s, backward.host_s + forward.host_s)

    def corrected(e: BlockProfile) -> BlockProfile:
        peak_bytes = max(0, e.sizes.backward_peak_bytes + more_bytes)
        spent = Timing(max(0.0, e.backward.device_s + more_device_s), max(0.0, e.backward.host_s + more_host_s))
        sizes = replace(e.sizes, backward_peak_bytes=peak_bytes)
        return replace(e, sizes=sizes, backward=spent.at_most(slowest))

    return tuple(measured[o] if o in measured else corrected(estimates[o]) for o in range(len(piece.calls)))


def _estimated(first: BlockProfile, forecast: Forecast, piece: Piece) -> BlockProfile:
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
    backward = Timing(
        first.backward.device_s + share * first.forward.device_s, first.backward.host_s + share * first.forward.host_s
    )
    return replace(first, sizes=sizes, backward=backward, is_estimated=True)


def _costs(measured: Sequence[tuple[BlockProfile, ...]]) -> list[tuple[BlockCosts, ...]]:
    """Every option of every block in the seconds of whichever is slower over the whole step, device or host."""
    device_s = sum(first.forward.device_s + first.backward.device_s for first, *_ in measured)
    host_s = sum(first.forward.host_s + first.backward.host_s for first, *_ in measured)

    def seconds(spent: Timing) -> float:
        return spent.device_s if device_s >= host_s else spent.host_s

    def costs(m: BlockProfile) -> BlockCosts:
        return BlockCosts(
            sizes=m.sizes,
            forward_s=seconds(m.forward),
            replay_s=min(seconds(m.replay), seconds(m.forward)),
            backward_s=seconds(m.backward),
            is_estimated=m.is_estimated,
        )

    return [tuple(costs(m) for m in options) for options in measured]


def _counted(program: Program, measured: Sequence[tuple[BlockProfile, ...]]) -> list[tuple[BlockCosts, ...]]:
    """The only option of every block, its bytes measured and its operations counted."""
    counts = count_operations(program.graph, [(piece.span.start, piece.span.stop) for piece in program.pieces])
    return [
        (BlockCosts(only.sizes, count.forward_s, count.replay_s, count.backward_s),)
        for (only,), count in zip(measured, counts, strict=True)
    ]
