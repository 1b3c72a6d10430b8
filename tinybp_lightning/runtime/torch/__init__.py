"""The torch backend: attach to a module, trace it, measure it, replay it."""

from tinybp_lightning.runtime.torch.api import Session, attach, hcb, restore, targets
from tinybp_lightning.runtime.torch.kept_modules import keep
from tinybp_lightning.runtime.torch.recovery.oom import run_step

__all__ = ["Session", "attach", "hcb", "keep", "restore", "run_step", "targets"]
