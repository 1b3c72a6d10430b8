"""Which of the user's ops runs now? Read off the Python frames: nothing is written down in advance.

A pack hook is called inside the op that saves. The frame above it is either the generated code of a traced block, whose
lines are the ops of its graph, or the `forward` of a submodule.

Note [Filled after saving]
    `rrelu` in training saves its noise *before* its kernel draws it, and without raising a version: what a hook is
    given is memory that nobody has written yet. It is the only op whose formula does so (of all schemas in torch 2.13,
    the only one that writes to an argument that its backward reads). A replay that stopped there would hand garbage to
    backward.
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
"""Whose frames may stand between an op and the code of its block: an op that may be left out is run by these."""
_FILLS_AFTER_SAVING = frozenset({"rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_"})


def running_op() -> str:
    """Return words for the op that saves a tensor now ("op `gelu` of `layers.0.mlp`"); empty in compiled code."""
    modules: list[nn.Module] = []  # innermost first
    for frame in _frames_of_the_block():
        owner = frame.f_locals.get("self")
        if isinstance(owner, fx.GraphModule):
            return _traced_op(owner, frame.f_lineno)
        if isinstance(owner, nn.Module) and (not modules or modules[-1] is not owner):
            modules.append(owner)
    if not modules:
        return ""
    path = ".".join(reversed([_name_in(outer, inner) for inner, outer in pairwise(modules)]))
    kind = type(modules[0]).__name__
    return f"an op of `{path}` (`{kind}`)" if path else f"an op of its `{kind}` itself"


def fills_after_saving() -> bool:
    """Return whether the op that saves a tensor now may fill it later. See Note [Filled after saving]."""
    codes = (frame.f_code for frame in _frames_of_the_block())
    return any(c.co_name in _FILLS_AFTER_SAVING or not _FILLS_AFTER_SAVING.isdisjoint(c.co_names) for c in codes)


def _frames_of_the_block() -> Iterator[FrameType]:
    """The frames between the pack hook and whoever runs the block, innermost first."""
    frame = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(_OURS):
        frame = frame.f_back
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name not in _BETWEEN:
            if name.startswith(_OURS):
                return
            yield frame
        frame = frame.f_back


def _traced_op(module: fx.GraphModule, line: int) -> str:
    """The op on a line of the generated code: each line assigns to the name of one node."""
    lines = module.code.splitlines()
    name = lines[line - 1].strip().partition(" ")[0].rstrip(":") if line <= len(lines) else ""
    node = next((n for n in module.graph.nodes if n.name == name), None)
    if node is None:
        return ""
    path = module_path(node)
    return f"op `{name}` of `{path}`" if path else f"op `{name}`"


def _name_in(outer: nn.Module, inner: nn.Module) -> str:
    parts = cast("Iterator[tuple[str, nn.Module]]", outer.named_modules())
    return next((name for name, part in parts if part is inner), type(inner).__name__)
