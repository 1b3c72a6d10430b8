"""Find the executor that the user named. A new executor is one file and one line here (and its name in `config`)."""

from tinybp_lightning.config import ExecutorName
from tinybp_lightning.runtime.torch.executors.eager import EagerExecutor
from tinybp_lightning.runtime.torch.executors.executor import Executor
from tinybp_lightning.runtime.torch.executors.inductor import InductorExecutor

__all__ = ["executor_of"]

_EXECUTORS: dict[ExecutorName, Executor] = {
    ExecutorName.AUTO: EagerExecutor(),
    ExecutorName.EAGER: EagerExecutor(),
    ExecutorName.INDUCTOR: InductorExecutor(),
}


def executor_of(name: ExecutorName) -> Executor:
    """Return the executor called `name`; `auto` is eager."""
    return _EXECUTORS[name]
