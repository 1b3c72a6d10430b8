"""Turn the higher-order ops in Dynamo's graph, which expect a compiler, back into plain calls.

Dynamo writes two of the user's constructs as *higher-order ops*, which hold graphs:

- `torch.utils.checkpoint`. Run directly, its replay would draw new random numbers, which a compiler would have made
  reproducible. Its body is inlined: the plan decides what is recomputed.
- `autograd.Function`. Run directly, it saves tensors in a Python closure, which autograd's hooks do not see and which
  nothing can drop. It becomes an `autograd.Function` again, which saves through `save_for_backward`.
"""

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from tinybp_lightning.errors import CaptureError

__all__ = ["Applied", "as_plain_calls"]


def as_plain_calls(module: fx.GraphModule) -> None:
    """Rewrite the higher-order ops of `module` in place, inner ones first.

    **Raises:** `CaptureError` for a checkpoint whose results are not taken one by one.
    """
    for part in module.children():
        if isinstance(part, fx.GraphModule):
            as_plain_calls(part)
    changed = False
    for node in list(module.graph.nodes):
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            _inline(module, node)
            changed = True
        elif node.target is torch.ops.higher_order.autograd_function_apply:
            node.target = Applied(*(_part(module, n) for n in node.args[:2]))
            changed = True
    if changed:
        module.graph.lint()
        module.recompile()


def _part(module: fx.GraphModule, holder: Any) -> fx.GraphModule:
    part = module.get_submodule(str(holder.target))
    assert isinstance(part, fx.GraphModule), "Dynamo keeps the bodies of higher-order ops as graphs"
    return part


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a call of a body by the body's own calls."""
    holder, *arguments = node.args
    assert isinstance(holder, fx.Node), "the first argument is the body"
    body = _part(module, holder)
    given = iter(arguments)
    copies: dict[fx.Node, Any] = {}
    results: Any = ()
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(given)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: copies[n])
            else:
                copies[inner] = module.graph.node_copy(inner, lambda n: copies[n])
                if inner.op == "get_attr":
                    copies[inner].target = f"{holder.target}.{inner.target}"
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"`{user.name}` takes all results of a checkpoint: expected an op that takes one.")
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not holder.users:
        module.graph.erase_node(holder)


class Applied:
    """Stands for one of the user's `autograd.Function`s. Its name tells it from others with the same shapes."""

    def __init__(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        code = f"{forward.code}{backward.code}"
        self.__name__ = f"autograd_function_{hashlib.sha256(code.encode()).hexdigest()[:12]}"

    def __call__(self, forward: Callable[..., Any], backward: Callable[..., Any], *args: Any, **marks: Any) -> Any:
        """Run the function on `args`; `marks` holds the positions of outputs that `ctx` marks, and of saved values."""
        return _APPLY(forward, backward, marks, *args)


class _Function(torch.autograd.Function):
    """Runs the traced `forward`, which returns its results and the values to save, and the traced `backward`."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[..., Any], backward: Callable[..., Any], marks: dict[str, Any], *args: Any
    ) -> Any:
        output, saved = forward(*args)
        results = _tuple(output)
        for mark, positions in ((ctx.mark_dirty, "dirty_idx"), (ctx.mark_non_differentiable, "non_differentiable_idx")):
            if marks.get(positions):
                mark(*(results[i] for i in marks[positions]))
        ctx.run_backward = backward
        ctx.others = [None if isinstance(s, torch.Tensor) else s for s in saved]
        ctx.save_for_backward(*(s if isinstance(s, torch.Tensor) else None for s in saved))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        return (None, None, None, *_tuple(ctx.run_backward(*gradients, *saved)))


_APPLY = cast("Callable[..., Any]", _Function.apply)


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(cast("Sequence[Any]", values)) if isinstance(values, (tuple, list)) else (values,)
