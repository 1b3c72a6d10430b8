"""What runs a block: the user's own kernels, or Inductor's, behind one protocol."""

from collections.abc import Mapping

from tinybp_lightning.runtime.torch.executors.eager import EagerExecutor
from tinybp_lightning.runtime.torch.executors.executor import Executor
from tinybp_lightning.runtime.torch.executors.inductor import InductorExecutor

__all__ = ["EXECUTORS"]

EXECUTORS: Mapping[str, Executor] = {"auto": EagerExecutor(), "eager": EagerExecutor(), "inductor": InductorExecutor()}
