"""Find out from the Python frames which of the user's ops is saving a tensor.

A pack hook is called inside the op that saves. The frame above it is generated code of a traced block, whose lines are
the ops of its graph, or a submodule's `forward`.

Note [Filled after saving]
    In training `rrelu` saves its noise *before* its kernel draws it, and does not raise a version: a replay that
    stopped there would hand backward memory that nobody has written. Among all schemas in torch 2.13, only this op
    writes to an argument that its backward reads.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import FrameType
from typing import cast

from torch import fx, nn

from tinybp_lightning.capture.torch.record import module_path

__all__ = ["fills_after_saving", "running_op"]

_OURS = "tinybp_lightning.runtime.torch."
_BETWEEN = ("tinybp_lightning.runtime.torch.replay.saved_tensors", "tinybp_lightning.capture.torch.op_filter")
"""The modules whose frames may stand between an op and the code of its block: they run the skippable ops."""
_COMPILED = "compiled code"
_FILLS_AFTER_SAVING = frozenset({"rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_"})


def running_op() -> str:
    """Describe the op that is saving a tensor: "op `gelu` of `layers.0.mlp`", or "compiled code"."""
    modules: list[nn.Module] = []  # innermost first
    for frame in _frames_of_the_block():
        owner = frame.f_locals.get("self")
        if isinstance(owner, fx.GraphModule):
            return _traced_op(owner, frame.f_lineno)
        if isinstance(owner, nn.Module) and (not modules or modules[-1] is not owner):
            modules.append(owner)
    if not modules:
        return _COMPILED
    path = ".".join(reversed([_name_in(outer, inner) for inner, outer in pairwise(modules)]))
    kind = type(modules[0]).__name__
    return f"an op of `{path}` (`{kind}`)" if path else f"an op of its `{kind}` itself"


def fills_after_saving() -> bool:
    """Return whether the op that is saving a tensor may fill it later. See Note [Filled after saving]."""
    codes = (frame.f_code for frame in _frames_of_the_block())
    return any(c.co_name in _FILLS_AFTER_SAVING or not _FILLS_AFTER_SAVING.isdisjoint(c.co_names) for c in codes)


def _frames_of_the_block() -> Iterator[FrameType]:
    """Yield the frames between the pack hook and the engine, innermost first."""
    frame, is_below = inspect.currentframe(), True  # below the op: the hook itself
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        is_ours = name.startswith(_OURS)
        is_below &= is_ours
        if is_ours and not is_below and name not in _BETWEEN:
            return
        if not is_ours and name not in _BETWEEN:
            yield frame
        frame = frame.f_back


def _traced_op(module: fx.GraphModule, line: int) -> str:
    """Return the op on a line of the generated code, which assigns to the name of one node."""
    lines = module.code.splitlines()
    name = lines[line - 1].strip().partition(" ")[0].rstrip(":") if line <= len(lines) else ""
    node = next((n for n in module.graph.nodes if n.name == name), None)
    if node is None:
        return _COMPILED
    path = module_path(node)
    return f"op `{name}` of `{path}`" if path else f"op `{name}`"


def _name_in(outer: nn.Module, inner: nn.Module) -> str:
    parts = cast("Iterator[tuple[str, nn.Module]]", outer.named_modules())
    return next((name for name, part in parts if part is inner), type(inner).__name__)
