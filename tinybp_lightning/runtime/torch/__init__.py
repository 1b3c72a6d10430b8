"""The torch backend: attach to a module, trace it, measure it, replay it."""

from tinybp_lightning.runtime.torch.keep import keep
from tinybp_lightning.runtime.torch.oom import run_step
from tinybp_lightning.runtime.torch.session import Session, attach, hcb, restore, targets

__all__ = ["Session", "attach", "hcb", "keep", "restore", "run_step", "targets"]
