"""Notice a module that is trained without being called: through another method than `forward`, no plan is in force."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tinybp_lightning.runtime.torch.messages import WarnOnce

__all__ = ["GradientWatch"]


class GradientWatch:
    """Warns once if parameters of `root` get gradients before `end` is called, as the first training call does."""

    def __init__(self, root: nn.Module) -> None:
        self._name = type(root).__name__
        self._warn = WarnOnce()
        trained = [p for p in root.parameters() if p.requires_grad and p.is_leaf]
        # One method may train a part only, so the first parameter alone would not tell.
        ends = {id(p): p for p in (*trained[:1], *trained[-1:])}
        self._handles: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._hear) for p in ends.values()]

    def end(self) -> None:
        """Take the hooks off. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def _hear(self, _: Any) -> None:
        self._warn(
            "not called",
            f"`{self._name}` is trained plainly, and its budget is not enforced, where it is not called itself: its "
            "parameters got gradients, and its `forward` had not run. Call the module, not another method of it, or "
            "give `hcb` the part that is called.",
        )
