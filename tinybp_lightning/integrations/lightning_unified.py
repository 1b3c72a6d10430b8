"""The HCB strategies of `lightning.pytorch`, which the import of this module registers there.

See Note [Two registries, separate trees] in `_shared.strategy`.
"""

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from tinybp_lightning.integrations._shared.step_log import StepLogMixin
from tinybp_lightning.integrations._shared.strategy import AutoMixin, ManyDevicesMixin, OneDeviceMixin, register_all

__all__ = ["HCBDDPStrategy", "HCBSingleDeviceStrategy", "HCBStepLog", "HCBStrategy"]


class HCBStepLog(StepLogMixin, Callback):
    """Logs each step's peak and recompute share; the strategies add it to the Trainer while fitting."""


class HCBSingleDeviceStrategy(OneDeviceMixin, SingleDeviceStrategy):
    """Height-compressed backpropagation on one device: `Trainer(strategy="hcb_single")`."""

    _step_log_type = HCBStepLog


class HCBDDPStrategy(ManyDevicesMixin, DDPStrategy):
    """Height-compressed backpropagation under `DistributedDataParallel`: `Trainer(strategy="hcb_ddp")`."""

    _step_log_type = HCBStepLog
    _ddp_strategy_type = DDPStrategy


class HCBStrategy(AutoMixin, SingleDeviceStrategy):
    """Height-compressed backpropagation on the devices the Trainer has: `Trainer(strategy="hcb")`.

    On several devices it becomes an `HCBDDPStrategy`, with `DDPStrategy`'s options, when the Trainer is built.
    """

    _step_log_type = HCBStepLog
    _many_devices_type = HCBDDPStrategy


# Here, so that every import registers: the import hook's, and that of a `class_path` or a pickle naming a class above.
register_all(StrategyRegistry, auto=HCBStrategy, single=HCBSingleDeviceStrategy, ddp=HCBDDPStrategy)
