"""Which configuration do the strategy's arguments and the environment make?"""

from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest

from tinybp_lightning.config import HCBConfig
from tinybp_lightning.errors import BudgetError, ConfigError
from tinybp_lightning.integrations._shared.settings import check_option_names, strategy_config


def config(environ: Mapping[str, str] | None = None, **options: object) -> HCBConfig:
    return strategy_config({"config": None, **asdict(HCBConfig()), **options}, environ=environ or {})


def test_without_budgets_the_config_is_the_default() -> None:
    assert config() == HCBConfig()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"memory_budget": "2GiB"}, HCBConfig(memory_budget="2GiB", activation_budget=None)),
        ({"activation_budget": "30%"}, HCBConfig(memory_budget=None, activation_budget="30%")),
        ({"activation_budget": 4096, "executor": "eager"}, HCBConfig(None, 4096, executor="eager")),
        ({"config": HCBConfig(None, "30%")}, HCBConfig(None, "30%")),
        ({"memory_budget": "2GiB", "on_oom": "raise"}, HCBConfig("2GiB", on_oom="raise")),
        ({"memory_budget": "2GiB", "check": True}, HCBConfig("2GiB", check=True)),
    ],
    ids=str,
)
def test_arguments_make_the_config_and_the_environment_is_not_read(
    options: Mapping[str, object], expected: HCBConfig
) -> None:
    assert config({"HCB_MEMORY_BUDGET": "nonsense"}, **options) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HCB_MEMORY_BUDGET": "2GiB"}, HCBConfig("2GiB", None)),
        ({"HCB_MEMORY_BUDGET": " 80% "}, HCBConfig("80%", None)),
        ({"HCB_MEMORY_BUDGET": "1048576"}, HCBConfig(1048576, None)),
        ({"HCB_ACTIVATION_BUDGET": "30%"}, HCBConfig(None, "30%")),
        ({"HCB_MEMORY_BUDGET": "", "HCB_ACTIVATION_BUDGET": "30%"}, HCBConfig(None, "30%")),
        ({"HCB_MEMORY_BUDGET": " "}, HCBConfig()),
    ],
    ids=str,
)
@pytest.mark.parametrize("check", [True, False])
def test_the_environment_fills_in_a_missing_budget(
    environ: Mapping[str, str], expected: HCBConfig, check: bool
) -> None:
    assert config(environ, check=check, plan_cache=False) == replace(expected, check=check, plan_cache=False)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"HCB_MEMORY_BUDGET": "2 parsecs"}, "HCB_MEMORY_BUDGET=2 parsecs"),
        ({"HCB_ACTIVATION_BUDGET": "-1GiB"}, "HCB_ACTIVATION_BUDGET=-1GiB"),
        (
            {"HCB_MEMORY_BUDGET": "1GiB", "HCB_ACTIVATION_BUDGET": "30%"},
            "HCB_MEMORY_BUDGET=1GiB HCB_ACTIVATION_BUDGET=30%",
        ),
    ],
    ids=str,
)
def test_a_bad_budget_from_the_environment_names_its_variable(environ: Mapping[str, str], named: str) -> None:
    with pytest.raises(BudgetError, match=f"in the environment, `{named}`"):
        config(environ)


def test_another_bad_option_is_not_put_down_to_the_environment() -> None:
    with pytest.raises(ConfigError, match=r"^`executor='fast'` is unknown"):
        config({"HCB_MEMORY_BUDGET": "1GiB"}, executor="fast")


def both(first: int, *, second: int = 0, **anything: int) -> None: ...


def test_names_of_any_listed_callable_pass() -> None:
    check_option_names(["first", "second"], accepted_by=(both,))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("memroy_budget", "Did you mean `memory_budget`?"),
        ("plan_cash", "Did you mean `plan_cache`?"),
        ("observer", "Did you mean `observers`?"),
        ("secnod", "Did you mean `second`?"),
        ("anything", "See `HCBConfig`"),
    ],
)
def test_other_names_are_refused_with_advice(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is not an option") as caught:
        check_option_names(["first", name], accepted_by=(both,))
    assert hint in str(caught.value)
