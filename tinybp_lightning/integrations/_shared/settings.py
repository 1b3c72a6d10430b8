"""Read the strategy's options: the `HCBConfig` they make, and the ones that go to `DistributedDataParallel`.

Arguments win over the environment. `HCB_MEMORY_BUDGET` and `HCB_ACTIVATION_BUDGET` are read only where the code gives
no budget, so that `Trainer(strategy="hcb")` in an unchanged script can be given one from outside.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tinybp_lightning.config import HCBConfig, config_from, refuse_unknown_options
from tinybp_lightning.errors import BudgetError

__all__ = ["check_option_names", "strategy_config"]

_VARIABLES = {"memory_budget": "HCB_MEMORY_BUDGET", "activation_budget": "HCB_ACTIVATION_BUDGET"}


def strategy_config(arguments: Mapping[str, Any], *, environ: Mapping[str, str]) -> HCBConfig:
    """Return the `HCBConfig` of a strategy's `arguments`, with a budget from `environ` where they have none.

    **Raises:** what `config_from` raises; a `BudgetError` for a value from the environment names its variable.
    """
    found = {name: text for name, variable in _VARIABLES.items() if (text := environ.get(variable, "").strip())}
    if not found or any(arguments[name] is not None for name in ("config", *_VARIABLES)):
        return config_from(arguments)
    # A plain number is bytes; `HCBConfig` reads units, shares and `auto`.
    budgets = {name: int(text) if text.isdecimal() else text for name, text in found.items()}
    try:
        return config_from({**arguments, **budgets})
    except BudgetError as error:
        source = " ".join(f"{_VARIABLES[name]}={text}" for name, text in found.items())
        raise BudgetError(f"in the environment, `{source}`: {error}") from error


def check_option_names(names: Iterable[str], *, accepted_by: Iterable[Callable[..., Any]]) -> None:
    """Raise `ConfigError` for a name that none of the `accepted_by` callables has as a parameter of its own.

    `DDPStrategy` passes its `**kwargs` on unread: it would hide a misspelt `memory_budget` until the first fit.
    """
    parameters = [p for accept in accepted_by for p in inspect.signature(accept).parameters.values()]
    own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    refuse_unknown_options(names, also_known=("config", "observers", *own))
