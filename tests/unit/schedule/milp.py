"""What is the best schedule, by integer programming? Checkmate's formulation for a chain, solved by HiGHS.

After Jain et al., *Checkmate: breaking the memory wall with optimal tensor rematerialization*, 2020: the step is cut
into stages, here the first sweep and one stage before each backward; binary variables say what runs in a stage, what
is stored and what is saved at its start. In a stage a block runs once at most, in ascending order. Storages that
several things hold have a variable of their own, so that they count once. An oracle for tests and comparisons, not a
planner: time rises steeply with the number of blocks.
"""

# scipy is annotated in part only, so these rules would report it and not us.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ids import BlockId, BoundaryId, OptionId
from tinybp_lightning.schedule.actions import Action, Backward, Drop, Forward, ForwardSave, Schedule, Store

__all__ = ["Solution", "checkmate"]

_Terms = dict[int, float]
_Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """The best schedule found, and `lower_bound_s`, which no schedule of this form beats; equal when it is optimal."""

    schedule: Schedule
    total_s: float
    lower_bound_s: float


def checkmate(chain: Chain, *, budget_bytes: int, limit_s: float = 60.0) -> Solution | None:
    """Return the fastest schedule within `budget_bytes` that HiGHS finds in `limit_s`, or `None` if it finds none."""
    program = _Program(chain, budget_bytes)
    program.build()
    found = program.solve(limit_s)
    return None if found is None else Solution(program.schedule(found[0]), found[1], found[2])


@dataclass(slots=True)
class _Program:
    chain: Chain
    budget_bytes: int
    index: dict[_Key, int] = field(default_factory=dict[_Key, int])
    cost: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    rows: list[tuple[_Terms, float, float]] = field(default_factory=list[tuple[_Terms, float, float]])

    @property
    def num_blocks(self) -> int:
        return len(self.chain.blocks)

    def end(self, stage: int) -> int:
        """Blocks that still count in `stage`: its backward, if it has one, is that of the last of them."""
        return self.num_blocks - max(0, stage - 1)

    def options(self, block: int) -> range:
        return range(len(self.chain.blocks[block].options))

    # ---- variables: run, keep and (stopping) early in a stage; stored and saved at its start; used by its backward

    def var(self, *key: str | int) -> int:
        return self.index.setdefault(key, len(self.index))

    def made(self, stage: int, block: int) -> _Terms:
        """Whether `stage` makes the boundary after `block`."""
        terms = {self.var("run", stage, block): 1.0}
        if stage == 0 or block < self.end(stage) - 1:
            terms |= {self.var("keep", stage, block, option): 1.0 for option in self.options(block)}
        return terms

    def ran(self, stage: int, block: int) -> _Terms:
        terms = self.made(stage, block)
        if stage and block == self.end(stage) - 1:
            terms |= {self.var("early", stage, block, option): 1.0 for option in self.options(block)}
        return terms

    def add(self, terms: _Terms, low: float, high: float) -> None:
        self.rows.append((terms, low, high))

    # ---- constraints

    def build(self) -> None:
        for stage in range(self.num_blocks + 1):
            for block in range(self.end(stage)):
                self._run(stage, block)
            for block in range(self.end(stage) - (stage > 0)):
                self._carry(stage, block)
            for block in range(self.end(stage)):
                self._run_bytes(stage, block)
            if stage:
                self._backward(stage)
        self._loss_bytes()

    def _run(self, stage: int, block: int) -> None:
        """A block runs once in the sweep and at most once later, from a stored boundary or from the run before."""
        costs, ran = self.chain.blocks[block], self.ran(stage, block)
        for variable in ran:
            self.cost[variable] = costs.forward_s
        for option in self.options(block):
            if stage and block == self.end(stage) - 1:
                self.cost[self.var("early", stage, block, option)] = costs.options[option].replay_s
        self.add(ran, 1 if stage == 0 else 0, 1)
        if stage and block:
            before = dict.fromkeys(self.made(stage, block - 1), -1.0)
            self.add({**ran, **before, self.var("stored", stage, block): -1.0}, -np.inf, 0)

    def _carry(self, stage: int, block: int) -> None:
        """What the next stage starts with was there or was made; a saved set stays until its backward."""
        if stage == self.num_blocks:
            return
        if block:
            before = {self.var("stored", stage, block): -1.0} if stage else {}
            made = dict.fromkeys(self.made(stage, block - 1), -1.0)
            self.add({self.var("stored", stage + 1, block): 1.0, **before, **made}, -np.inf, 0)
        one_set: _Terms = {}
        for option in self.options(block):
            kept = {self.var("keep", stage, block, option): -1.0}
            kept |= {self.var("saved", stage, block, option): -1.0} if stage else {}
            self.add({self.var("saved", stage + 1, block, option): 1.0, **kept}, 0, 0)
            one_set |= dict.fromkeys(kept, 1.0)
        self.add(one_set, 0, 1)

    def _held(self, moment: _Key, boundaries: list[tuple[_Terms, int]], saved: list[tuple[int, int, int]]) -> _Terms:
        """The bytes of boundaries (each with the terms that say it is held) and saved sets, each storage once."""
        terms: _Terms = defaultdict(float)
        holders: dict[int, list[_Terms]] = defaultdict(list)
        for held, boundary in boundaries:
            for storage in self.chain.boundaries[boundary].storages:
                holders[storage].append(held)
        for variable, block, option in saved:
            terms[variable] += self.chain.blocks[block].options[option].saved_bytes
            for storage in self.chain.blocks[block].options[option].storages:
                holders[storage].append({variable: 1.0})
        for storage, reasons in sorted(holders.items()):
            if size := self.chain.storage_bytes[storage]:
                counted = self.var("counted", *moment, storage)
                terms[counted] += size
                for reason in reasons:
                    self.add({counted: 1.0, **{variable: -x for variable, x in reason.items()}}, 0, np.inf)
        return terms

    def _saved(self, stage: int, *, before: int) -> list[tuple[int, int, int]]:
        """The saved sets alive in `stage` when `before` runs: those it started with and those it has made."""
        found: list[tuple[int, int, int]] = []
        for block in range(self.end(stage)):
            for option in self.options(block):
                if stage:
                    found.append((self.var("saved", stage, block, option), block, option))
                if block < before and (stage == 0 or block < self.end(stage) - 1):
                    found.append((self.var("keep", stage, block, option), block, option))
        return found

    def _stored(self, stage: int, *, low: int, high: int) -> list[tuple[_Terms, int]]:
        """Boundaries `low .. high-1` stored at the start of `stage`; boundary 0 counts in `_limit`."""
        return [({self.var("stored", stage, i): 1.0}, i) for i in range(max(1, low), high)]

    def _run_bytes(self, stage: int, block: int) -> None:
        costs, end = self.chain.blocks[block], self.end(stage)
        held = [*self._stored(stage + 1, low=1, high=min(block, end - 1)), (self.ran(stage, block), block)]
        if stage:
            held += self._stored(stage, low=block + 1, high=end)
        terms = self._held(("run", stage, block), held, self._saved(stage, before=block))
        terms[self.var("run", stage, block)] += costs.forward_peak_bytes
        for variable in [v for v in self.made(stage, block) if v != self.var("run", stage, block)]:
            option = next(o for o in self.options(block) if self.var("keep", stage, block, o) == variable)
            terms[variable] += costs.options[option].save_peak_bytes
        standing_bytes = self._standing_bytes(stage)
        if stage and block == end - 1:
            early = [(self.var("early", stage, block, o), block, o) for o in self.options(block)]
            after = self._held(("early", stage), held, [*self._saved(stage, before=block), *early])
            self._limit(after, standing_bytes)
            for variable, _, option in early:
                terms[variable] += costs.options[option].replay_peak_bytes
        self._limit(terms, standing_bytes)

    def _backward(self, stage: int) -> None:
        block = self.end(stage) - 1
        costs, used, backward_bytes = self.chain.blocks[block], dict[int, float](), dict[int, float]()
        saved = [row for row in self._saved(stage, before=block) if row[1] != block]
        for option, choice in enumerate(costs.options):
            variable = self.var("used", stage, option)
            there = {self.var("early", stage, block, option): -1.0, self.var("saved", stage, block, option): -1.0}
            self.add({variable: 1.0, **there}, -np.inf, 0)
            # A saved set that is not used by the backward would stay alive: none may be left.
            self.add({variable: -1.0, **dict.fromkeys(there, 1.0)}, -np.inf, 0)
            self.cost[variable] = choice.backward_s
            used[variable] = 1.0
            backward_bytes[variable] = choice.backward_peak_bytes
            saved.append((variable, block, option))
        self.add(used, 1, 1)
        held = self._stored(stage + 1, low=1, high=block) if stage < self.num_blocks else []
        terms = self._held(("backward", stage), held, saved)
        for variable, peak_bytes in backward_bytes.items():
            terms[variable] += peak_bytes
        self._limit(terms, self._standing_bytes(stage) + costs.parameter_gradient_bytes)

    def _loss_bytes(self) -> None:
        chain, end = self.chain, self.num_blocks
        saved = list(self._saved(1, before=0))
        terms = self._held(("loss",), [*self._stored(1, low=1, high=end), ({self.var("one"): 1.0}, end)], saved)
        self.add({self.var("one"): 1.0}, 1, 1)
        self._limit(terms, chain.tail_peak_bytes)

    def _standing_bytes(self, stage: int) -> int:
        if stage == 0:
            return 0
        end = self.end(stage)
        gradients = sum(block.parameter_gradient_bytes for block in self.chain.blocks[end:])
        return self.chain.tail_live_bytes + self.chain.boundaries[end].gradient_bytes + gradients

    def _limit(self, terms: _Terms, other_bytes: int) -> None:
        root_bytes = sum(self.chain.storage_bytes[s] for s in self.chain.boundaries[0].storages)
        own = set(self.chain.boundaries[0].storages)
        counted = {k: v for k, v in self.index.items() if k[0] == "counted" and k[-1] in own}
        # Boundary 0 is always there: its storages are a constant, not a choice.
        terms = {variable: x for variable, x in terms.items() if variable not in counted.values()}
        self.add(terms, -np.inf, self.budget_bytes - self.chain.unmodelled_bytes - other_bytes - root_bytes)

    # ---- solution

    def solve(self, limit_s: float) -> tuple[dict[_Key, bool], float, float] | None:
        count = len(self.index)
        entries = [(row, variable, x) for row, (terms, _, _) in enumerate(self.rows) for variable, x in terms.items()]
        rows, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self.rows), count))
        cost = np.array([self.cost.get(variable, 0.0) for variable in range(count)])
        integral = np.array([0 if key[0] == "counted" else 1 for key in self.index])
        low, high = (np.array([row[k] for row in self.rows]) for k in (1, 2))
        limits: Any = LinearConstraint(matrix, cast(Any, low), cast(Any, high))
        found: Any = milp(
            cost,
            constraints=limits,
            integrality=integral,
            bounds=Bounds(0, 1),
            options={"time_limit": limit_s, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen = {key: bool(found.x[variable] > 0.5) for key, variable in self.index.items()}
        return chosen, float(found.fun), float(found.mip_dual_bound)

    def schedule(self, chosen: dict[_Key, bool]) -> Schedule:
        """Return the schedule that the variables spell."""
        actions: list[Action] = []
        for stage in range(self.num_blocks + 1):
            end = self.end(stage)
            for block in range(end):
                actions += self._spelled(chosen, stage, block)
            if stage:
                option = next(o for o in self.options(end - 1) if chosen["used", stage, o])
                actions.append(Backward(BlockId(end - 1), OptionId(option)))
        return Schedule(num_blocks=self.num_blocks, actions=tuple(actions))

    def _spelled(self, chosen: dict[_Key, bool], stage: int, block: int) -> list[Action]:
        found: list[Action] = [Forward(BlockId(block))] if chosen["run", stage, block] else []
        for kind in ("keep", "early"):
            found += [
                ForwardSave(BlockId(block), OptionId(o))
                for o in self.options(block)
                if chosen.get((kind, stage, block, o), False)
            ]
        had, has = (chosen.get(("stored", stage + k, block), False) for k in (0, 1))
        if block and had and not has:
            found.append(Drop(BoundaryId(block)))
        made, stays = (
            bool(found) and not chosen.get(("stored", stage, block + 1), False),
            block + 1 < self.end(stage + 1),
        )
        if made and stays and chosen.get(("stored", stage + 1, block + 1), False):
            found.append(Store(BoundaryId(block + 1)))
        return found
