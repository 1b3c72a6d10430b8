"""An explanation gives plan and bound against budget for each plan it explains."""

from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.graph import Chain
from tinybp_lightning.runtime.profile import PlanReport
from tinybp_lightning.runtime.torch.explanation import Explanation
from tinybp_lightning.schedule import keep_all, pareto


def _report(chain: Chain) -> PlanReport:
    return PlanReport("net", chain, keep_all(chain), 100, 90, 90, 0.0, 8.0, len(chain.blocks), "budget")


def test_one_curve_for_each_plan_in_order() -> None:
    chains = uniform_chain(4), uniform_chain(3)
    found = Explanation(graphs=(), plans=tuple(map(_report, chains))).pareto(num_points=3)
    assert found == tuple(pareto(chain, num_points=3) for chain in chains)
    assert found[0] != found[1]
