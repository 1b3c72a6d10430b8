"""Under which settings does each op of a traced forward run? Regions become a property of the ops inside them.

Dynamo writes `with torch.autocast(...)` or `with sdpa_kernel(...)` as one call that opens the region and one that
closes it. Such calls tie all that lies between to one block. So they are taken out of the graph, and every op is marked
with the settings that differ from those around the forward. A block puts them in place where its code needs them.

Note [Casts]
    Autocast keeps its copies of weights until its outermost region ends. A run of the blocks holds one region open
    throughout (`keeping_casts`), and drops the copies where the user's outermost region ended.
"""

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import has_side_effect

from tinybp_lightning.capture.torch.ambient import (
    Settings,
    changed_settings,
    closing_regions,
    keeping_casts,
    settings_as,
    settings_now,
    switch_settings,
)
from tinybp_lightning.capture.torch.higher_order import Applied
from tinybp_lightning.errors import CaptureError

__all__ = ["RegionInterpreter", "has_regions", "insert_switches", "region_of", "settle_regions"]

_SETTINGS, _ENDS = "tbp_settings", "tbp_ends_casts"
_INFERENCE = ("_enter_inference_mode", "_exit_inference_mode")

Region = Mapping[str, Hashable]
"""The settings that differ from those around the forward, by name."""


def region_of(n: fx.Node) -> Region:
    """Return the settings that the forward has put in place around a node."""
    return n.meta.get(_SETTINGS, {})


def has_regions(calls: Iterable[fx.Node]) -> bool:
    """Return whether code made of `calls` changes settings or the gradient mode, or enters a transform."""
    names = (str(getattr(n.target, "__name__", n.target)) for n in calls)
    return any(name == "_set_grad_enabled" or name.endswith("_nesting") for name in names) or any(
        region_of(n) or n.op == "call_module" or isinstance(n.target, Applied) for n in calls
    )


def settle_regions(module: fx.GraphModule) -> None:
    """Take the calls that change settings out of `module`, and mark the other nodes with the settings they run under.

    **Raises:** `CaptureError` for inference mode, and if the forward leaves a setting changed.
    """
    base, graph = settings_now(), module.graph
    constants: dict[fx.Node, Any] = {}
    setters: set[fx.Node] = set()
    region: Region = {}
    with closing_regions():
        for n in graph.nodes:
            if n.op == "call_function" and getattr(n.target, "__name__", "") in _INFERENCE:
                raise CaptureError("it enters inference mode, whose tensors cannot be replayed")
            n.meta[_SETTINGS] = region
            if _is_python(n, constants):
                constants[n] = _call(n, constants)
                region = changed_settings(base, settings_now())
                if region != n.meta[_SETTINGS]:
                    setters.add(n)
        if region:
            raise CaptureError(f"its forward changes the {next(iter(region))} and leaves it changed")
    if not setters:
        return
    for n in reversed(list(graph.nodes)):
        if n in setters or (n in constants and not n.users):
            graph.erase_node(n)
    casts = False
    for n in graph.nodes:
        before, casts = casts, "autocast" in region_of(n)
        n.meta[_ENDS] = before and not casts
    module.recompile()


def _is_python(n: fx.Node, constants: Mapping[fx.Node, Any]) -> bool:
    """Return whether a node is a Python function of torch, and not an op, that depends on no input."""
    target = n.target
    if n.op != "call_function" or not isinstance(target, FunctionType):
        return False
    if target.__module__.partition(".")[0] != "torch":
        return False
    return all(i in constants for i in n.all_input_nodes)


def _call(n: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((n.args, n.kwargs), values.__getitem__)
    return cast("FunctionType", n.target)(*args, **kwargs)


def insert_switches(graph: fx.Graph) -> None:
    """Have the code of a block, whose calls are marked, put their settings in place."""
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    if not any(region_of(n) or n.meta.get(_ENDS) for n in calls):
        return
    with graph.inserting_before(calls[0]):
        base = graph.call_function(settings_now)
    now: Region = {}
    for n in calls:
        with graph.inserting_before(n):
            if region_of(n) != now:
                now = region_of(n)
                graph.call_function(_Switch(tuple(now.items())), (base,))
            if n.meta.get(_ENDS):
                graph.call_function(_drop_casts)
    if now:
        with graph.inserting_before(graph.output_node()):
            graph.call_function(_Switch(()), (base,))


@dataclass(frozen=True)
class _Switch:
    """Puts the settings around a block in place, with some of them `changed`."""

    changed: tuple[tuple[str, Hashable], ...]

    def __post_init__(self) -> None:
        has_side_effect(self)

    @property
    def __name__(self) -> str:
        """The name in generated code, by which blocks are told apart."""
        return f"switch_settings_{hashlib.sha256(repr(self.changed).encode()).hexdigest()[:12]}"

    def __call__(self, base: Settings) -> None:
        switch_settings(base, dict(self.changed))


def _drop_casts() -> None:
    """End the outermost autocast region of the forward: see Note [Casts]."""
    is_outermost = torch.autocast_increment_nesting() == 2  # the other is that of `keeping_casts`
    torch.autocast_decrement_nesting()
    if is_outermost:
        torch.clear_autocast_cache()


for _function in (settings_now, _drop_casts):
    has_side_effect(_function)


class RegionInterpreter(fx.Interpreter):
    """Runs a settled graph node by node, each under its settings."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole graph, as one autocast region."""
        with keeping_casts():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node under its settings. Raises `CaptureError` if it changes others."""
        if n.meta.get(_ENDS):
            _drop_casts()
        before = settings_now()
        region = region_of(n)
        with settings_as(tuple((name, region.get(name, value)) for name, value in before)):
            result = super().run_node(n)
            changed = [name for name in changed_settings(before, settings_now()) if name not in region]
        if changed:
            raise CaptureError(f"`{n.name}` changes the {changed[0]}")
        return result
