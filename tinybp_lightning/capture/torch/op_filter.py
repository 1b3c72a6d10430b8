"""How does a replay leave out what it does not need? Ops found to be spare (`graph.spare`) are run by a `OpFilter`.

In the code of a block such an op is an attribute that is called. Whoever replays the block decides how far it is run:
its saving comes before its computing, so it is stopped in between, or not begun where nothing it saves is wanted. Its
result is `None` then, and is seen by spare ops only. Where no keeper is at work, it runs as any op.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any, Protocol, cast

from torch import fx

__all__ = ["OpFilter", "SkippableOp", "call_through_filter", "filtered_by"]


class OpFilter(Protocol):
    """Runs the spare ops of one block."""

    def __call__(self, number: int, run: Callable[[], Any], *, is_silent: bool) -> Any:
        """Run spare op `number` as far as it is needed; `is_silent`: by its record it saves no activation."""
        ...


_now = threading.local()


@contextlib.contextmanager
def filtered_by(keeper: OpFilter | None) -> Generator[None]:
    """Have `keeper` run the spare ops of the block that the body runs, in this thread; `None`: as any op."""
    before = getattr(_now, "keeper", None)
    _now.keeper = keeper
    try:
        yield
    finally:
        _now.keeper = before


class SkippableOp:
    """A call of a torch function that a replay may leave out; `number` tells it from others of its block.

    It is no module: hooks of all modules must not see it.
    """

    def __init__(self, function: Callable[..., Any], number: int, *, is_silent: bool) -> None:
        self.function = function
        self._number = number
        self._is_silent = is_silent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, or have the keeper do so."""
        keeper: OpFilter | None = getattr(_now, "keeper", None)
        if keeper is None:
            return self.function(*args, **kwargs)
        return keeper(self._number, partial(self.function, *args, **kwargs), is_silent=self._is_silent)


def call_through_filter(code: fx.GraphModule, spare: Mapping[fx.Node, bool]) -> None:
    """Have a block's code call the ops in `spare` (and whether each is silent) by way of a `SkippableOp`."""
    for number, (node, is_silent) in enumerate(spare.items()):
        name = f"spare_{number}"
        setattr(code, name, SkippableOp(_function_of(code, node), number, is_silent=is_silent))
        node.op, node.target = "call_module", name  # in generated code, a call of that attribute
    code.recompile()


def _function_of(code: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    match node.op:
        case "call_method":
            return partial(_call_method, str(node.target))
        case "call_module":
            return code.get_submodule(str(node.target)).__call__
        case _:
            return cast("Callable[..., Any]", node.target)


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)
