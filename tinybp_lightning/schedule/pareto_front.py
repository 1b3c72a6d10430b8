"""Show what a byte of memory buys: the time of the plan, and its lower bound, at budgets from the smallest up.

One `Planner` plans all budgets. A bound at one budget holds at every smaller one too, so each point carries the best of
its own and of those to its right; bounds fall with the budget just as times do.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinybp_lightning.analysis import estimate_chain
from tinybp_lightning.errors import MissingPackageError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.schedule.arguments import check_budgets, check_count, check_path
from tinybp_lightning.schedule.baselines import every_sqrt_n, keep_all, per_block
from tinybp_lightning.schedule.bounds.certificate import certify
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import simulate

__all__ = ["Pareto", "ParetoPoint", "ParetoReference", "pareto"]

_GIB, _MIB = 2**30, 2**20
_MARKERS = ("s", "^", "D")
"""One for each of `Pareto.references`."""


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """The plan for one budget: its exact peak, its time, and the time below which no schedule within the budget is."""

    budget_bytes: int
    peak_bytes: int
    total_s: float
    recompute_s: float
    lower_bound_s: float

    @property
    def gap(self) -> float:
        """How much slower than the best possible the plan is at most: 0.01 is one percent."""
        return self.total_s / self.lower_bound_s - 1 if self.lower_bound_s else 0.0


@dataclass(frozen=True, slots=True)
class ParetoReference:
    """What a known method costs: keeping everything, checkpointing every block, or every sqrt(n)-th."""

    name: str
    peak_bytes: int
    total_s: float
    recompute_s: float


@dataclass(frozen=True, slots=True)
class Pareto:
    """Plan and bound against budget for one chain.

    `points`: by increasing budget; times and bounds never rise. `smallest_bytes`: the smallest feasible budget.
    `plain_peak_bytes`, `plain_s`: plain training, which keeps everything. `is_estimated`: bytes and seconds come from
    `estimate_chain` and not from the chain that was given.
    """

    points: tuple[ParetoPoint, ...]
    references: tuple[ParetoReference, ...]
    smallest_bytes: int
    plain_peak_bytes: int
    plain_s: float
    is_estimated: bool = False

    def to_json(self) -> str:
        """Return everything as JSON with sorted keys that ends in a newline; sizes in bytes, times in seconds."""
        record = asdict(self)
        record["points"] = [{**asdict(point), "gap": point.gap} for point in self.points]
        return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def plot(self, path: str | Path) -> Path:
        """Draw plan, bound and known methods as a PNG, and return the path.

        **Raises:** `ConfigError` if `path` is not a path; `MissingPackageError` if matplotlib is not there
        (`pip install tinybp-lightning[recipes]`).
        """
        check_path(path)
        path = Path(path)
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingPackageError(
                "`Pareto.plot` draws with matplotlib, which is not installed: `pip install tinybp-lightning[recipes]`."
            ) from error
        figure: Any = Figure(figsize=(8.5, 5), layout="constrained")
        panel = figure.subplots()
        unit_bytes, unit = (_GIB, "GiB") if self.plain_peak_bytes >= _GIB else (_MIB, "MiB")
        _draw(panel, self, unit_bytes)
        panel.set_xlabel(f"budget ({unit})")
        how = ", estimated" if self.is_estimated else ""
        panel.set_ylabel(f"time of a step (plain training = 1{how})")
        panel.set_title(
            f"smallest budget {self.smallest_bytes / unit_bytes:.3g} {unit}, plain training "
            f"{self.plain_peak_bytes / unit_bytes:.3g} {unit}, largest gap {max(p.gap for p in self.points):.1%}",
            fontsize=10,
        )
        panel.grid(visible=True, alpha=0.25)
        panel.legend(fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        return path


def pareto(chain: Chain | Graph, *, num_points: int = 12, budgets_bytes: Sequence[int] | None = None) -> Pareto:
    """Return plan and bound against budget.

    **Arguments:** `chain`: with measured costs, or a `Graph`, which stands for `estimate_chain(graph)`;
    `num_points`: how many budgets, at equal ratios from the smallest feasible one to what plain training needs;
    `budgets_bytes`: budgets of your own in place of these.

    **Raises:** `ConfigError` for something that is neither or for fewer than 2 points; `BudgetError` for a budget that
    is not a number of bytes; `BudgetTooSmallError` for one that no plan meets.
    """
    check_count("num_points", num_points, at_least=2, meaning="the smallest and the largest budget")
    if budgets_bytes is not None:
        check_budgets(budgets_bytes)
    is_estimated = isinstance(chain, Graph)
    if isinstance(chain, Graph):
        chain = estimate_chain(chain)
    planner = Planner(chain)
    methods = (("keep all", keep_all), ("per block", per_block), ("every sqrt(n)", every_sqrt_n))
    played = ((name, simulate(chain, method(chain))) for name, method in methods)
    references = tuple(ParetoReference(name, t.peak_bytes, t.total_s, t.recompute_s) for name, t in played)
    plain = references[0]
    if budgets_bytes is None:
        chosen = _budgets(planner.smallest_bytes, max(plain.peak_bytes, planner.largest_bytes), num_points)
    else:
        chosen = sorted(dict.fromkeys(budgets_bytes))
    return Pareto(
        points=_points(planner, chosen),
        references=references,
        smallest_bytes=planner.smallest_bytes,
        plain_peak_bytes=plain.peak_bytes,
        plain_s=plain.total_s,
        is_estimated=is_estimated,
    )


def _budgets(smallest_bytes: int, largest_bytes: int, num_points: int) -> list[int]:
    ratio = largest_bytes / max(1, smallest_bytes)
    inner = [round(smallest_bytes * ratio ** (k / (num_points - 1))) for k in range(1, num_points - 1)]
    # Rounding must not take a budget outside.
    return sorted({smallest_bytes, largest_bytes, *(min(max(b, smallest_bytes), largest_bytes) for b in inner)})


def _points(planner: Planner, budgets_bytes: Sequence[int]) -> tuple[ParetoPoint, ...]:
    points = list[ParetoPoint]()
    lower_bound_s = 0.0
    for budget_bytes in reversed(budgets_bytes):
        plan = planner.plan(budget_bytes=budget_bytes)
        lower_bound_s = max(lower_bound_s, certify(planner.chain, plan, planner=planner).lower_bound_s)
        points.append(ParetoPoint(budget_bytes, plan.peak_bytes, plan.total_s, plan.recompute_s, lower_bound_s))
    return tuple(reversed(points))


def _draw(panel: Any, curve: Pareto, unit_bytes: int) -> None:
    budgets = [p.budget_bytes / unit_bytes for p in curve.points]
    plain_s = curve.plain_s or 1.0
    plans, bounds = [p.total_s / plain_s for p in curve.points], [p.lower_bound_s / plain_s for p in curve.points]
    # Between two budgets the plan is that of the smaller one, and the bound that of the larger one: both are steps.
    panel.plot(budgets, plans, "o-", color="tab:blue", drawstyle="steps-post", markersize=4, label="plan")
    panel.plot(budgets, bounds, color="tab:red", drawstyle="steps-pre", linewidth=1, label="lower bound")
    floor = min([*bounds, 1.0]) - 0.05
    panel.fill_between(budgets, bounds, floor, step="pre", color="tab:red", alpha=0.12, linewidth=0)
    for reference, marker in zip(curve.references, _MARKERS, strict=True):
        at = reference.peak_bytes / unit_bytes, reference.total_s / plain_s
        panel.plot(*at, marker, color="0.25", markersize=7, linestyle="none", label=reference.name)
    panel.axvline(curve.smallest_bytes / unit_bytes, color="0.6", linestyle=":", linewidth=1)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=floor)
