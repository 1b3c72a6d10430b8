"""Plan and bound against budget: falling, the bound below the plan, the same twice, and drawn."""

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tinybp_lightning as tbp
from tests.unit.graph.graphs_by_hand import chain_graph
from tests.unit.schedule.chains_by_hand import transformer_chain, uniform_chain
from tinybp_lightning.analysis import estimate_chain
from tinybp_lightning.errors import BudgetTooSmallError, ConfigError, MissingPackageError
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import Pareto, certify, keep_all, pareto, per_block, plan, simulate, smallest_budget

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def chain() -> Chain:
    return transformer_chain(2)


@pytest.fixture(scope="module")
def curve(chain: Chain) -> Pareto:
    return pareto(chain, num_points=9)


def test_times_and_bounds_fall_and_the_bound_is_below(curve: Pareto) -> None:
    budgets = [p.budget_bytes for p in curve.points]
    times, bounds = [p.total_s for p in curve.points], [p.lower_bound_s for p in curve.points]
    assert len(budgets) == 9
    assert budgets == sorted(set(budgets))
    assert times == sorted(times, reverse=True)
    assert bounds == sorted(bounds, reverse=True)
    assert all(0 < p.lower_bound_s <= p.total_s and p.peak_bytes <= p.budget_bytes for p in curve.points)
    assert times[0] > times[-1] == curve.plain_s == bounds[-1]


def test_ends_are_the_smallest_budget_and_plain_training(chain: Chain, curve: Pareto) -> None:
    smallest_bytes, slowest = smallest_budget(chain)
    assert (curve.points[0].budget_bytes, curve.points[0].total_s) == (smallest_bytes, slowest.total_s)
    assert curve.smallest_bytes == smallest_bytes
    assert curve.points[-1].budget_bytes == curve.plain_peak_bytes == simulate(chain, keep_all(chain)).peak_bytes
    assert curve.points[-1].recompute_s == 0


def test_each_point_is_the_plan_for_its_budget(chain: Chain, curve: Pareto) -> None:
    point = curve.points[4]
    found = plan(chain, budget_bytes=point.budget_bytes)
    assert (point.peak_bytes, point.total_s, point.recompute_s) == (
        found.peak_bytes,
        found.total_s,
        found.recompute_s,
    )
    certificate = certify(chain, found)
    assert certificate.lower_bound_s <= point.lower_bound_s
    assert point.gap <= certificate.gap


def test_references_are_the_known_methods(chain: Chain, curve: Pareto) -> None:
    assert [r.name for r in curve.references] == ["keep all", "per block", "every sqrt(n)"]
    checkpointed = simulate(chain, per_block(chain))
    assert (curve.references[1].peak_bytes, curve.references[1].total_s, curve.references[1].recompute_s) == (
        checkpointed.peak_bytes,
        checkpointed.total_s,
        checkpointed.recompute_s,
    )


def test_a_bound_at_a_larger_budget_holds_at_a_smaller_one() -> None:
    chain = transformer_chain(2)
    smallest_bytes, _ = smallest_budget(chain)
    budgets = [smallest_bytes + k * smallest_bytes // 40 for k in range(4)]
    bounds = [p.lower_bound_s for p in pareto(chain, budgets_bytes=budgets).points]
    assert bounds == sorted(bounds, reverse=True)
    alone = [certify(chain, plan(chain, budget_bytes=b)).lower_bound_s for b in budgets]
    assert bounds == [max(alone[k:]) for k in range(4)]


def test_json_holds_everything(curve: Pareto) -> None:
    record = json.loads(curve.to_json())
    assert [p["budget_bytes"] for p in record["points"]] == [p.budget_bytes for p in curve.points]
    assert [p["gap"] for p in record["points"]] == [p.gap for p in curve.points]
    assert {r["name"]: r["peak_bytes"] for r in record["references"]} == {
        r.name: r.peak_bytes for r in curve.references
    }
    assert record["smallest_bytes"] == curve.smallest_bytes
    assert (record["plain_peak_bytes"], record["plain_s"]) == (curve.plain_peak_bytes, curve.plain_s)


def test_equal_arguments_give_equal_curves(chain: Chain, curve: Pareto) -> None:
    assert pareto(chain, num_points=9) == curve


def test_picture_is_a_png(curve: Pareto, tmp_path: Path) -> None:
    path = curve.plot(tmp_path / "folder" / "pareto.png")
    assert path.read_bytes().startswith(_PNG_SIGNATURE)


def test_picture_without_matplotlib_names_the_extra(
    curve: Pareto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"tinybp-lightning\[recipes\]"):
        curve.plot(tmp_path / "pareto.png")


def test_front_door_gives_the_same_function() -> None:
    assert tbp.pareto is pareto
    assert tbp.Pareto is Pareto


def test_a_graph_is_estimated_and_says_so(tmp_path: Path) -> None:
    graph = chain_graph(12)
    found = pareto(graph, num_points=3)
    assert found.is_estimated
    assert replace(found, is_estimated=False) == pareto(estimate_chain(graph), num_points=3)
    assert json.loads(found.to_json())["is_estimated"] is True
    assert found.points[0].total_s > found.plain_s
    assert found.plot(tmp_path / "pareto.png").read_bytes().startswith(_PNG_SIGNATURE)


def test_other_functions_name_the_way_from_a_graph_to_a_chain() -> None:
    with pytest.raises(ConfigError, match=r"`Graph` `chain` is not a `Chain`.*estimate_chain\(graph\)"):
        smallest_budget(chain_graph(3))  # pyright: ignore[reportArgumentType]


def test_refuses_one_point_and_a_budget_that_nothing_meets() -> None:
    with pytest.raises(ConfigError, match="`num_points=1`"):
        pareto(uniform_chain(3), num_points=1)
    with pytest.raises(BudgetTooSmallError, match="`budget_bytes=1`"):
        pareto(uniform_chain(3), budgets_bytes=[1, 100])
