"""Add height-compressed backpropagation to a Lightning strategy, in either namespace.

The mixins attach in `setup`, detach in `teardown`, choose between one device and several, and log two values.

# Note [Two registries, separate trees]
`lightning.pytorch` and `pytorch_lightning` have separate classes and registries. Lightning chooses precision, sampler
and `no_sync` by `isinstance`, pickles strategies by name and reads `class_path` from YAML. So each namespace has
importable subclasses of its own (`lightning_unified`, `lightning_classic`), and this module holds what they share.
"""

import os
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn.parallel import DistributedDataParallel

from tinybp_lightning.config import CostsChoice, ExecutorChoice, HCBConfig, OnOomChoice
from tinybp_lightning.errors import ConfigError, HCBWarning
from tinybp_lightning.integrations._shared.settings import check_option_names, strategy_config
from tinybp_lightning.integrations._shared.step_log import StepLogMixin
from tinybp_lightning.runtime.profile import check_observers

if TYPE_CHECKING:
    import torch

    from tinybp_lightning.integrations._shared.owned_step import OwnedStep
    from tinybp_lightning.runtime.profile import Observer

    class _Strategy:
        """What the mixins use of the namespace's `Strategy`, which comes after them in the order of bases."""

        def __init__(self, **options: Any) -> None: ...
        @property
        def lightning_module(self) -> Any: ...
        @property
        def root_device(self) -> torch.device: ...
        def setup(self, trainer: Any) -> None: ...
        def training_step(self, *args: Any, **kwargs: Any) -> Any: ...
        def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any: ...
        def teardown(self) -> None: ...
        def _configure_launcher(self) -> None: ...
        def __getstate__(self) -> dict[str, Any]: ...
else:
    _Strategy = object

__all__ = ["AutoMixin", "HCBMixin", "ManyDevicesMixin", "OneDeviceMixin", "register_all"]


class HCBMixin(_Strategy):
    """Train under a byte budget: attach to the LightningModule while fitting, and detach afterwards.

    **Arguments:** the options of `HCBConfig`, singly or as one `config`. Without a budget among them,
    `HCB_MEMORY_BUDGET` or `HCB_ACTIVATION_BUDGET` from the environment gives it. `observers` are told of every plan and
    every step. All other options are those of the Lightning strategy.
    """

    _step_log_type: ClassVar[type[StepLogMixin]]

    def __init__(
        self,
        *,
        memory_budget: int | str | None = None,
        activation_budget: int | str | None = None,
        executor: ExecutorChoice = "auto",
        optimizer_state_bytes: int | None = None,
        on_oom: OnOomChoice = "replan",
        plan_cache: bool | str = True,
        check: bool = False,
        costs: CostsChoice = "seconds",
        observers: "Iterable[Observer]" = (),
        config: HCBConfig | None = None,
        **strategy_options: Any,
    ) -> None:
        self._hcb_config = strategy_config(locals(), environ=os.environ)
        is_many = isinstance(observers, Iterable) and not isinstance(observers, (str, bytes))
        check_observers(given := tuple(observers) if is_many else observers)
        self._hcb_observers = tuple(given)
        self._hcb_attachment: OwnedStep | None = None
        self._init_lightning(**strategy_options)

    def _init_lightning(self, **strategy_options: Any) -> None:
        super().__init__(**strategy_options)

    @property
    def hcb_config(self) -> HCBConfig:
        """The budget and the options of every fit with this strategy."""
        return self._hcb_config

    def setup(self, trainer: Any) -> None:
        """Set up as the Lightning strategy does, then attach if this is a fit."""
        super().setup(trainer)
        self._detach()
        # The enum of either namespace compares equal to its string.
        if trainer.state.fn != "fit" or _is_compiled(self.lightning_module):
            return
        # Here, so that evaluation does not load the engine.
        from tinybp_lightning.integrations._shared.owned_step import OwnedStep  # noqa: PLC0415
        from tinybp_lightning.runtime.torch import attach  # noqa: PLC0415

        step_log = self._step_log_type()
        observers = (*self._hcb_observers, step_log)
        # After `super`: DDP has wrapped the LightningModule, and the session acts on the modules inside it.
        session = attach(self.lightning_module, config=self._hcb_config, observers=observers, discover=True)
        self._hcb_attachment = OwnedStep(self, session, trainer, step_log)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's `training_step`, and once more if memory runs out and nothing is lost by that."""
        if self._hcb_attachment is None:
            return super().training_step(*args, **kwargs)
        return self._hcb_attachment.training_step(super().training_step, args, kwargs)

    def backward(self, closure_loss: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        """Run backward; if memory runs out, run forward and backward again."""
        if self._hcb_attachment is None:
            return super().backward(closure_loss, *args, **kwargs)
        return self._hcb_attachment.backward(super().backward, closure_loss, *args, **kwargs)

    def teardown(self) -> None:
        """Detach, then tear down as the Lightning strategy does. The Trainer also calls this after an exception."""
        try:
            self._detach()
        finally:
            super().teardown()

    def _detach(self) -> None:
        attachment, self._hcb_attachment = self._hcb_attachment, None
        if attachment is not None:
            attachment.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A session belongs to its process and its live module. A spawned child attaches its own in `setup`.
        return {**super().__getstate__(), "_hcb_attachment": None}


class ManyDevicesMixin(HCBMixin):
    """The HCB strategy over `DDPStrategy`. It checks the names of options, as Lightning does only in the first fit."""

    _ddp_strategy_type: ClassVar[type[Any]]

    @classmethod
    def check_options(cls, names: Iterable[str]) -> None:
        """Raise `ConfigError` for a name that neither Lightning's `DDPStrategy` nor torch's DDP accepts."""
        check_option_names(names, accepted_by=(cls._ddp_strategy_type, DistributedDataParallel))

    def _init_lightning(self, **strategy_options: Any) -> None:
        self.check_options(strategy_options)
        super()._init_lightning(**strategy_options)


class OneDeviceMixin(HCBMixin):
    """The HCB strategy on the one device that the Trainer was given, of any accelerator."""

    # Lightning tells a strategy its devices and nodes by setting these attributes where the class has them, as
    # parallel strategies do (`Trainer(strategy="single_device", accelerator="cuda")` stays on the CPU).
    parallel_devices: "list[torch.device] | None" = None
    num_nodes: int = 1

    @property
    def root_device(self) -> "torch.device":
        """The Trainer's device, or the CPU before there is a Trainer."""
        return self.parallel_devices[0] if self.parallel_devices else super().root_device

    @property
    def _num_processes(self) -> int:
        return len(self.parallel_devices or ()) * self.num_nodes

    def _configure_launcher(self) -> None:
        if self._num_processes > 1:
            raise ConfigError(
                f"`hcb_single` trains on one device, and the Trainer has `devices={len(self.parallel_devices or ())}` "
                f"and `num_nodes={self.num_nodes}`. Pass `devices=1`, or use `strategy='hcb'` or `'hcb_ddp'`."
            )
        super()._configure_launcher()


class AutoMixin(OneDeviceMixin):
    """`strategy="hcb"`: train one device as it is and several with DDP, as Lightning's own `"auto"` chooses.

    `_configure_launcher`, the Trainer's last call while it is built, makes the choice by changing the object's class. A
    proxy would fail the `isinstance` checks of the Note above, and DDP on one device would change the order of the
    data.
    """

    _many_devices_type: ClassVar[type[ManyDevicesMixin]]

    cluster_environment: Any = None
    _layer_sync: Any = None

    def _init_lightning(
        self,
        *,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        parallel_devices: "list[torch.device] | None" = None,
        cluster_environment: Any = None,
        **ddp_options: Any,
    ) -> None:
        super()._init_lightning(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._many_devices_type.check_options(ddp_options)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self._ddp_options = ddp_options

    def _configure_launcher(self) -> None:
        if self._num_processes <= 1:
            super()._configure_launcher()
            return
        if "_many_devices_type" not in vars(type(self)):
            raise ConfigError(
                f"`{type(self).__name__}` cannot choose between one device and several: it subclasses `HCBStrategy`. "
                f"Subclass `HCBSingleDeviceStrategy` or `{self._many_devices_type.__name__}`."
            )
        # Lightning's "auto" forks in a notebook, where there is no script to start again.
        start_method = {"start_method": "fork"} if hasattr(sys, "ps1") else {}
        num_nodes, layer_sync = self.num_nodes, self._layer_sync
        told: dict[str, Any] = dict(vars(self))  # all that the Trainer has set so far
        ddp: Any = self
        vars(self).clear()
        ddp.__class__ = self._many_devices_type
        ddp.__init__(
            config=told["_hcb_config"],
            observers=told["_hcb_observers"],
            accelerator=told["_accelerator"],
            checkpoint_io=told["_checkpoint_io"],
            precision_plugin=told["_precision_plugin"],
            parallel_devices=told["parallel_devices"],
            cluster_environment=told["cluster_environment"],
            **{**start_method, **told["_ddp_options"]},
        )
        ddp.num_nodes = num_nodes
        ddp._layer_sync = layer_sync
        ddp.set_world_ranks()
        ddp._configure_launcher()


def register_all(registry: Any, *, auto: type[Any], single: type[Any], ddp: type[Any]) -> None:
    """Register the strategies of one namespace under Lightning's names (`ddp`, `ddp_spawn`, …) with `hcb` in front.

    **Raises:** `ConfigError` when a name is taken by another class.
    """
    entries: tuple[tuple[str, type[Any], dict[str, Any]], ...] = (
        ("hcb", auto, {}),
        ("hcb_single", single, {}),
        ("hcb_ddp", ddp, {"start_method": "popen"}),
        ("hcb_ddp_find_unused_parameters_true", ddp, {"find_unused_parameters": True, "start_method": "popen"}),
        ("hcb_ddp_spawn", ddp, {"start_method": "spawn"}),
        ("hcb_ddp_notebook", ddp, {"start_method": "fork"}),
    )
    for name, strategy, _ in entries:
        if name in registry and (found := registry[name]["strategy"]) is not strategy:
            raise ConfigError(f"the strategy name `{name}` is taken by `{found!r}`; expected it to be free.")
    for name, strategy, options in entries:
        if name not in registry:
            registry.register(name, strategy, description=(strategy.__doc__ or "").partition("\n")[0], **options)


def _is_compiled(lightning_module: Any) -> bool:
    """Return whether the user compiled the LightningModule as a whole; warn that it then trains without a plan."""
    if getattr(lightning_module, "_compiler_ctx", None) is None:
        return False
    message = (
        f"`{type(lightning_module).__name__}` went through `torch.compile` and trains as compiled, without "
        "height-compressed backpropagation. Pass it uncompiled and choose `executor='inductor'`."
    )
    warnings.warn(message, HCBWarning, stacklevel=2)
    return True
