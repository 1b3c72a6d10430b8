"""One call of a submodule as a block that the engine can run again, and what must be so for that to be right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tinybp_lightning.capture.torch.private import call_impl, compiled_call_impl, storage_key, swap_buffer
from tinybp_lightning.runtime.torch.arguments import CallArguments
from tinybp_lightning.runtime.torch.module_state import ModuleState
from tinybp_lightning.runtime.torch.replay.blocks import NonBoundaryInputs, has_storage, version_of

__all__ = ["ModuleBlock", "Unit", "outputs_of"]

# A norm that is in evaluation mode now may learn later, and does so without raising the version counter.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Unit:
    """A submodule whose calls are blocks. `impl` is its call; `compiled` what the user's compile call put in place."""

    name: str
    module: nn.Module
    impl: Callable[..., Any]
    compiled: Callable[..., Any] | None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "Unit":
        """Return the unit, with the call that is in place now."""
        return cls(name, module, call_impl(module), compiled_call_impl(module))


@dataclass(eq=False)
class ModuleBlock:
    """One call of a unit, runnable again. `volatile`: the buffers that earlier calls changed, `None` on the first."""

    name: str
    unit: Unit
    arguments: CallArguments
    given: tuple[tuple[Any, ...], dict[str, Any]] | None
    externals: NonBoundaryInputs
    state: ModuleState | None
    volatile: frozenset[str] | None
    is_random: bool = True  # nobody has looked
    is_out_of_place: bool = False  # nobody has looked
    has_regions: bool = True
    buffers: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """Copies of those that the call may change, from before it."""
    result: Any = None
    outputs: list[torch.Tensor] | None = None
    """What a replay returns is added here, if it is to be compared."""
    _versions: list[int | None] = field(default_factory=list[int | None])
    _buffer_versions: dict[str, int | None] = field(default_factory=dict[str, int | None])

    def first(self, state: list[Any]) -> list[Any]:
        """Run on the caller's own objects."""
        assert self.given is not None, "a block runs for the first time once"
        (args, kwargs), self.given = self.given, None
        named, volatile = dict(self.unit.module.named_buffers()), self.volatile
        self.buffers = {n: b.detach().clone() for n, b in named.items() if volatile is None or n in volatile}
        self._versions = [version_of(t) for t in self.arguments.leaves]
        self._buffer_versions = {n: version_of(b) for n, b in named.items()}
        state.clear()
        if self.state is None:
            self.result = self.unit.impl(*args, **kwargs)
        else:
            with self.state.watching_hooks():
                self.result = self.unit.impl(*args, **kwargs)
        return []

    def again(self, state: list[Any]) -> list[Any]:
        """Run on copies of what the first run changed; nothing that this run changes stays changed."""
        for i in range(len(self.externals.values)):
            self.externals.check(i, self.name)
        args, kwargs = self.arguments.again(state)
        state.clear()
        if self.state is None:
            self._run_again(args, kwargs)
        else:
            with self.state.in_place():
                self._run_again(args, kwargs)
        return []

    def _run_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # See Note [Buffers] in engine.py: the replay works on copies, the module keeps its own.
        module = self.unit.module
        owners = [(module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], n) for n in self.buffers]
        own = [swap_buffer(owner, key, self.buffers[name].clone()) for owner, key, name in owners]
        try:
            result = self.unit.impl(*args, **kwargs)
            if self.outputs is not None:
                self.outputs += [t.detach() for t in outputs_of(result)]
        finally:
            for (owner, key, _), buffer in zip(owners, own, strict=True):
                swap_buffer(owner, key, buffer)

    def settle(self) -> tuple[frozenset[str], bool]:
        """Drop the copies of buffers that no replay needs.

        **Returns:** the buffers that the unit changes as far as is known now, and whether a replay has a copy of each.
        """
        now = dict(self.unit.module.named_buffers())
        moved = {n for n, b in now.items() if self._buffer_versions.get(n, version_of(b)) != version_of(b)}
        if self.volatile is None:
            moved |= {n for n, old in self.buffers.items() if n.endswith(_STATISTICS) or _differs(old, now.get(n))}
        has_copies = moved <= self.buffers.keys()
        volatile = (self.volatile or frozenset()) | moved
        self.buffers = {n: t for n, t in self.buffers.items() if n in volatile}
        return volatile, has_copies

    def changed_argument(self) -> torch.Tensor | None:
        """Let go of the caller's tensors; return one that the first run changed in place, if there is one."""
        leaves, self.arguments.leaves = self.arguments.leaves, []
        pairs = zip(leaves, self._versions, strict=True)
        return next((t for t, version in pairs if version_of(t) != version), None)

    @property
    def buffer_storages(self) -> frozenset[int]:
        """The storages of the unit's buffers, which a first run may have changed after it saved them."""
        return frozenset(storage_key(b) for b in self.unit.module.buffers() if has_storage(b))

    @property
    def guard_bytes(self) -> int:
        """The copies of buffers that are kept so that a replay starts as the first run did."""
        return sum(t.nbytes for t in self.buffers.values())


def outputs_of(result: Any) -> Sequence[torch.Tensor]:
    """Return the tensors of a result."""
    return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def _differs(old: torch.Tensor, now: torch.Tensor | None) -> bool:
    return now is None or old.shape != now.shape or not torch.equal(old, now)
