"""Are the names registered once, and never over somebody else's?"""

from typing import Any

import pytest

from tinybp_lightning.errors import ConfigError
from tinybp_lightning.integrations._shared.strategy import register_all


class Registry(dict[str, Any]):
    """The part of Lightning's registry that is used."""

    def register(self, name: str, strategy: type[Any], description: str, **init_params: Any) -> None:
        assert name not in self
        self[name] = {"strategy": strategy, "description": description, "init_params": init_params}


class Auto:
    """Several words.

    And more.
    """


class Single: ...


class DDP: ...


def register(registry: Registry) -> None:
    register_all(registry, auto=Auto, single=Single, ddp=DDP)


def test_names_classes_and_options() -> None:
    registry = Registry()
    register(registry)
    entries = {name: (entry["strategy"], entry["init_params"]) for name, entry in registry.items()}
    assert entries == {
        "hcb": (Auto, {}),
        "hcb_single": (Single, {}),
        "hcb_ddp": (DDP, {"start_method": "popen"}),
        "hcb_ddp_find_unused_parameters_true": (DDP, {"start_method": "popen", "find_unused_parameters": True}),
        "hcb_ddp_spawn": (DDP, {"start_method": "spawn"}),
        "hcb_ddp_notebook": (DDP, {"start_method": "fork"}),
    }
    assert registry["hcb"]["description"] == "Several words."


def test_again_changes_nothing() -> None:
    registry = Registry()
    register(registry)
    before = dict(registry)
    register(registry)
    assert registry == before


def test_a_taken_name_is_refused_before_anything_is_registered() -> None:
    registry = Registry(hcb_ddp={"strategy": Single})
    with pytest.raises(ConfigError, match=r"`hcb_ddp` is taken by .*Single"):
        register(registry)
    assert list(registry) == ["hcb_ddp"]
