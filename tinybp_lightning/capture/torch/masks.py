"""Does the caller's attention mask hide anything? The question is answered before a trace, which must not read values.

Transformers drops a mask of ones and picks a causal or full kernel (`masking_utils`), for which it reads the mask. So
the mask is read before each call, and during the call the two functions that would read it are replaced by functions
that return the answer. Dynamo guards on their code, so each answer has a graph of its own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.comptime import comptime

from tinybp_lightning.errors import CaptureError

__all__ = ["mask_functions"]

_ASKING = "transformers.masking_utils"
# They change no answer, because they neither make nor leave out an element.
_CONVERSIONS = ("bool", "contiguous", "detach", "flatten", "reshape", "squeeze", "to", "unsqueeze", "view")


def mask_functions(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, str, Callable[..., Any]], ...]:
    """Return the functions to replace (module, name, new function) while `forward` is called.

    **Returns:** none without a mask, or where one mask hides something and another does not.
    """
    answers = {bool(mask.all()) for mask in _masks(forward, args, kwargs)}
    if answers == {True}:
        return _FUNCTIONS_FOR_ONES
    return _FUNCTIONS_FOR_PADDING if answers == {False} else ()


def _masks(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    try:
        named: dict[str, Any] = inspect.signature(forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will raise a better error
        return
    for name, value in named.items():
        inner = cast("Mapping[Any, Any]", value) if isinstance(value, Mapping) else {name: value}
        for key, mask in inner.items():
            if str(key).endswith("attention_mask") and isinstance(mask, torch.Tensor) and mask.ndim == 2:
                yield mask


def _check_mask(context: Any) -> None:
    """Refuse a mask that is not the caller's own: the answer was found for that one."""
    node: fx.Node = context.get_local("padding_mask").as_proxy().node
    while node.op == "call_method" and node.target in _CONVERSIONS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.op != "placeholder" or "attention_mask" not in node.name:
        raise CaptureError("the attention mask is computed, and the kernel depends on its values")


def _refuse_lengths(_: Any) -> None:
    raise CaptureError("the attention mask and the queries differ in length")


def _bidirectional_for_ones(
    padding_mask: torch.Tensor | None, kv_length: int, local_attention_size: int | None = None
) -> bool:
    if padding_mask is not None:
        comptime(_check_mask)
    return local_attention_size is None or kv_length < local_attention_size


def _bidirectional_for_padding(
    padding_mask: torch.Tensor | None, kv_length: int, local_attention_size: int | None = None
) -> bool:
    is_ignored = _bidirectional_for_ones(padding_mask, kv_length, local_attention_size)
    return padding_mask is None and is_ignored


def _causal_for_ones(
    padding_mask: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    local_attention_size: int | None = None,
) -> bool:
    _ = (q_offset, kv_offset)
    if q_length != kv_length:
        comptime(_refuse_lengths)
    return _bidirectional_for_ones(padding_mask, kv_length, local_attention_size)


def _causal_for_padding(padding_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> bool:
    is_ignored = _causal_for_ones(padding_mask, *args, **kwargs)
    return padding_mask is None and is_ignored


_FUNCTIONS_FOR_ONES = (
    (_ASKING, "_ignore_causal_mask_sdpa", _causal_for_ones),
    (_ASKING, "_ignore_bidirectional_mask_sdpa", _bidirectional_for_ones),
)
_FUNCTIONS_FOR_PADDING = (
    (_ASKING, "_ignore_causal_mask_sdpa", _causal_for_padding),
    (_ASKING, "_ignore_bidirectional_mask_sdpa", _bidirectional_for_padding),
)
