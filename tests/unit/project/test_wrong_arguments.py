"""Does every public function name an argument of a wrong type? Never an `AttributeError` from somewhere below.

Each argument of each name in `__all__` is given values of many kinds; those that it takes are listed beside it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.graph.graphs_by_hand import chain_graph
from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.analysis import estimate_chain
from tinybp_lightning.errors import ConfigError, TinyBPError, UnsupportedModuleError
from tinybp_lightning.schedule import Planner, keep_all, plan_offload, smallest_budget, verify_schedule

CHAIN = uniform_chain(3)
GRAPH = chain_graph(3)
SCHEDULE = keep_all(CHAIN)
BATCH = torch.ones(1, 2)
WRONG: dict[str, Any] = {
    "None": None,
    "text": "x",
    "empty text": "",
    "float": 1.5,
    "nan": math.nan,
    "negative": -1,
    "bool": True,
    "object": object(),
    "empty list": [],
    "list": ["x"],
    "class": nn.Linear,
    "graph": GRAPH,
    "tensor": torch.ones(2),
}


@dataclass(frozen=True)
class Argument:
    """`call(value)` passes a value as the argument `of`; `takes` names those of `WRONG` that are right for it."""

    of: str
    call: Callable[[Any], object]
    takes: tuple[str, ...] = ()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def trained() -> nn.Module:
    return tbp.hcb(net(), activation_budget="1MiB")


def pareto() -> tbp.Pareto:
    return tbp.pareto(CHAIN, num_points=2)


def explanation() -> tbp.Explanation:
    return tbp.Explanation((), ())


def options(of: str, call: Callable[..., object], *, also: tuple[str, ...] = ()) -> list[Argument]:
    """The options that `hcb` and the strategy share."""
    return [
        Argument(of, lambda v: call(memory_budget=v), ("None",)),
        Argument(of, lambda v: call(activation_budget=v), ("None",)),
        Argument(of, lambda v: call(executor=v)),
        Argument(of, lambda v: call(on_oom=v)),
        Argument(of, lambda v: call(check=v), ("bool",)),
        Argument(of, lambda v: call(observers=v), ("empty list", *also)),
        Argument(of, lambda v: call(observers=[v])),
        Argument(of, lambda v: call(config=v), ("None",)),
    ]


ARGUMENTS = [
    Argument("plan", lambda v: tbp.plan(v, budget_bytes=100)),
    Argument("plan", lambda v: tbp.plan(CHAIN, budget_bytes=v)),
    Argument("simulate", lambda v: tbp.simulate(v, SCHEDULE)),
    Argument("simulate", lambda v: tbp.simulate(CHAIN, v)),
    Argument("simulate", lambda v: tbp.simulate(CHAIN, SCHEDULE, link_bytes_per_s=v), ("None", "float")),
    Argument("pareto", tbp.pareto, ("graph",)),
    Argument("pareto", lambda v: tbp.pareto(CHAIN, num_points=v)),
    Argument("pareto", lambda v: tbp.pareto(CHAIN, budgets_bytes=v), ("None",)),
    Argument("pareto", lambda v: tbp.pareto(CHAIN, budgets_bytes=[v])),
    Argument("Pareto", lambda v: pareto().plot(v), ("text",)),
    Argument("Explanation", lambda v: explanation().plot(v), ("text",)),
    Argument("explain", tbp.explain),
    Argument("capture_graph", lambda v: tbp.capture_graph(v, BATCH)),
    Argument("hcb", tbp.hcb),
    *options("hcb", lambda **given: tbp.hcb(net(), **given)),
    Argument("attach", tbp.attach),
    Argument("attach", lambda v: tbp.attach(net(), config=v), ("None",)),
    Argument("attach", lambda v: tbp.attach(net(), observers=v), ("empty list",)),
    Argument("attach", lambda v: tbp.attach(net(), discover=v), ("bool",)),
    Argument("restore", tbp.restore),
    Argument("keep", tbp.keep),
    Argument("register_ambient", lambda v: tbp.register_ambient(v, tuple, print)(), ("text",)),
    Argument("register_ambient", lambda v: tbp.register_ambient("x", v, print)()),
    Argument("register_ambient", lambda v: tbp.register_ambient("x", tuple, v)(), ("class",)),
    Argument("run_step", lambda v: tbp.run_step(v, lambda x: x.sum(), BATCH)),
    Argument("run_step", lambda v: tbp.run_step(trained(), v, BATCH)),
    Argument("run_step", lambda v: tbp.run_step(model := trained(), lambda x: model(x).sum(), BATCH, backward=v)),
    Argument("run_step", lambda v: tbp.run_step(trained(), lambda _: v, BATCH)),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(memory_budget=v), ("None",)),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(activation_budget=v), ("None",)),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(executor=v)),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(optimizer_state_bytes=v), ("None",)),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(on_oom=v)),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(plan_cache=v), ("text", "bool")),
    Argument("HCBConfig", lambda v: tbp.HCBConfig(check=v), ("bool",)),
    *options("HCBStrategy", tbp.HCBStrategy),
    # Not in `__all__`, and beside what is.
    Argument("smallest_budget", smallest_budget),
    Argument("Planner", Planner),
    Argument("estimate_chain", estimate_chain, ("graph",)),
    Argument("estimate_chain", lambda v: estimate_chain(GRAPH, flops_per_s=v), ("float",)),
    Argument("estimate_chain", lambda v: estimate_chain(GRAPH, bytes_per_s=v), ("float",)),
    Argument("estimate_chain", lambda v: estimate_chain(GRAPH, granularity=v)),
    Argument("plan_offload", lambda v: plan_offload(v, budget_bytes=100, link_bytes_per_s=1.0)),
    Argument("plan_offload", lambda v: plan_offload(Planner(CHAIN), budget_bytes=v, link_bytes_per_s=1.0)),
    Argument("plan_offload", lambda v: plan_offload(Planner(CHAIN), budget_bytes=100, link_bytes_per_s=v), ("float",)),
    Argument("verify_schedule", lambda v: verify_schedule(v, SCHEDULE)),
    Argument("verify_schedule", lambda v: verify_schedule(CHAIN, v)),
]


def complaint(argument: Argument, value: Any) -> str | None:
    """Return what is wrong with the answer to a wrong value; `None` where its error names it and says what to do."""
    try:
        argument.call(value)
    except (ConfigError, UnsupportedModuleError) as error:
        message = str(error)
    except Exception as error:  # noqa: BLE001 - any other error is what this test looks for
        return f"raised {type(error).__name__}: {error}"
    else:
        return "was taken"
    inside = value[0] if value == ["x"] else value
    if not any(repr(v)[:70] in message or f"`{type(v).__name__}`" in message for v in (value, inside)):
        return f"does not say what was passed: {message}"
    return None if ":" in message else f"does not say what to do: {message}"


@pytest.mark.parametrize("name", sorted({argument.of for argument in ARGUMENTS}))
def test_a_wrong_argument_is_named(name: str) -> None:
    """All values for all arguments of one function, so that one failure lists what it takes wrongly."""
    arguments = [argument for argument in ARGUMENTS if argument.of == name]
    found = {
        f"argument {k}, {kind}": wrong
        for k, argument in enumerate(arguments)
        for kind, value in WRONG.items()
        if kind not in argument.takes and (wrong := complaint(argument, value)) is not None
    }
    assert found == {}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda v: v, "was taken"),
        (lambda v: v.missing, "raised AttributeError"),
        (lambda _: _raise(ConfigError("wrong: say another")), "does not say what was passed"),
        (lambda v: _raise(ConfigError(f"`{type(v).__name__}`")), "does not say what to do"),
    ],
)
def test_a_wrong_answer_is_told(call: Callable[[Any], object], expected: str) -> None:
    found = complaint(Argument("f", call), "x")
    assert found is not None
    assert expected in found


def _raise(error: Exception) -> None:
    raise error


def test_every_public_name_is_asked() -> None:
    """Errors and warnings are raised, not called."""
    public = {
        name
        for name in tbp.__all__
        if not (inspect.isclass(found := getattr(tbp, name)) and issubclass(found, TinyBPError | Warning))
    }
    assert public <= {argument.of for argument in ARGUMENTS}
