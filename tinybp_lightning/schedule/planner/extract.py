"""Write the actions of a persistent schedule: walk the states from the start, taking the fastest move at each.

A boundary is stored only when a split comes back to it, and dropped right after its own block's saved set exists.
The walk keeps its own stack, so that chains may have any length.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray

from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store
from tinybp_lightning.schedule.planner.states import StateModel

__all__ = ["LeastSeconds", "extract_schedule", "whole_units"]

_Floats = NDArray[np.float32] | NDArray[np.float64]
_Ints = NDArray[np.int64]
_Size = TypeVar("_Size", int, _Ints)


def whole_units(kept_bytes: _Size, unit_bytes: int) -> _Size:
    """Return what a move keeps alive, rounded to whole units."""
    return (2 * kept_bytes + unit_bytes) // (2 * unit_bytes)


class LeastSeconds(Protocol):
    """The least seconds of many parts of a step, infinite where they do not fit into what is left for them."""

    def segment_s(self, segments: _Ints, left: _Ints | int) -> _Floats:
        """Return the least seconds of segments, which are numbered as in `StateModel`."""
        ...

    def sweep_s(self, states: _Ints, left: _Ints | int) -> _Floats:
        """Return the least seconds of the rests of the first sweep from some states."""
        ...


@dataclass(frozen=True, slots=True)
class _Node:
    """A segment from `state` to the cut with index `end`, or with `None` the rest of the first sweep."""

    state: int
    end: int | None
    left: int


@dataclass(frozen=True, slots=True)
class _KeepHere:
    """Keep the first block's saved set of `option`; `rest` is what follows, `None` when nothing does."""

    option: int
    rest: _Node | None


@dataclass(frozen=True, slots=True)
class _SplitAt:
    """Run to `boundary` and reverse `right` from there, then `left` from here."""

    boundary: int
    right: _Node
    left: _Node


@dataclass(frozen=True, slots=True)
class _RunOut:
    """Run the first sweep to its end keeping nothing, then reverse `left` from here."""

    left: _Node


_Move = _KeepHere | _SplitAt | _RunOut


def extract_schedule(model: StateModel, least: LeastSeconds, *, unit_bytes: int, left: int) -> Schedule:
    """Return the schedule whose moves are the fastest by `least`.

    **Arguments:** `left`: what is left for the whole step, in units of `unit_bytes`; what a move keeps alive is rounded
    to units.
    """
    chooser = _Chooser(model, least, unit_bytes)
    actions: list[Action] = []
    # Nodes still to walk (with whether their boundary is stored) and backwards still to run, last first.
    pending: list[tuple[_Node, bool] | Backward] = [(_Node(0, None, left), True)]
    while pending:
        item = pending.pop()
        if isinstance(item, Backward):
            actions.append(item)
            continue
        node, stored = item
        i = model.states[node.state].boundary
        if i == model.num_blocks:
            continue
        move = chooser.choose(node)
        match move:
            case _KeepHere(option, rest):
                actions.append(ForwardSave(BlockId(i), OptionId(option)))
                actions += [Drop(BoundaryId(i))] if stored and i else []
                pending.append(Backward(BlockId(i), OptionId(option)))
                pending += [(rest, False)] if rest else []
            case _SplitAt(boundary, right, left_node):
                actions += [] if stored else [Store(BoundaryId(i))]
                actions += [Forward(BlockId(block)) for block in range(i, boundary)]
                pending += [(left_node, True), (right, False)]
            case _RunOut(left_node):
                actions += [] if stored else [Store(BoundaryId(i))]
                actions += [Forward(BlockId(block)) for block in range(i, model.num_blocks)]
                pending.append((left_node, True))
            case _:
                assert_never(move)
    return Schedule(num_blocks=model.num_blocks, actions=tuple(actions))


class _Chooser:
    """Takes the fastest move at a node."""

    def __init__(self, model: StateModel, least: LeastSeconds, unit_bytes: int) -> None:
        self._model = model
        self._least = least
        self._unit_bytes = unit_bytes

    def choose(self, node: _Node) -> _Move:
        model, state = self._model, self._model.states[node.state]
        first = model.first_cut(state.boundary)
        last = len(model.cuts) - 1 if node.end is None else node.end
        baseline_bytes = 0 if node.end is None else model.baseline_bytes[model.cuts[node.end]]
        offers = [self._keep(node, baseline_bytes), self._split(node, first, last - first, baseline_bytes)]
        if node.end is None:
            need_bytes, forward_s = model.run_out(state.boundary)
            left = _Node(node.state, last, node.left)
            seconds = forward_s + float(self._least.segment_s(self._segments(node.state, last), node.left)[0])
            offers.append((seconds if need_bytes <= node.left * self._unit_bytes else np.inf, _RunOut(left)))
        seconds, best = min(offers, key=lambda offer: offer[0])
        assert best is not None and seconds < np.inf, f"no move at {node}, which was said to fit"
        return best

    def _keep(self, node: _Node, baseline_bytes: int) -> tuple[float, _Move | None]:
        """Return the fastest way to keep the first block, and its seconds."""
        model, state = self._model, self._model.states[node.state]
        best_s, best = np.inf, None
        for option, keep in enumerate(state.keeps):
            if node.end is not None and model.cuts[node.end] == state.boundary + 1:
                need_bytes, seconds, rest = keep.replay_need_bytes, keep.replay_s, None
            else:
                need_bytes, seconds = keep.save_need_bytes, state.forward_s
                rest = _Node(keep.next_state, node.end, node.left - whole_units(keep.kept_bytes, self._unit_bytes))
                seconds += self._rest_s(rest)
            seconds += keep.backward_s
            need_bytes = max(need_bytes + baseline_bytes, keep.backward_need_bytes)
            if need_bytes <= node.left * self._unit_bytes and seconds < best_s:
                best_s, best = seconds, _KeepHere(option, rest)
        return best_s, best

    def _split(self, node: _Node, first: int, count: int, baseline_bytes: int) -> tuple[float, _Move | None]:
        """Return the fastest of the first `count` splits, and its seconds."""
        state = self._model.states[node.state]
        kept = whole_units(state.split_kept_bytes[:count], self._unit_bytes)
        fits = (state.split_need_bytes[:count] + baseline_bytes <= node.left * self._unit_bytes) & (kept <= node.left)
        numbers = np.flatnonzero(fits)
        if not len(numbers):
            return np.inf, None
        targets, rights_left = state.split_states[numbers], node.left - kept[numbers]
        if node.end is None:
            rights_s = self._least.sweep_s(targets, rights_left)
        else:
            rights_s = self._least.segment_s(self._segments(targets, node.end), rights_left)
        lefts_s = self._least.segment_s(self._segments(node.state, first + numbers), node.left)
        total_s = lefts_s + state.split_forward_s[numbers] + rights_s
        k = int(total_s.argmin())
        cut = first + int(numbers[k])
        right = _Node(int(targets[k]), node.end, int(rights_left[k]))
        return float(total_s[k]), _SplitAt(self._model.cuts[cut], right, _Node(node.state, cut, node.left))

    def _rest_s(self, rest: _Node) -> float:
        if rest.left < 0:
            return np.inf
        if rest.end is None:
            return float(self._least.sweep_s(np.array([rest.state]), rest.left)[0])
        return float(self._least.segment_s(self._segments(rest.state, rest.end), rest.left)[0])

    def _segments(self, states: _Ints | int, ends: _Ints | int) -> _Ints:
        return np.atleast_1d(self._model.segment_offset[states] + ends)
