"""Name the ways to train that are compared; `recipes.peers` implements them."""

from collections.abc import Sequence
from enum import Enum
from typing import cast

from tinybp_lightning.errors import ConfigError

__all__ = ["Mode", "parse_modes"]


class Mode(Enum):
    """A way to train; `naive` is plain autograd."""

    naive = "naive"
    checkpoint = "checkpoint"
    selective = "selective"
    compile = "compile"
    compile_layers = "compile_layers"
    compile_layers_checkpoint = "compile_layers_checkpoint"
    activation_memory_budget = "activation_memory_budget"
    compile_layers_memory_budget = "compile_layers_memory_budget"
    hcb_eager = "hcb_eager"
    hcb_inductor = "hcb_inductor"


def parse_modes(mode: object) -> tuple[Mode, ...]:
    """Return the modes that a configuration's `mode` names: `all`, one name, or a list of names.

    **Returns:** each mode once, in the order given.

    **Raises:** `ConfigError` when a name is not a mode.
    """
    if mode == "all":
        return tuple(Mode)
    names = cast(Sequence[object], mode) if isinstance(mode, list | tuple) else [mode]
    known = {known_mode.value: known_mode for known_mode in Mode}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"`mode={unknown[0]}` is not a mode: use `all` or some of {', '.join(known)}.")
    return tuple(known[str(name)] for name in dict.fromkeys(names))
