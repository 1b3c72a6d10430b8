"""Explain the plans in force and what the memory is for, as text, Markdown, JSON and a picture."""

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from tinybp_lightning.analysis import OPERATIONS_PER_S, GraphReport, format_bytes, report_graph
from tinybp_lightning.config import Costs
from tinybp_lightning.errors import ConfigError
from tinybp_lightning.runtime.profile import PlanCounts, PlanReport
from tinybp_lightning.runtime.torch.api import targets
from tinybp_lightning.schedule import Certificate, Pareto, Plan, certify, keep_all, pareto, simulate, to_text
from tinybp_lightning.schedule.arguments import check_path

__all__ = ["Explanation", "explain"]

_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plans of one module: reports of its live graphs and of their plans, and where the plans came from."""

    graphs: tuple[GraphReport, ...]
    plans: tuple[PlanReport, ...]
    counts: tuple[PlanCounts, ...] = ()

    def __str__(self) -> str:
        shapes = "\n".join(f"shapes of {c.summary}" for c in self.counts)
        parts = [*(_plan_text(p) for p in self.plans), shapes, *(g.to_text() for g in self.graphs)]
        return "\n\n".join(part for part in parts if part)

    def to_markdown(self) -> str:
        """Return the same as Markdown, with one table row per block."""
        shapes = "\n".join(f"- shapes of {c.summary}" for c in self.counts)
        parts = [*(_plan_markdown(p) for p in self.plans), shapes, *(g.to_markdown() for g in self.graphs)]
        return "\n\n".join(part for part in parts if part)

    def to_json(self) -> str:
        """Return the same as JSON with sorted keys; sizes in bytes, times in seconds."""
        plans = [_plan_data(p) for p in self.plans]
        graphs = [json.loads(g.to_json()) for g in self.graphs]
        counts = [asdict(c) for c in self.counts]
        return json.dumps({"plans": plans, "graphs": graphs, "counts": counts}, indent=2, sort_keys=True)

    def plot(self, path: str | Path) -> Path:
        """Draw the predicted memory of each plan over the step's time, against plain training, and return the path.

        **Raises:** `ConfigError` if `path` is not a path; `ImportError` without matplotlib
        (`pip install tinybp-lightning[recipes]`).
        """
        check_path(path)
        from matplotlib.figure import Figure  # noqa: PLC0415 - matplotlib is an extra

        figure = Figure(figsize=(9, 3.2 * len(self.plans)), layout="constrained")
        panels: Any = figure.subplots(len(self.plans), 1, squeeze=False)
        for panel, plan in zip(panels[:, 0], self.plans, strict=True):
            _plot_plan(panel, plan)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        return Path(path)

    def pareto(self, *, num_points: int = 12) -> tuple[Pareto, ...]:
        """Return, for each of `plans`, the best time and its bound at `num_points` budgets; each takes one planning."""
        return tuple(pareto(plan.chain, num_points=num_points) for plan in self.plans)


def explain(module: nn.Module) -> Explanation:
    """Explain the plans under which `module` (or parts of it) is trained.

    **Raises:** `ConfigError` if nothing at or below `module` has been planned yet.
    """
    found = targets(module)
    plans = tuple(report for target in found for report in target.reports)
    if not plans:
        raise ConfigError(
            f"`{type(module).__name__}` has no plan yet: call `tbp.hcb(model, ...)` and run one training step "
            "(plans are made from the real inputs)."
        )
    graphs = tuple(report_graph(graph) for target in found for graph in target.graphs)
    return Explanation(graphs, plans, tuple(target.counts for target in found))


@lru_cache(maxsize=32)
def _certificate(plan: PlanReport) -> Certificate:
    """Bound how far the plan is from the best one. This takes seconds, so it runs when a user asks, not in a step."""
    timeline = simulate(plan.chain, plan.schedule)
    found = Plan(plan.schedule, plan.budget_bytes, timeline.peak_bytes, timeline.total_s, timeline.recompute_s)
    return certify(plan.chain, found)


_WORSE = {Costs.SECONDS: "slower", Costs.OPERATIONS: "more operations"}


def _cost(plan: PlanReport, seconds: float) -> str:
    if plan.costs is Costs.OPERATIONS:
        return f"{seconds * OPERATIONS_PER_S / 1e6:.2f} MFLOP"
    return f"{seconds * 1e3:.3f} ms"


def _plan_text(plan: PlanReport) -> str:
    notation = to_text(plan.schedule)
    shown = notation if len(notation) <= 400 else notation[:400] + " ..."
    num_unique = len({b.signature for b in plan.chain.blocks})
    gap = _certificate(plan).gap
    lines = [
        f"plan for {plan.target}",
        f"  blocks          {len(plan.chain.blocks)} ({num_unique} unique), {plan.num_kept} kept in the first sweep",
        f"  budget          {format_bytes(plan.budget_bytes)}",
        f"  predicted peak  {format_bytes(plan.predicted_peak_bytes)} (plain {format_bytes(plan.plain_peak_bytes)})",
        f"  recompute       {_cost(plan, plan.predicted_recompute_s)} of {_cost(plan, plan.predicted_step_s)}",
        f"  certificate     at most {gap:.1%} {_WORSE[plan.costs]} than any schedule within the budget",
        f"  why             {plan.reason}",
        f"  schedule        {shown}",
    ]
    return "\n".join(lines)


def _plan_markdown(plan: PlanReport) -> str:
    rows = [
        f"| {i} | `{b.name}` | {_cost(plan, b.forward_s)} | {format_bytes(b.options[0].saved_bytes)} "
        f"| {format_bytes(b.options[0].backward_peak_bytes)} |"
        for i, b in enumerate(plan.chain.blocks)
    ]
    head = "| block | where | forward | saved | backward's own peak |\n|---|---|---|---|---|"
    return "\n".join([f"## {plan.summary}", "", head, *rows])


def _plan_data(plan: PlanReport) -> dict[str, object]:
    timeline = simulate(plan.chain, plan.schedule)
    simple = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("chain", "schedule", "costs")}
    return {
        **simple,
        "num_blocks": len(plan.chain.blocks),
        "lower_bound_s": _certificate(plan).lower_bound_s,
        "gap": _certificate(plan).gap,
        "costs": plan.costs.value,
        "schedule": to_text(plan.schedule),
        "timeline": [[m.start_s, m.end_s, m.peak_bytes] for m in timeline.moments],
    }


def _plot_plan(panel: Any, plan: PlanReport) -> None:
    shown = ((keep_all(plan.chain), "plain training", "0.7"), (plan.schedule, "this plan", "tab:blue"))
    for schedule, label, color in shown:
        moments = simulate(plan.chain, schedule).moments
        times = [t * 1e3 for m in moments for t in (m.start_s, m.end_s)]
        sizes = [s / _MIB for m in moments for s in (m.peak_bytes, m.peak_bytes)]
        panel.fill_between(times, sizes, step=None, alpha=0.35, color=color, linewidth=0)
        panel.plot(times, sizes, color=color, linewidth=1, label=label)
    panel.axhline(plan.budget_bytes / _MIB, color="tab:red", linestyle="--", linewidth=1, label="budget")
    panel.set_title(plan.summary, fontsize=9)
    panel.set_xlabel("time in the step, predicted (ms)")
    panel.set_ylabel("activations (MiB)")
    panel.set_ylim(bottom=0)
    panel.legend(loc="upper right", fontsize=8)
