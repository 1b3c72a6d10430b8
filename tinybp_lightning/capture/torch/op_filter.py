"""How does a replay leave out ops that it does not need? Its *op filter* runs the skippable ops of the block.

In the code of a block a skippable op (`graph.cuts.products`) is an attribute that is called. It saves before it
computes, so the filter stops it in between, or does not begin where the replay wants nothing that it saves. Its result
is `None` then, which only skippable ops read. Without an op filter it runs like any other op.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any, Protocol, cast

from torch import fx

__all__ = ["OpFilter", "SkippableOp", "call_through_filter", "filtered_by"]


class OpFilter(Protocol):
    """Runs the skippable ops of one block."""

    def __call__(self, number: int, run: Callable[[], Any], *, is_silent: bool) -> Any:
        """Run skippable op `number` as far as needed; `is_silent`: its record says that it saves no activation."""
        ...


_now = threading.local()


@contextlib.contextmanager
def filtered_by(op_filter: OpFilter | None) -> Generator[None]:
    """Let `op_filter` run the skippable ops that the body meets in this thread; `None`: run them like any op."""
    before = getattr(_now, "op_filter", None)
    _now.op_filter = op_filter
    try:
        yield
    finally:
        _now.op_filter = before


class SkippableOp:
    """A call of a torch function that a replay may leave out; `number` tells it from others of its block.

    It is not a module, so that global module hooks do not see it.
    """

    def __init__(self, function: Callable[..., Any], number: int, *, is_silent: bool) -> None:
        self.function = function
        self._number = number
        self._is_silent = is_silent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, through the op filter if there is one."""
        op_filter: OpFilter | None = getattr(_now, "op_filter", None)
        if op_filter is None:
            return self.function(*args, **kwargs)
        return op_filter(self._number, partial(self.function, *args, **kwargs), is_silent=self._is_silent)


def call_through_filter(code: fx.GraphModule, skippable: Mapping[fx.Node, bool]) -> None:
    """Make a block's code call its `skippable` ops (with whether each is silent) through a `SkippableOp`."""
    for number, (node, is_silent) in enumerate(skippable.items()):
        name = f"skippable_{number}"
        setattr(code, name, SkippableOp(_function_of(code, node), number, is_silent=is_silent))
        node.op, node.target = "call_module", name  # the generated code calls that attribute
    code.recompile()


def _function_of(code: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_method":
        return partial(_call_method, str(node.target))
    is_module = node.op == "call_module"
    return code.get_submodule(str(node.target)).__call__ if is_module else cast("Callable[..., Any]", node.target)


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)
