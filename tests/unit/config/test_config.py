"""Which budgets and options are understood, and what is said about the others."""

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from tinybp_lightning.config import Budget, BudgetKind, HCBConfig, parse_budget
from tinybp_lightning.errors import BudgetError, ConfigError

MEMORY, ACTIVATION = BudgetKind.MEMORY, BudgetKind.ACTIVATION


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (1, 1),
        (123456789, 123456789),
        ("7B", 7),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("512 MB", 512 * 10**6),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (" 20GiB ", 20 * 2**30),
        ("3e2 MB", 300 * 10**6),
        (".5TB", 5 * 10**11),
        ("1TiB", 2**40),
        ("1.9B", 1),
    ],
)
@pytest.mark.parametrize("kind", BudgetKind)
def test_sizes(value: int | str, size_bytes: int, kind: BudgetKind) -> None:
    assert parse_budget(value, kind) == Budget(kind, size_bytes, None, str(value))


@pytest.mark.parametrize(("value", "fraction"), [("30%", 0.3), ("100%", 1.0), ("0.5 %", 0.005)])
@pytest.mark.parametrize("kind", BudgetKind)
def test_shares(value: str, fraction: float, kind: BudgetKind) -> None:
    assert parse_budget(value, kind) == Budget(kind, None, fraction, value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0, "not a positive number of bytes"),
        (-1, "not a positive number of bytes"),
        (True, "type bool"),
        (1.5, "type float"),
        (float("nan"), "type float"),
        (b"1GiB", "type bytes"),
        ([1], "type list"),
        ("", "cannot be read"),
        ("GiB", "cannot be read"),
        ("1,5GiB", "cannot be read"),
        ("1GiB2", "cannot be read"),
        ("one", "cannot be read"),
        ("1" * 400 + "GiB", "not a positive, finite"),
        ("nan", "not a positive, finite"),
        ("NaN GiB", "not a positive, finite"),
        ("inf", "not a positive, finite"),
        ("-2GiB", "not a positive, finite"),
        ("0%", "not a positive, finite"),
        ("-30%", "not a positive, finite"),
        ("101%", "more than 100%"),
        ("20", "unit ''"),
        ("20GB/s", "cannot be read"),
        ("20gib", "unit 'gib'"),
        ("20G", "unit 'G'"),
        ("0.4B", "less than one byte"),
    ],
)
@pytest.mark.parametrize("kind", BudgetKind)
def test_a_budget_that_cannot_be_read_is_named(value: Any, reason: str, kind: BudgetKind) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(value, kind)
    assert f"`{kind.value}={value!r}`" in str(caught.value)
    assert reason in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_auto_is_for_memory_alone() -> None:
    assert parse_budget("auto", MEMORY) == Budget(MEMORY, None, None, "auto")
    with pytest.raises(BudgetError, match="is for `memory_budget`"):
        parse_budget("auto", ACTIVATION)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, MEMORY, "auto"),
        ({"memory_budget": "20GiB"}, MEMORY, "20GiB"),
        ({"activation_budget": "30%"}, ACTIVATION, "30%"),
    ],
)
def test_the_budget_in_force(options: dict[str, Any], kind: BudgetKind, text: str) -> None:
    budget = HCBConfig(**options).budget
    assert (budget.kind, budget.text) == (kind, text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory_budget": "1GiB", "activation_budget": "30%"}, BudgetError, "were both"),
        ({"memory_budget": 1, "activation_budget": 1}, BudgetError, "were both"),
        ({"activation_budget": "30"}, BudgetError, "`activation_budget='30'`"),
        ({"executor": "fast"}, ConfigError, "`executor='fast'`"),
        ({"executor": None}, ConfigError, "`executor=None`"),
        ({"on_oom": "retry"}, ConfigError, "`on_oom='retry'` is unknown: expected one of ['replan', 'raise']"),
        ({"on_oom": None}, ConfigError, "`on_oom=None`"),
        ({"on_oom": True}, ConfigError, "`on_oom=True`"),
        ({"costs": "flops"}, ConfigError, "`costs='flops'` is unknown: expected one of ['seconds', 'operations']"),
        ({"costs": "operations", "executor": "inductor"}, ConfigError, "cannot be counted. Use `executor='eager'`"),
        ({"check": "1"}, ConfigError, "`check='1'` has type str: expected `True`"),
        ({"check": 1}, ConfigError, "`check=1` has type int"),
        ({"check": None}, ConfigError, "`check=None` has type NoneType"),
        ({"optimizer_state_bytes": -1}, ConfigError, "`optimizer_state_bytes=-1`"),
        ({"optimizer_state_bytes": True}, ConfigError, "`optimizer_state_bytes=True`"),
        ({"optimizer_state_bytes": 1.5}, ConfigError, "`optimizer_state_bytes=1.5`"),
        ({"optimizer_state_bytes": "1GiB"}, ConfigError, "`optimizer_state_bytes='1GiB'`"),
    ],
)
def test_a_wrong_option_is_named_when_the_config_is_made(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        HCBConfig(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("executor", ["auto", "eager", "inductor"])
def test_executors(executor: str) -> None:
    assert HCBConfig(executor=executor).executor == executor


@pytest.mark.parametrize("on_oom", ["replan", "raise"])
def test_answers_to_a_lack_of_memory(on_oom: str) -> None:
    assert HCBConfig(on_oom=on_oom).on_oom == on_oom
    assert HCBConfig().on_oom == "replan"


def test_a_config_is_a_value() -> None:
    config = HCBConfig(activation_budget="30%", optimizer_state_bytes=0)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(copy.deepcopy(config))
    with pytest.raises(FrozenInstanceError):
        config.memory_budget = "1GiB"  # type: ignore[misc]


@pytest.mark.parametrize("plan_cache", [True, False, "plans", "~/plans"])
def test_plan_caches(plan_cache: bool | str) -> None:
    assert HCBConfig(plan_cache=plan_cache).plan_cache == plan_cache


@pytest.mark.parametrize(
    ("plan_cache", "reason"),
    [
        (None, "has type NoneType"),
        (1, "has type int"),
        (b"plans", "has type bytes"),
        (["plans"], "has type list"),
        ("", "does not name a folder"),
        (" ", "does not name a folder"),
    ],
)
def test_a_plan_cache_of_another_kind_is_named(plan_cache: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"`plan_cache=.*{reason}"):
        HCBConfig(plan_cache=plan_cache)
