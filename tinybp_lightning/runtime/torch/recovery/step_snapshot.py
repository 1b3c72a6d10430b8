"""Note what a step changes (random generators, buffers, gradients), and restore it before the step is run again.

Note [Finished gradients]
    Within one backward a parameter's `AccumulateGrad` runs once, with everything that belongs to it. So a backward that
    fails half-way leaves some gradients finished, and has not reached the others. A finished one has the value that an
    uninterrupted step would leave: it is set aside, and restored when the second run makes that gradient again. That
    needs no copy of the older gradients and no sum in another order, so the bits are the same in any micro-batch.

Note [Buffers that change]
    In the first steps buffers are copied to the host and compared. Later those that have changed are copied where they
    are, and the others are only watched by their version. Norms change their statistics without raising the version, so
    those always count as changing.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from tinybp_lightning.capture.torch.ambient import generators_in, random_state_now, set_random_state
from tinybp_lightning.capture.torch.private import accumulation_hooks, buffers_of

__all__ = ["StepSnapshot"]

_LEARNING_STEPS = 2


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer as it was when the step began, with a copy if it may change."""

    owner: nn.Module
    name: str
    tensor: torch.Tensor | None
    version: int
    copy: torch.Tensor | None

    @property
    def was_written(self) -> bool:
        """Whether the tensor's content has changed, by its version or by its copy."""
        if _version(self.tensor) != self.version:
            return True
        if self.tensor is None or self.copy is None:
            return False
        return not torch.equal(self.tensor.to(self.copy.device), self.copy)

    def restore(self) -> None:
        """Put the tensor back into its module, with the content that it had."""
        if self.tensor is not None and self.copy is not None and self.was_written:
            self.tensor.copy_(self.copy)
        if buffers_of(self.owner).get(self.name) is not self.tensor:
            buffers_of(self.owner)[self.name] = self.tensor


@dataclass(frozen=True, slots=True)
class _Gradient:
    """A parameter's gradient before something that may change it. A weak reference: the step may release it."""

    tensor: "weakref.ref[torch.Tensor] | None"
    version: int

    @classmethod
    def of(cls, p: nn.Parameter) -> "_Gradient":
        return cls(None if p.grad is None else weakref.ref(p.grad), _version(p.grad))

    def is_of(self, p: nn.Parameter) -> bool:
        """Return whether `p` has the same gradient, unchanged."""
        tensor = None if self.tensor is None else self.tensor()
        return p.grad is tensor and _version(p.grad) == self.version


class StepSnapshot:
    """Notes what a step of `root` changes: `begin`, `backward_begins`, then `end`, or `abandon` after a failure."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._num_steps = 0
        self._changing: set[tuple[int, str]] = set()
        self._finished: dict[int, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._list_parts()
        self._release()

    def _list_parts(self) -> None:
        self._modules = list(self.root.modules())
        self._parameters = list(self.root.named_parameters())

    def _release(self) -> None:
        self._restore_generators: Callable[[], None] | None = None
        self._buffers: list[_Buffer] = []
        self._inputs: list[tuple[torch.Tensor, int]] = []
        self._draws = False
        self._versions: list[int] = []
        self._gradients: list[_Gradient] = []
        self._is_backward = False
        self._finished.clear()
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def begin(self, inputs: Sequence[Any]) -> None:
        """Note everything before the forward; a second run will get `inputs` again."""
        self._release()
        self._restore_generators = _note_generators(self.root, {p.device for _, p in self._parameters})
        self._inputs = [(t, _version(t)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        self._draws = any(isinstance(x, Iterator) for x in tree_leaves(inputs))
        self._versions = [p._version for _, p in self._parameters]
        self._gradients = [_Gradient.of(p) for _, p in self._parameters]
        self._buffers = [self._note(m, name) for m in self._modules for name in buffers_of(m)]

    def _note(self, owner: nn.Module, name: str) -> _Buffer:
        """See Note [Buffers that change]."""
        t = buffers_of(owner)[name]
        copy: torch.Tensor | None = None
        if t is not None and ((id(owner), name) in self._changing or getattr(owner, "track_running_stats", False)):
            copy = t.detach().clone()
        elif t is not None and self._num_steps < _LEARNING_STEPS:
            copy = t.detach().to("cpu", copy=True)
        return _Buffer(owner, name, t, _version(t), copy)

    def backward_begins(self) -> None:
        """Note the gradients that backward will add to."""
        self._is_backward = True
        for index, (_, p) in enumerate(self._parameters):
            if index not in self._finished:
                self._gradients[index] = _Gradient.of(p)

    def end(self) -> None:
        """End a step that went well, and learn which buffers change."""
        learning = self._num_steps < _LEARNING_STEPS
        for b in self._buffers:
            if _version(b.tensor) != b.version or (learning and b.was_written):
                self._changing.add((id(b.owner), b.name))
        self._num_steps += 1
        self.abandon()

    def abandon(self) -> None:
        """Release everything; finished gradients go where an uninterrupted step would have left them."""
        for index, finished in self._finished.items():
            self._parameters[index][1].grad = finished
        self._release()

    def obstacle(self) -> str | None:
        """Return why the step cannot be run again, or `None` if it can."""
        now = [*self.root.modules(), *self.root.parameters()]
        if list(map(id, now)) != list(map(id, [*self._modules, *(p for _, p in self._parameters)])):
            self._list_parts()
            return "a part of the model was added or taken away during the step"
        if self._draws:
            return "the step draws its batch itself, and would draw the next one"
        if any(_version(t) != version for t, version in self._inputs):
            return "the step changed its batch in place"
        for (name, p), version, before in zip(self._parameters, self._versions, self._gradients, strict=True):
            if p._version != version:
                return f"parameter `{name}` was changed before the step had ended"
            if self._is_backward:
                # A hook may have run, and we cannot know what it changed.
                if any(not isinstance(hook, _Restore) for hook in accumulation_hooks(p)):
                    return f"parameter `{name}` has a hook that runs after its gradient's accumulation"
            elif p.grad is not None and not before.is_of(p):  # a gradient set to none is none for the second run too
                return f"the gradient of `{name}` was changed in the forward"
        lost = [b.name for b in self._buffers if b.copy is None and b.was_written]
        return f"buffer `{lost[0]}` changed for the first time, and there is no copy of it" if lost else None

    def rewind(self) -> None:
        """Restore generators, buffers and gradients, so that the step can be run again."""
        assert self._restore_generators is not None, "no step has begun"
        self._restore_generators()
        with torch.no_grad():
            for b in self._buffers:
                b.restore()
        self._remove_hooks()
        # See Note [Finished gradients].
        for index, ((_, p), before) in enumerate(zip(self._parameters, self._gradients, strict=True)):
            if index not in self._finished:
                if not self._is_backward or before.is_of(p):
                    continue
                if before.tensor is not None and p.grad is not None:
                    self._finished[index] = p.grad
            p.grad = None
            if index in self._finished:
                parameter: Any = p  # the method is not annotated in full
                self._handles.append(parameter.register_post_accumulate_grad_hook(_Restore(self._finished[index])))
        self._is_backward = False


@dataclass(frozen=True, slots=True)
class _Restore:
    """A hook that replaces the gradient that a second run has just made by the finished one."""

    finished: torch.Tensor

    def __call__(self, parameter: torch.Tensor) -> None:
        parameter.grad = self.finished


def _version(t: torch.Tensor | None) -> int:
    return -1 if t is None or t.is_inference() else t._version


def _note_generators(root: nn.Module, devices: Iterable[torch.device]) -> Callable[[], None]:
    """Note the states of all generators, the module's own too, and return what restores them."""
    state = random_state_now(devices, generators_in(v for part in root.modules() for v in vars(part).values()))
    return lambda: set_random_state(state)
