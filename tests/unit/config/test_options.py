"""Do `HCBConfig`, `hcb` and the Lightning strategies take the same options?"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_args

import pytest
from torch import nn

import tinybp_lightning as tbp
from tinybp_lightning.config import Costs, CostsChoice, ExecutorChoice, HCBConfig, config_from
from tinybp_lightning.errors import ConfigError
from tinybp_lightning.runtime.torch.executors import EXECUTORS

OPTIONS = inspect.signature(HCBConfig).parameters
NOT_DEFAULT: dict[str, Any] = {
    "memory_budget": "1GiB",
    "activation_budget": "30%",
    "executor": "eager",
    "optimizer_state_bytes": 0,
    "on_oom": "raise",
    "plan_cache": False,
    "check": True,
    "costs": "operations",
}


def hcb(**options: Any) -> HCBConfig:
    """The configuration under which `tbp.hcb` puts a module."""
    configs: list[HCBConfig] = []
    api = importlib.import_module("tinybp_lightning.runtime.torch.api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "attach", lambda module, *, config, observers: configs.append(config))
        tbp.hcb(nn.Linear(1, 1), **options)
    return configs[0]


def strategy(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"tinybp_lightning.integrations.{module}"), name)


STRATEGIES = [
    strategy(module, name)
    for module in ("lightning_unified", "lightning_classic")
    for name in ("HCBStrategy", "HCBSingleDeviceStrategy", "HCBDDPStrategy")
]
SIGNATURES = [tbp.hcb, tbp.HCBStrategy, *STRATEGIES]
MAKERS = [HCBConfig, hcb, lambda **options: STRATEGIES[0](**options).hcb_config]


def test_the_options_are_the_fields_of_the_config() -> None:
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(HCBConfig)] == list(NOT_DEFAULT)


@pytest.mark.parametrize("callable_", SIGNATURES, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_the_signatures_have_equal_names_types_and_defaults(callable_: Callable[..., Any]) -> None:
    shown = inspect.signature(callable_).parameters
    besides = {"module", "observers", "config"}
    options = {n: p for n, p in shown.items() if n not in besides and p.kind is not p.VAR_KEYWORD}
    assert [(n, p.annotation, p.default) for n, p in options.items()] == [
        (n, p.annotation, p.default) for n, p in OPTIONS.items()
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in options.values())
    assert shown["config"].annotation == HCBConfig | None


@pytest.mark.parametrize("make", MAKERS, ids=["HCBConfig", "hcb", "HCBStrategy"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_config(make: Callable[..., HCBConfig], name: str) -> None:
    config = make(**{name: NOT_DEFAULT[name]})
    assert config == dataclasses.replace(HCBConfig(), **{name: NOT_DEFAULT[name]}) != HCBConfig()


@pytest.mark.parametrize("make", MAKERS, ids=["HCBConfig", "hcb", "HCBStrategy"])
def test_a_misspelt_option_is_answered_with_the_nearest(make: Callable[..., HCBConfig]) -> None:
    with pytest.raises(ConfigError, match=r"`memroy_budget` is not an option\. Did you mean `memory_budget`\?"):
        make(memroy_budget="1GiB")
    with pytest.raises(ConfigError, match=r"`colour` is not an option\. See `HCBConfig`"):
        make(colour="red")


@pytest.mark.parametrize("make", MAKERS[1:], ids=["hcb", "HCBStrategy"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_beside_a_config_is_refused(make: Callable[..., HCBConfig], name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}=.*` was given together with `config`"):
        make(config=HCBConfig(), **{name: NOT_DEFAULT[name]})


@pytest.mark.parametrize("make", MAKERS[1:], ids=["hcb", "HCBStrategy"])
def test_a_config_beside_options_at_their_defaults_is_taken(make: Callable[..., HCBConfig]) -> None:
    """A command line passes every default explicitly."""
    config = HCBConfig(**(NOT_DEFAULT | {"memory_budget": None}))
    assert make(config=config, **dataclasses.asdict(HCBConfig())) is config


def test_a_value_that_equals_a_default_but_has_another_type_counts_as_given() -> None:
    arguments = {"config": HCBConfig(), **dataclasses.asdict(HCBConfig())}
    with pytest.raises(ConfigError, match="`check=0` was given together with `config`"):
        config_from({**arguments, "check": 0})


def test_the_names_are_the_values_of_the_enum_and_of_the_executors() -> None:
    assert get_args(CostsChoice) == tuple(kind.value for kind in Costs)
    assert set(get_args(ExecutorChoice)) == set(EXECUTORS)
