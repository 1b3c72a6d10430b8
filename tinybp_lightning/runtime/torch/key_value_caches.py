"""Train without the caches of keys and values that `transformers` fills for generation.

A cache keeps every layer's keys and values to the end of the step, as part of the model's output, and it is an object
that each layer changes, which a replay would change again. The checkpointing of `transformers` leaves it out as well.
We know it by its option, `config.use_cache`, and import nothing of that package.
"""

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

from torch import nn

from tinybp_lightning.runtime.torch.messages import WarnOnce

__all__ = ["KeyValueCaches"]


class KeyValueCaches:
    """The options of `module`'s parts that make them fill caches when the caller has not asked for any.

    **Arguments:** `forward`: of `module`; `warn`: gives the warnings of its target.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], warn: WarnOnce) -> None:
        configs = [getattr(part, "config", None) for part in module.modules()]
        self._configs: list[Any] = list({id(c): c for c in configs if hasattr(c, "use_cache")}.values())
        self._name = type(module).__name__
        self._is_option = "use_cache" in inspect.signature(forward).parameters
        self._warn = warn

    @contextlib.contextmanager
    def left_out(self, kwargs: Mapping[str, Any]) -> Generator[None]:
        """Leave the caches out of the calls in the body, unless `kwargs`, those of the outermost, mention them."""
        filled = [config for config in self._configs if config.use_cache is True]
        if not filled or (self._is_option and ("use_cache" in kwargs or kwargs.get("past_key_values") is not None)):
            yield
            return
        self._warn(
            "no cache",
            f"`{self._name}` is trained without its cache of keys and values, which `config.use_cache` asks for and "
            "which would hold those of all layers to the end of the step: `past_key_values` is None in training. Pass "
            "`use_cache=True` to the call if you read it.",
        )
        for config in filled:
            config.use_cache = False
        try:
            yield
        finally:
            for config in filled:
                config.use_cache = True
