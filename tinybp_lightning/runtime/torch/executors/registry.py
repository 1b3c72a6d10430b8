"""Find the executor that the user named. A new executor is one file, one line here, and its name in `config`."""

from collections.abc import Mapping

from tinybp_lightning.runtime.torch.executors.eager import EagerExecutor
from tinybp_lightning.runtime.torch.executors.executor import Executor
from tinybp_lightning.runtime.torch.executors.inductor import InductorExecutor

__all__ = ["EXECUTORS", "executor_of"]

EXECUTORS: Mapping[str, Executor] = {
    "auto": EagerExecutor(),
    "eager": EagerExecutor(),
    "inductor": InductorExecutor(),
}


def executor_of(name: str) -> Executor:
    """Return the executor called `name`, which `HCBConfig` has checked."""
    return EXECUTORS[name]
