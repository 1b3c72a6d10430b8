"""Measure what each block costs, in seconds and bytes, by running every unique block once on the step's real inputs.

The forward is walked block by block with only the current boundary alive, so measuring needs no more memory than the
widest single block. Parameters are passed as aliases, buffers as copies, and the generators are restored, so the user's
values do not change. An option that is not compiled yet cannot run: it is estimated from its forecast and the measured
option 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tinybp_lightning.analysis.estimate import count_operations
from tinybp_lightning.capture.torch.ambient import (
    Settings,
    closing_regions,
    keeping_casts,
    random_state_now,
    set_random_state,
    settings_as,
)
from tinybp_lightning.capture.torch.pieces import MADE, STATE, Piece, Program
from tinybp_lightning.config import Costs
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import ValueId
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.runtime.torch.executors.executor import Executor, Forecast
from tinybp_lightning.runtime.torch.measure.block_profiler import BlockProfile, BlockProfiler, Layout, Seed
from tinybp_lightning.runtime.torch.measure.chain_builder import chain_of
from tinybp_lightning.runtime.torch.measure.timer import Timer, Timing
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs

__all__ = ["Measurements", "measure_chain", "measuring_values"]

Measurements = dict[tuple[Any, ...], dict[int, BlockProfile]]
"""The options measured so far of each unique block, by number."""

_Profiles = list[tuple[BlockProfile, ...]]  # of each block, by option
_Seeds = list[tuple[Seed, ...]]  # of each block


def measure_chain(
    program: Program,
    values: Sequence[Any],
    *,
    executor: Executor,
    device: torch.device,
    devices: Sequence[torch.device],
    settings: Settings,
    counts_gradients: bool,
    on_block: Callable[[int, int], None],
    known: Measurements,
    kind: Costs = Costs.SECONDS,
) -> Chain:
    """Return the `Chain` of a program that `executor` prepared, measured with the values of its inputs.

    **Arguments:** `counts_gradients`: whether parameters' gradients are part of the budget; `on_block(done, total)`:
    called after each block; `known`: what earlier calls measured of the program in the same situation, to which this
    call adds; `kind`: whether the chain's seconds are measured, or count operations as `count_operations` does.
    """

    def walk(seeds: _Seeds, report: Callable[[int, int], None]) -> tuple[_Profiles, list[list[bool]]]:
        """Return every block's profiles, and which leaves of each boundary want gradients."""
        profiles: _Profiles = []
        leaves: list[Any] = []
        wants: list[list[bool]] = [[]]
        for piece, seed in zip(program.pieces, seeds, strict=True):
            with settings_as(settings), closing_regions(), keeping_casts(), torch.enable_grad():
                profiler = BlockProfiler(piece, 0, inputs, leaves, wants[-1], seed, timer)
                # Compiled pieces of one signature may differ in constants or strides.
                code = piece.calls if piece.is_compiled else None
                options = known.setdefault((piece.span.signature, seed, code), {})
                for option, call in enumerate(piece.calls):
                    if option not in options and executor.is_ready(call):
                        options[option] = replace(profiler, option=option).measure()
                profiles.append(_with_estimates(piece, options, executor))
                out = profiler.run_dropping()
            wants.append([isinstance(t, torch.Tensor) and t.requires_grad for t in out])
            leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in out]
            report(len(profiles), len(seeds))
        return profiles, wants

    random = random_state_now(devices)
    try:
        timer = Timer(device, step_bytes=sum(s.size_bytes for s in program.graph.storages))
        inputs = measuring_values(program, values)
        seeds = _seeds(program, [dict[int, Layout]()] * len(program.pieces))
        profiles, wants = walk(seeds, on_block)
        seen = _seeds(program, [dict(first.layouts) for first, *_ in profiles])
        if seen != seeds:  # later blocks hand some block gradients of another layout: measure those blocks again
            profiles, wants = walk(seen, lambda done, total: None)
    finally:
        set_random_state(random)
    if kind is Costs.OPERATIONS:
        profiles = _counted(program, profiles)
    chain = chain_of(program, profiles, wants, counts_gradients=counts_gradients)
    verify_chain(chain)
    return chain


def measuring_values(program: Program, values: Sequence[Any]) -> NonBoundaryInputs:
    """Return aliases of `values`, and copies of what the forward changes, so that measuring leaves no trace."""
    volatile = {i for piece in program.pieces for i in piece.volatile}

    def alias(i: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fresh = value.detach().clone() if i in volatile else value.detach()
        return fresh.requires_grad_(value.requires_grad)

    return NonBoundaryInputs.of([alias(i, v) for i, v in enumerate(values)])


def _seeds(program: Program, layouts: Sequence[Mapping[int, Layout]]) -> _Seeds:
    """Return which of each piece's values get gradients: those that later pieces read, and where backward starts.

    `layouts` are of the gradients that each piece makes, by position in its reads. A sum of several has a plain one.
    """
    found: dict[ValueId, list[Layout | None]] = {v: [None] for v in program.differentiated}
    seeds: _Seeds = []
    boundaries = program.boundaries
    for piece, before, after, of_reads in reversed(
        list(zip(program.pieces, boundaries, boundaries[1:], layouts, strict=False))
    ):
        made = [(s.index, found[v]) for s, v in zip(piece.state, after, strict=True) if s.origin == MADE and v in found]
        seeds.append(tuple((index, given[0] if len(given) == 1 else None) for index, given in made))
        for k, s in enumerate(piece.reads):
            if s.origin == STATE:
                found.setdefault(before[s.index], []).append(of_reads.get(k))
    return seeds[::-1]


def _with_estimates(piece: Piece, measured: Mapping[int, BlockProfile], executor: Executor) -> tuple[BlockProfile, ...]:
    """Return each option as measured, or as estimated and corrected by the measured options' smallest error."""
    estimates = {
        o: _estimated(measured[0], forecast, piece)
        for o, call in enumerate(piece.calls)
        if (forecast := executor.forecast(call)) is not None
    }
    pairs = [(measured[o], estimate) for o, estimate in estimates.items() if o in measured]
    more_bytes = min((m.backward_peak_bytes - e.backward_peak_bytes for m, e in pairs), default=0)
    more_device_s = min((m.backward.device_s - e.backward.device_s for m, e in pairs), default=0.0)
    more_host_s = min((m.backward.host_s - e.backward.host_s for m, e in pairs), default=0.0)
    slowest = measured[0].backward.plus(measured[0].forward)  # an option repeats at most the whole forward

    def corrected(e: BlockProfile) -> BlockProfile:
        timing = Timing(max(0.0, e.backward.device_s + more_device_s), max(0.0, e.backward.host_s + more_host_s))
        peak_bytes = max(0, e.backward_peak_bytes + more_bytes)
        return replace(e, backward_peak_bytes=peak_bytes, backward=timing.at_most(slowest))

    return tuple(measured[o] if o in measured else corrected(estimates[o]) for o in range(len(piece.calls)))


def _estimated(first: BlockProfile, forecast: Forecast, piece: Piece) -> BlockProfile:
    """Estimate an option from the measured option 0.

    What option 0 saves beyond it, backward makes again and has alive at once. An option of two halves may need less, so
    all options are measured before a budget is called too small.
    """
    remade_bytes = max(0, first.saved_bytes - forecast.saved_bytes)
    return replace(
        first,
        saved_bytes=forecast.saved_bytes,
        saved_reads=tuple(k for k in forecast.saved_arguments if piece.reads[k].origin == STATE),
        saved_made=forecast.saved_results,
        save_peak_bytes=max(first.save_peak_bytes, forecast.saved_bytes),
        replay_peak_bytes=max(first.replay_peak_bytes, forecast.saved_bytes),
        backward_peak_bytes=first.backward_peak_bytes + remade_bytes,
        backward=first.backward.plus(first.forward, share=forecast.repeated_share),
        is_estimated=True,
    )


def _counted(program: Program, profiles: _Profiles) -> _Profiles:
    """Return the only option of every block, with its operations counted in place of its seconds."""
    counts = count_operations(program.graph, [(piece.span.start, piece.span.stop) for piece in program.pieces])

    def both(seconds: float) -> Timing:
        return Timing(seconds, seconds)

    return [
        (replace(only, forward=both(c.forward_s), replay=both(c.replay_s), backward=both(c.backward_s)),)
        for (only,), c in zip(profiles, counts, strict=True)
    ]
