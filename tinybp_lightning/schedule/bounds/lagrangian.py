"""Bound the time of every legal schedule within a budget by prices on bytes: Lagrangian relaxation.

Give each *moment* `t` a price `p_t >= 0`, in seconds for a byte. Moments are the loss and the start of every block's
backward. Let `u_t(S)` be the bytes that schedule `S` has alive there, what the backward itself needs included. Within
`budget` we have `u_t(S) <= budget`, so for any prices

    time(S)  >=  min over all schedules S' of [time(S') + sum_t p_t u_t(S')]  -  budget sum_t p_t .

The minimum has no budget any more, and a dynamic program over intervals computes it, with `u_t` replaced by something
smaller (`relaxation` says by what; proofs P5 to P8). So every choice of prices gives a true lower bound;
`certificate` looks for good ones. This is Lagrangian relaxation. The program is the "send and split" of Erickson,
Monma and Veinott 1987 for Steiner trees whose ends lie on the rim of a planar grid: here of blocks and moments.

# Note [Stride]
All forks take `n^4 / 24` steps. On long chains boundaries that are held for ends beyond their own block are moved on
to the next multiple of a stride, where they weigh as little as any in the stride before: later uses run less and hold
less, so the value stays a bound. Those for ends within the stride stay where they are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.schedule.bounds.relaxation import RelaxedChain, RelaxedOption

__all__ = ["LagrangianBound", "Priced"]

_Floats = NDArray[np.float64]
_INFINITE = float(np.inf)


@dataclass(frozen=True, slots=True)
class Priced:
    """What prices give: the value, and at each moment the bytes alive in the cheapest schedule less the budget."""

    value_s: float
    excess_bytes: _Floats


class LagrangianBound:
    """Evaluates bounds for one chain and budget.

    Prices are arrays of `n + 2` seconds per byte, none negative: `prices[b + 1]` at block `b`'s backward,
    `prices[n + 1]` at the loss, `prices[0]` not used.
    """

    def __init__(self, relaxed: RelaxedChain, *, stride: int = 1) -> None:
        self._relaxed = relaxed
        self._stride = stride
        self._passed = relaxed.passed_bytes
        self._first = relaxed.first_bytes
        self._forward_s = relaxed.forward_s

    def price(self, prices: _Floats) -> Priced:
        """Return the bound that `prices` give, and the way to better ones: up to rounding, a supergradient."""
        assert np.all(prices >= 0), "a negative price bounds nothing"
        n, paid = self._relaxed.num_blocks, np.cumsum(np.concatenate([[0.0], prices[1:]]))
        record = _Record(prices, paid, [np.empty((1, 1), np.float32)] * (n + 1), [np.empty(0)] * (n + 1))
        # `segment[q, j]` and `sweep[q]` belong to boundary `i`, the last one that the loop has reached.
        segment = np.full((n + 1, n + 1), _INFINITE)
        sweep = np.full(n + 1, _INFINITE)
        sweep[n] = prices[n + 1] * self._relaxed.loss_bytes
        record.sweeps[n] = sweep
        for i in reversed(range(n)):
            segment, sweep = self._moves(i, segment, sweep, record)
            self._fork_segments(i, segment, paid)
            self._fork_sweep(i, segment, sweep, paid)
            record.segments[i], record.sweeps[i] = segment[i:, i:].astype(np.float32), sweep
        value_s = float(sweep[0]) - self._relaxed.left_bytes * float(prices[1:].sum())
        return Priced(value_s, self._used_bytes(record) - self._relaxed.left_bytes)

    def _moves(self, i: int, after: _Floats, after_sweep: _Floats, record: "_Record") -> tuple[_Floats, _Floats]:
        """Keep block `i` or run and leave it, given the costs from boundary `i + 1`."""
        paid = record.paid
        segment, sweep = after + self._forward_s[i], after_sweep + self._forward_s[i]
        segment[i], sweep[i] = _INFINITE, _INFINITE
        for option in self._relaxed.options[i]:
            own_s = option.backward_s + record.prices[i + 1] * option.backward_bytes
            segment[i, i + 1] = min(segment[i, i + 1], option.replay_s + own_s)
            kept = self._forward_s[i] + own_s + option.weight_bytes * (paid[i + 2 : -1] - paid[i + 1])
            segment[i, i + 2 :] = np.minimum(segment[i, i + 2 :], kept + after[i + 1, i + 2 :])
            kept_s = self._forward_s[i] + own_s + option.weight_bytes * (paid[-1] - paid[i + 1])
            sweep[i] = min(sweep[i], kept_s + after_sweep[i + 1])
        return segment, sweep

    def _fork_segments(self, i: int, segment: _Floats, paid: _Floats) -> None:
        """Hold boundary `i` for `low .. q-1` while `q .. end-1` are served; with `q` ascending the parts are final."""
        n = self._relaxed.num_blocks
        for q in range(i + 1, n):
            for first, last, held_bytes in self._holds(i, q):
                lows = segment[first:last, q + 1 :]
                forked = np.multiply.outer(held_bytes, paid[q + 1 : n + 1] - paid[q])
                forked += segment[first:last, q, None]
                forked += segment[q, q + 1 :]
                np.minimum(lows, forked, out=lows)

    def _fork_sweep(self, i: int, segment: _Floats, sweep: _Floats, paid: _Floats) -> None:
        n = self._relaxed.num_blocks
        for q in range(i + 1, n + 1):
            for first, last, held_bytes in self._holds(i, q):
                forked = held_bytes * (paid[-1] - paid[q]) + segment[first:last, q] + sweep[q]
                np.minimum(sweep[first:last], forked, out=sweep[first:last])

    def _holds(self, i: int, q: int) -> list[tuple[int, int, _Floats]]:
        """Ranges of `low` for which boundary `i` may be held for `low .. q-1`, with its weights. See Note [Stride]."""
        near = q if self._stride == 1 else min(q, i + self._stride)
        passed = self._passed[i]
        holds = [(i, near, self._first[i, q] + passed[q] - passed[i:near])]
        if self._stride > 1 and i % self._stride == 0 and q > i + 1:
            lightest = self._first[max(0, i + 1 - self._stride) : i + 1, q].min()
            holds.append((i + 1, q, np.full(q - i - 1, lightest)))
        return holds

    def _held_bytes(self, i: int, low: int, forks: NDArray[np.int64]) -> _Floats | None:
        """The weights of boundary `i` held for `low .. q-1`, for many `q`; `None` where it may not be."""
        if self._stride > 1 and low > i and i % self._stride == 0:
            return self._first[max(0, i + 1 - self._stride) : i + 1, forks].min(axis=0)
        if self._stride == 1 or low < i + self._stride:
            return self._first[i, forks] + self._passed[i, forks] - self._passed[i, low]
        return None

    def _used_bytes(self, record: "_Record") -> _Floats:
        """Walk the cheapest schedule and count its bytes at every moment."""
        n = self._relaxed.num_blocks
        used_bytes = np.zeros(n + 2)
        # Boundaries at hand and the ends they serve, `low .. end-1`; the loss is end `n`.
        pending = [(0, 0, n + 1)]
        while pending:
            i, low, end = pending.pop()
            if i == n:
                used_bytes[n + 1] += self._relaxed.loss_bytes
                continue
            forks = np.arange(low + 1, end)
            held_bytes = self._held_bytes(i, low, forks) if len(forks) else None
            move_s, option = self._cheapest_move(i, low, end, record)
            forked_s = np.array([_INFINITE])
            if held_bytes is not None:
                held_s = held_bytes * (record.paid[end] - record.paid[forks])
                forked_s = self._forward_s[i] + record.tops(i + 1, forks, end) + record.rows(i, low, forks) + held_s
            if held_bytes is not None and forked_s.min() < move_s:
                fork = int(forks[forked_s.argmin()])
                used_bytes[fork + 1 : end + 1] += held_bytes[fork - low - 1]
                pending += [(i + 1, fork, end), (i, low, fork)]
            elif option is None:
                pending.append((i + 1, low, end))
            else:
                used_bytes[i + 1] += option.backward_bytes
                used_bytes[i + 2 : end + 1] += option.weight_bytes
                pending += [(i + 1, i + 1, end)] if end > i + 1 else []
        return used_bytes

    def _cheapest_move(self, i: int, low: int, end: int, record: "_Record") -> tuple[float, RelaxedOption | None]:
        """Return the cost of running the first block, and the option to keep it with, if it is one of the ends."""
        if low > i:
            return float(self._forward_s[i]) + record.cost(i + 1, low, end), None
        best_s, best = _INFINITE, None
        for option in self._relaxed.options[i]:
            own_s = option.backward_s + record.prices[i + 1] * option.backward_bytes
            if end == i + 1:
                total_s = own_s + option.replay_s
            else:
                held_s = option.weight_bytes * (record.paid[end] - record.paid[i + 1])
                total_s = own_s + self._forward_s[i] + held_s + record.cost(i + 1, i + 1, end)
            if total_s < best_s:
                best_s, best = total_s, option
        return best_s, best


@dataclass(frozen=True, slots=True)
class _Record:
    """The prices and all costs of one evaluation: `segments[i][q - i, j - i]`, `sweeps[i][q]`.

    `paid[j] - paid[q]` is the price of a byte held while the ends `q .. j-1` are served.
    """

    prices: _Floats
    paid: _Floats
    segments: list[NDArray[np.float32]]
    sweeps: list[_Floats]

    def cost(self, i: int, low: int, end: int) -> float:
        if end == len(self.sweeps):
            return float(self.sweeps[i][low])
        return float(self.segments[i][low - i, end - i])

    def rows(self, i: int, low: int, ends: NDArray[np.int64]) -> _Floats:
        """The costs from one `low` to many ends."""
        return self.segments[i][low - i, ends - i].astype(np.float64)

    def tops(self, i: int, lows: NDArray[np.int64], end: int) -> _Floats:
        """The costs from many `low` to one end."""
        if end == len(self.sweeps):
            return self.sweeps[i][lows]
        return self.segments[i][lows - i, end - i].astype(np.float64)
