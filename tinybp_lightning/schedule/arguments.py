"""Check the arguments of public functions; the errors say what to pass instead."""

from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import cast

from tinybp_lightning.errors import BudgetError, ConfigError
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.ir import Graph
from tinybp_lightning.schedule.actions import Schedule

__all__ = ["check_budget", "check_budgets", "check_chain", "check_count", "check_link", "check_path", "check_schedule"]


def check_chain(value: object) -> None:
    """Raise `ConfigError` if `value` is not a `Chain`."""
    if isinstance(value, Chain):
        return
    kind = type(value).__name__
    if isinstance(value, Graph):
        raise ConfigError(
            f"`{kind}` `{value.name}` is not a `Chain`: a plan needs what each block costs. Pass "
            "`tinybp_lightning.analysis.estimate_chain(graph)`, or after a training step the measured `plan.chain` of "
            "one of `tbp.explain(module).plans`."
        )
    raise ConfigError(
        f"`{kind}` is not a `Chain` (got `{_shown(value)}`): a plan needs what each block costs. For a module, "
        "`tbp.pareto(tbp.capture_graph(module, *inputs))` estimates, and after a training step "
        "`tbp.explain(module).pareto()` knows; its chain is `plan.chain` of one of `tbp.explain(module).plans`."
    )


def check_schedule(value: object) -> None:
    """Raise `ConfigError` if `value` is not a `Schedule`."""
    if not isinstance(value, Schedule):
        raise ConfigError(
            f"`{type(value).__name__}` is not a `Schedule` (got `{_shown(value)}`): pass `tbp.plan(...).schedule`, or "
            "`from_text(...)` of `tinybp_lightning.schedule` for its notation."
        )


def check_budget(value: object, *, name: str = "budget_bytes", may_be_negative: bool = False) -> None:
    """Raise `BudgetError` if `value` is not a number of bytes; what is left of a budget may be negative."""
    shown = f"`{name}={_shown(value)}`"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise BudgetError(
            f"{shown} has type {type(value).__name__}: expected an int, in bytes, such as `20 * 2**30` for 20 GiB."
        )
    if value < 0 and not may_be_negative:
        raise BudgetError(f"{shown} is negative: expected a number of bytes of 0 or more.")


def check_budgets(value: object) -> None:
    """Raise `BudgetError` if `value` is not a sequence of at least one budget."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise BudgetError(
            f"`budgets_bytes={_shown(value)}` has type {type(value).__name__}: expected a list of ints, in bytes."
        )
    budgets = cast("Sequence[object]", value)
    if not budgets:
        raise BudgetError(f"`budgets_bytes={_shown(budgets)}` is empty: expected at least one budget, in bytes.")
    for budget in budgets:
        check_budget(budget, name="budgets_bytes[...]")


def check_count(name: str, value: object, *, at_least: int, meaning: str) -> None:
    """Raise `ConfigError` if `value` is not an int of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ConfigError(f"`{name}={_shown(value)}` must be an int of at least {at_least}: {meaning}.")


def check_link(value: object) -> None:
    """Raise `ConfigError` if `value` is not a bandwidth."""
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ConfigError(
            f"`link_bytes_per_s={_shown(value)}`: expected a bandwidth above 0, in bytes a second, as it was measured."
        )


def check_path(value: object) -> None:
    """Raise `ConfigError` if `value` does not name a file."""
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise ConfigError(
            f"`path={_shown(value)}` has type {type(value).__name__}: expected the picture's path, a str or Path."
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
