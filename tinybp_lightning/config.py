"""Declare the options that users set, check them when they are given, and parse budgets.

`HCBConfig` is the one declaration of the options. `hcb` and the Lightning strategies repeat its fields as keyword
arguments, so that editors and command lines see them; a test compares names, types and defaults.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields
from enum import Enum
from typing import Any, Literal, get_args

from tinybp_lightning.errors import BudgetError, ConfigError

__all__ = [
    "MAX_LIVE_GRAPHS",
    "Budget",
    "BudgetKind",
    "Costs",
    "CostsChoice",
    "ExecutorChoice",
    "HCBConfig",
    "OnOomChoice",
    "check_config",
    "config_from",
    "parse_budget",
    "refuse_unknown_options",
]

MAX_LIVE_GRAPHS = 16
"""How many graphs of one module (one for each shape of its inputs) hold plans and compiled pieces at a time."""

_UNITS = {"B": 1} | {f"{p}{b}": k**i for b, k in (("B", 1000), ("iB", 1024)) for i, p in enumerate("KMGT", start=1)}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf)\s*([A-Za-z%]*)\s*", re.IGNORECASE)
_FORMS = 'an int (bytes), a size such as "20GiB" or "512MB", a share such as "30%", or "auto"'


class BudgetKind(Enum):
    """What the budget bounds."""

    MEMORY = "memory_budget"
    ACTIVATION = "activation_budget"


class Costs(Enum):
    """What a plan minimises: seconds, measured on this machine, or floating-point operations, counted."""

    SECONDS = "seconds"
    OPERATIONS = "operations"


# What editors complete and type checkers check. `EXECUTORS` has an executor for each name.
ExecutorChoice = Literal["auto", "eager", "inductor"]
CostsChoice = Literal["seconds", "operations"]
OnOomChoice = Literal["replan", "raise"]


@dataclass(frozen=True, slots=True)
class Budget:
    """A parsed budget: it sets either `size_bytes` or `fraction`, or neither for `"auto"`.

    `MEMORY` bounds all device bytes of this process in a step; its fraction is of the device. `ACTIVATION` bounds what
    a step allocates besides the gradients of parameters; its fraction is of what plain training would need.
    """

    kind: BudgetKind
    size_bytes: int | None
    fraction: float | None
    text: str


@dataclass(frozen=True, slots=True)
class HCBConfig:
    """The options of height-compressed backpropagation.

    **Arguments:**

    - `memory_budget`: limit for *all* device bytes of this process in a training step (parameters, gradients,
      optimizer state and activations). `None` means `"auto"` unless `activation_budget` is given.
    - `activation_budget`: limit for what a step allocates besides the gradients of parameters. A share is of what plain
      training would need. Give one of the two budgets.
    - `executor`: `"eager"` runs the user's own kernels and gives the bits of plain training; `"inductor"` compiles each
      unique block; `"auto"` means `"eager"`.
    - `optimizer_state_bytes`: bytes that `memory_budget` sets aside for optimizer state before the first step. `None`
      assumes two copies of the trainable parameters until the real state exists.
    - `on_oom`: `"replan"` answers a `torch.OutOfMemoryError` on one device with a smaller plan and runs the same step
      again, in Lightning's automatic optimization and in `tbp.run_step`. `"raise"` raises the error.
    - `plan_cache`: the folder that keeps plans, so that the next process that trains the same program neither measures
      nor plans. `True`: the one that `$TINYBP_CACHE` names, or else the user's cache folder. `False`: none.
    - `check`: compare a hash of every tensor that a replay saves with the hash from the forward, and raise
      `ReplayError` where they differ. The environment variable `HCB_CHECK=1` switches this on as well.
    - `costs`: `"seconds"` minimises measured time. `"operations"` minimises floating-point operations: the plan is then
      the same in every run and on every machine that allocates alike, but a matrix product may count a thousand times
      as much as a norm that takes as long. The operations of compiled blocks cannot be counted.

    **Raises:** `BudgetError` for a budget that cannot be read; `ConfigError` for any other wrong or unknown option.
    """

    memory_budget: int | str | None = None
    activation_budget: int | str | None = None
    executor: ExecutorChoice = "auto"
    optimizer_state_bytes: int | None = None
    on_oom: OnOomChoice = "replan"
    plan_cache: bool | str = True
    check: bool = False
    costs: CostsChoice = "seconds"

    def __post_init__(self) -> None:
        _ = self.budget
        for name, names in (("executor", ExecutorChoice), ("on_oom", OnOomChoice), ("costs", CostsChoice)):
            value, choices = getattr(self, name), list(get_args(names))
            if value not in choices:
                raise ConfigError(f"`{name}={value!r}` is unknown: expected one of {choices}.")
        if self.costs == "operations" and self.executor == "inductor":
            raise ConfigError(
                "`costs='operations'` was given with `executor='inductor'`: the operations of compiled blocks cannot "
                "be counted. Use `executor='eager'`, or `costs='seconds'`."
            )
        size, folder, check = self.optimizer_state_bytes, self.plan_cache, self.check
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise ConfigError(f"`optimizer_state_bytes={size!r}` is not a size: expected an int of at least 0 (bytes).")
        _check_type("plan_cache", folder, (bool, str), "`True`, `False`, or the path of a folder as a str")
        _check_type("check", check, (bool,), "`True` (compare replayed tensors with the forward's) or `False`")
        if isinstance(folder, str) and not folder.strip():
            raise ConfigError(f"`plan_cache={folder!r}` does not name a folder: give its path, or `False`.")

    @property
    def budget(self) -> Budget:
        """The budget that applies: `activation_budget`, or else `memory_budget`."""
        if self.memory_budget is not None and self.activation_budget is not None:
            raise BudgetError(
                f"`memory_budget={self.memory_budget!r}` and `activation_budget={self.activation_budget!r}` were both "
                "given: expected one. Use `memory_budget` for all device bytes, `activation_budget` for activations."
            )
        if self.activation_budget is not None:
            return parse_budget(self.activation_budget, BudgetKind.ACTIVATION)
        return parse_budget("auto" if self.memory_budget is None else self.memory_budget, BudgetKind.MEMORY)


def _check_type(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise ConfigError(f"`{name}={value!r}` has type {type(value).__name__}: expected {expected}.")


_OPTIONS: tuple[Field[Any], ...] = fields(HCBConfig)


def refuse_unknown_options(names: Iterable[str], *, also_known: Iterable[str] = ()) -> None:
    """Raise `ConfigError` for a name that is neither a field of `HCBConfig` nor in `also_known`."""
    known = sorted({*also_known, *(option.name for option in _OPTIONS)})
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else "See `HCBConfig` for the options."
            raise ConfigError(f"`{name}` is not an option. {hint}")


_init = HCBConfig.__init__


@functools.wraps(_init)
def _init_or_name_misspelt(self: HCBConfig, *args: Any, **options: Any) -> None:
    """Answer an unknown option with the closest known one."""
    refuse_unknown_options(options)
    _init(self, *args, **options)


HCBConfig.__init__ = _init_or_name_misspelt


def check_config(value: object) -> None:
    """Raise `ConfigError` unless `value` is an `HCBConfig` or `None`."""
    if value is not None and not isinstance(value, HCBConfig):
        raise ConfigError(f"`config={value!r}` is not an HCBConfig: write `HCBConfig(memory_budget=...)`.")


def config_from(arguments: Mapping[str, Any]) -> HCBConfig:
    """Return the `HCBConfig` that a caller's `arguments` (its `locals()`) ask for: `config`, or the single options.

    An option that has its default value counts as not given: a command line passes every default explicitly.

    **Raises:** `ConfigError` for `config` together with a single option.
    """
    config: HCBConfig | None = arguments["config"]
    check_config(config)
    if config is None:
        return HCBConfig(**{option.name: arguments[option.name] for option in _OPTIONS})
    for option in _OPTIONS:
        name, value = option.name, arguments[option.name]
        if type(value) is not type(option.default) or value != option.default:
            raise ConfigError(
                f"`{name}={value!r}` was given together with `config`: pass one of them. `config` has a field `{name}`."
            )
    return config


def parse_budget(value: int | str, kind: BudgetKind) -> Budget:
    """Return the `Budget` that a user's `value` stands for, or raise `BudgetError`."""
    shown = f"`{kind.value}={value!r}`"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise BudgetError(f"{shown} has type {type(value).__name__}: expected {_FORMS}.")
    if value == "auto":
        if kind is BudgetKind.ACTIVATION:
            raise BudgetError(f'{shown}: "auto" is for `memory_budget`. Give a size or a share, such as "30%".')
        return Budget(kind, None, None, "auto")
    if isinstance(value, int):
        if value <= 0:
            raise BudgetError(f"{shown} is not a positive number of bytes: expected {_FORMS}.")
        return Budget(kind, value, None, str(value))
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise BudgetError(f"{shown} cannot be read: expected {_FORMS}.")
    number, unit = float(match[1]), match[2]
    if not math.isfinite(number) or number <= 0:
        raise BudgetError(f"{shown} is not a positive, finite number: expected {_FORMS}.")
    if unit == "%":
        if number > 100:
            raise BudgetError(f"{shown} is more than 100%: expected a share in (0%, 100%].")
        return Budget(kind, None, number / 100, value)
    if unit not in _UNITS:
        raise BudgetError(f'{shown} has unit {unit!r}: expected one of {", ".join([*_UNITS, "%"])}. Write "20GiB".')
    if number * _UNITS[unit] < 1:
        raise BudgetError(f"{shown} is less than one byte: expected {_FORMS}.")
    return Budget(kind, int(number * _UNITS[unit]), None, value)
