"""What may a user ask for? `HCBConfig`, checked when it is made, and the `Budget` it stands for.

Budgets come in bytes (`int`), with a unit (`"20GiB"`, `"512 MB"`), as a share (`"80%"`), or as `"auto"`.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum

from tinybp_lightning.errors import BudgetError, ConfigError

__all__ = [
    "MAX_LIVE_GRAPHS",
    "Budget",
    "BudgetKind",
    "Costs",
    "ExecutorName",
    "HCBConfig",
    "OnOom",
    "check_config",
    "parse_budget",
]

MAX_LIVE_GRAPHS = 16
"""How many graphs of one module (one for each shape of its inputs) hold plans and pieces at a time."""

_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", start=1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", start=1)},
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf)\s*([A-Za-z%]*)\s*", re.IGNORECASE)
_FORMS = 'an int (bytes), a size such as "20GiB" or "512MB", a share such as "30%", or "auto"'


class BudgetKind(Enum):
    """What the budget bounds."""

    MEMORY = "memory_budget"
    ACTIVATION = "activation_budget"


class ExecutorName(Enum):
    """Who runs a block: the user's own kernels (`eager`, bit-identical), or Inductor's per block."""

    AUTO = "auto"
    EAGER = "eager"
    INDUCTOR = "inductor"


class Costs(Enum):
    """What a plan is to take least of: seconds, measured where it is made, or floating-point operations, counted."""

    SECONDS = "seconds"
    OPERATIONS = "operations"


class OnOom(Enum):
    """What an `OutOfMemoryError` in a step that we own is answered with: a tighter plan, or nothing."""

    REPLAN = "replan"
    RAISE = "raise"


@dataclass(frozen=True, slots=True)
class Budget:
    """A parsed budget: exactly one of `size_bytes` and `fraction` is set, or neither for `"auto"`.

    `MEMORY` bounds all device bytes of this process in a step; its fraction is of the device. `ACTIVATION` bounds what
    a step allocates beside parameters' gradients; its fraction is of what plain training would need.
    """

    kind: BudgetKind
    size_bytes: int | None
    fraction: float | None
    text: str


@dataclass(frozen=True, slots=True)
class HCBConfig:
    """How a module is trained under height-compressed backpropagation.

    **Arguments:**

    - `memory_budget`: bound on *all* device bytes of this process in a training step (parameters, gradients,
      optimizer state and activations). `None` means `"auto"` unless `activation_budget` is given.
    - `activation_budget`: bound on activations alone: bytes a step allocates, parameters' gradients left out; a share
      is of what plain training would need. Give one of the two.
    - `executor`: `"eager"` runs the user's own kernels, bit for bit as plain training; `"inductor"` compiles each
      unique block; `"auto"` is eager.
    - `optimizer_state_bytes`: what to set aside for optimizer state that does not exist yet when the first step is
      planned; `None` assumes two copies of the trainable parameters, until the real state is seen. Only
      `memory_budget` uses it.
    - `on_oom`: `"replan"` answers a `torch.OutOfMemoryError` on one device by a tighter plan and runs the same step
      again, with nothing lost; `"raise"` lets it pass. Either needs a step whose bounds are known: Lightning's
      automatic optimization, or `tbp.run_step`.
    - `plan_cache`: whether plans are kept on disk, so that the next process that trains the same program need neither
      measure nor plan: `True` in the folder that `$TINYBP_CACHE` names, or else in the user's cache folder; `False`
      not at all; a text in the folder it names.
    - `costs`: `"seconds"` plans for the least measured time; `"operations"` for the fewest floating-point operations,
      so that the plan is the same in every run and on every machine that allocates alike. A matrix product may cost
      a thousand times as many of them as a norm that takes as long. Blocks that are compiled cannot be counted.
    - `check`: compare a hash of every tensor that a replay saves with the forward's, and raise `ReplayError` where they
      differ. The environment variable `HCB_CHECK=1` switches it on too, whatever is said here.

    **Raises:** `BudgetError` for a budget that cannot be read, `ConfigError` for any other wrong option.
    """

    memory_budget: int | str | None = None
    activation_budget: int | str | None = None
    executor: str = "auto"
    optimizer_state_bytes: int | None = None
    on_oom: str = "replan"
    plan_cache: bool | str = True
    check: bool = False
    costs: str = "seconds"

    def __post_init__(self) -> None:
        _ = self.budget
        kinds_of = (
            ("executor", self.executor, ExecutorName),
            ("on_oom", self.on_oom, OnOom),
            ("costs", self.costs, Costs),
        )
        for name, value, kinds in kinds_of:
            choices = [e.value for e in kinds]
            if value not in choices:
                raise ConfigError(f"`{name}={value!r}` is unknown: expected one of {choices}.")
        if self.costs == Costs.OPERATIONS.value and self.executor == ExecutorName.INDUCTOR.value:
            raise ConfigError(
                "`costs='operations'` was given with `executor='inductor'`: operations of compiled blocks cannot be "
                "counted. Use `executor='eager'`, or `costs='seconds'`."
            )
        state = self.optimizer_state_bytes
        if state is not None and (isinstance(state, bool) or not isinstance(state, int) or state < 0):
            raise ConfigError(f"`optimizer_state_bytes={state!r}` is no size: expected an int of at least 0 (bytes).")
        if not isinstance(self.plan_cache, (bool, str)):
            raise ConfigError(
                f"`plan_cache={self.plan_cache!r}` has type {type(self.plan_cache).__name__}: expected `True`, "
                "`False`, or the path of a folder as a str."
            )
        if isinstance(self.plan_cache, str) and not self.plan_cache.strip():
            raise ConfigError(
                f"`plan_cache={self.plan_cache!r}` names no folder: give its path, or `False` for no cache on disk."
            )
        if not isinstance(self.check, bool):
            raise ConfigError(
                f"`check={self.check!r}` has type {type(self.check).__name__}: expected `True` (compare every replayed "
                "tensor with the forward's) or `False`."
            )

    @property
    def budget(self) -> Budget:
        """The one budget in force."""
        if self.memory_budget is not None and self.activation_budget is not None:
            raise BudgetError(
                f"`memory_budget={self.memory_budget!r}` and `activation_budget={self.activation_budget!r}` were both "
                "given: expected one. Use `memory_budget` for all device bytes, `activation_budget` for activations."
            )
        if self.activation_budget is not None:
            return parse_budget(self.activation_budget, BudgetKind.ACTIVATION)
        return parse_budget("auto" if self.memory_budget is None else self.memory_budget, BudgetKind.MEMORY)


def check_config(value: object) -> None:
    """Raise `ConfigError` for what is neither an `HCBConfig` nor `None`."""
    if value is not None and not isinstance(value, HCBConfig):
        raise ConfigError(f"`config={value!r}` is no HCBConfig: write `HCBConfig(memory_budget=...)`.")


def parse_budget(value: int | str, kind: BudgetKind) -> Budget:
    """Return the `Budget` that a user's value stands for.

    **Raises:** `BudgetError` naming the value, the accepted forms and the fix.
    """
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
