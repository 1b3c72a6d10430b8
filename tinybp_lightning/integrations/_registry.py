"""Under which names can a Trainer find the HCB strategies?

The names follow Lightning's (`ddp`, `ddp_spawn`, …) with `hcb` in front, so that a strategy string is changed by its
prefix.
"""

from typing import Any

from tinybp_lightning.errors import ConfigError

__all__ = ["register_all"]


def register_all(registry: Any, *, auto: type[Any], single: type[Any], ddp: type[Any]) -> None:
    """Register the strategies of one namespace; names that are there with the same class stay.

    **Raises:** `ConfigError` when a name is taken by another class.
    """
    entries: tuple[tuple[str, type[Any], dict[str, Any]], ...] = (
        ("hcb", auto, {}),
        ("hcb_single", single, {}),
        ("hcb_ddp", ddp, {"start_method": "popen"}),
        ("hcb_ddp_find_unused_parameters_true", ddp, {"find_unused_parameters": True, "start_method": "popen"}),
        ("hcb_ddp_spawn", ddp, {"start_method": "spawn"}),
        ("hcb_ddp_notebook", ddp, {"start_method": "fork"}),
    )
    taken = {name: registry[name]["strategy"] for name, _, _ in entries if name in registry}
    for name, strategy, _ in entries:
        if taken.get(name, strategy) is not strategy:
            raise ConfigError(f"the strategy name `{name}` is taken by `{taken[name]!r}`; expected it to be free.")
    for name, strategy, options in entries:
        if name not in taken:
            summary = (strategy.__doc__ or "").partition("\n")[0]
            registry.register(name, strategy, description=summary, **options)
