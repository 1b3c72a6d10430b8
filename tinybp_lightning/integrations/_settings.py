"""What did the user ask of the strategy: which `HCBConfig`, and which options go to `DistributedDataParallel`?

Arguments win over the environment. `HCB_MEMORY_BUDGET` and `HCB_ACTIVATION_BUDGET` are read only where no budget is
given in code, so that `Trainer(strategy="hcb")` in an unchanged script can be given one from outside. What a budget may
be is `HCBConfig`'s to say.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

from tinybp_lightning.config import HCBConfig, check_config
from tinybp_lightning.errors import BudgetError, ConfigError

__all__ = ["check_option_names", "config_from"]

_VARIABLES = {"memory_budget": "HCB_MEMORY_BUDGET", "activation_budget": "HCB_ACTIVATION_BUDGET"}


def config_from(
    config: HCBConfig | None,
    *,
    memory_budget: int | str | None,
    activation_budget: int | str | None,
    executor: Literal["auto", "eager", "inductor"],
    environ: Mapping[str, str],
    on_oom: Literal["replan", "raise"] = "replan",
    check: bool = False,
) -> HCBConfig:
    """Return the one `HCBConfig` that the arguments and, without a budget among them, the environment ask for.

    **Raises:** `ConfigError` for `config` beside other options, or of a wrong type; `BudgetError` from `HCBConfig`,
    naming the variable where the value came from the environment.
    """
    check_config(config)
    given = {"memory_budget": memory_budget, "activation_budget": activation_budget}
    if config is not None:
        chosen = {
            "executor": executor if executor != "auto" else None,
            "on_oom": on_oom if on_oom != "replan" else None,
            "check": check if check is not False else None,
        }
        return _config_alone(config, others={**given, **chosen})
    make = partial(HCBConfig, executor=executor, on_oom=on_oom, check=check)
    if any(value is not None for value in given.values()):
        return make(memory_budget, activation_budget)
    found = {name: text for name, variable in _VARIABLES.items() if (text := environ.get(variable, "").strip())}
    if not found:
        return make()
    try:
        memory, activation = (_budget_from_text(found.get(name)) for name in _VARIABLES)
        return make(memory, activation)
    except ConfigError as error:
        source = " ".join(f"{_VARIABLES[name]}={text}" for name, text in found.items())
        raise BudgetError(f"in the environment, `{source}`: {error}") from error


def check_option_names(names: Iterable[str], *, accepted_by: Iterable[Callable[..., Any]]) -> None:
    """Raise `ConfigError` for a name that none of the `accepted_by` callables has as a parameter of its own.

    `DDPStrategy` passes its `**kwargs` on without a look; a mistyped `memory_budget` would be lost among them.
    """
    known = {
        name
        for accept in accepted_by
        for name, parameter in inspect.signature(accept).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    ours = inspect.signature(config_from).parameters.keys() - {"environ"} | {"observers"}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known | ours), n=1)
            hint = f"Did you mean `{close[0]}`?" if close else "It is neither HCB's, nor the strategy's, nor DDP's."
            raise ConfigError(f"`{name}` is not an option of this strategy. {hint}")


def _config_alone(config: HCBConfig, *, others: Mapping[str, int | str | None]) -> HCBConfig:
    for name, value in others.items():
        if value is not None:
            raise ConfigError(
                f"`{name}={value!r}` was passed beside `config`. Pass one of them: `config` has a field `{name}`."
            )
    return config


def _budget_from_text(text: str | None) -> int | str | None:
    """Read a plain number as bytes; leave units, per cent and `auto` to `HCBConfig`."""
    return int(text) if text is not None and text.isdecimal() else text
