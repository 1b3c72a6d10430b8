"""What to keep, drop, recompute or move to host memory, and when: schedules, the planner and their judges."""

from tinybp_lightning.schedule.actions import (
    Action,
    Backward,
    Drop,
    Forward,
    ForwardSave,
    Offload,
    Reload,
    Schedule,
    Store,
)
from tinybp_lightning.schedule.baselines import (
    every_k,
    every_sqrt_n,
    keep_all,
    keep_some,
    per_block,
    revolve,
    revolve_cost,
    saved_knapsack,
    selective,
)
from tinybp_lightning.schedule.bounds.certificate import Certificate, certify
from tinybp_lightning.schedule.notation import from_text, to_text
from tinybp_lightning.schedule.offload import OffloadPlan, plan_offload
from tinybp_lightning.schedule.pareto_front import Pareto, ParetoPoint, ParetoReference, pareto
from tinybp_lightning.schedule.planner.planner import Plan, Planner, plan, smallest_budget
from tinybp_lightning.schedule.simulator import Moment, Timeline, simulate
from tinybp_lightning.schedule.verify import verify_schedule

__all__ = [
    "Action",
    "Backward",
    "Certificate",
    "Drop",
    "Forward",
    "ForwardSave",
    "Moment",
    "Offload",
    "OffloadPlan",
    "Pareto",
    "ParetoPoint",
    "ParetoReference",
    "Plan",
    "Planner",
    "Reload",
    "Schedule",
    "Store",
    "Timeline",
    "certify",
    "every_k",
    "every_sqrt_n",
    "from_text",
    "keep_all",
    "keep_some",
    "pareto",
    "per_block",
    "plan",
    "plan_offload",
    "revolve",
    "revolve_cost",
    "saved_knapsack",
    "selective",
    "simulate",
    "smallest_budget",
    "to_text",
    "verify_schedule",
]
