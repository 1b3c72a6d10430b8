"""What does the HCB strategy add to a Lightning strategy, in either namespace?

The session's life in `setup` and `teardown`, one choice of device count, and one line in the progress bar and the
logger. Everything else stays Lightning's: checkpoints, precision, optimizers, validation and predict run its own code.

# Note [Two registries, separate trees]
`lightning.pytorch` and `pytorch_lightning` have separate classes and registries. Lightning chooses precision, sampler
and `no_sync` by `isinstance`, pickles strategies by name and reads `class_path` from YAML. So every namespace has real,
importable subclasses (`lightning_unified`, `lightning_classic`), and only what they share is here.
"""

import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch.nn.parallel import DistributedDataParallel

from tinybp_lightning.config import HCBConfig
from tinybp_lightning.errors import ConfigError, HCBWarning
from tinybp_lightning.integrations._settings import check_option_names, config_from
from tinybp_lightning.integrations._step_log import StepLogMixin
from tinybp_lightning.runtime.profile import check_observers

if TYPE_CHECKING:
    import torch

    from tinybp_lightning.integrations._owned_step import OwnedStep
    from tinybp_lightning.runtime.profile import Observer
    from tinybp_lightning.runtime.torch import Session

    class _Strategy:
        """What the mixins use of the namespace's `Strategy`, which follows them in every class's order."""

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

__all__ = ["AutoMixin", "HCBMixin", "ManyDevicesMixin", "OneDeviceMixin"]


@dataclass(frozen=True, slots=True)
class _Attachment:
    """What `setup` put in place and `teardown` takes away."""

    session: "Session"
    step: "OwnedStep"
    step_log: StepLogMixin
    trainer: Any

    def remove(self) -> None:
        if self.step_log in self.trainer.callbacks:
            self.trainer.callbacks.remove(self.step_log)
        self.session.detach()


class HCBMixin(_Strategy):
    """Train under a byte budget: attach to the LightningModule while fitting, and leave it as it was afterwards.

    **Arguments:** `memory_budget`: total device bytes of this process in a step (`"20GiB"`, `"80%"`, bytes, `"auto"`);
    `activation_budget`: activations alone (`"30%"` of what plain training keeps, or bytes). At most one of them; with
    neither, `HCB_MEMORY_BUDGET` or `HCB_ACTIVATION_BUDGET` from the environment, else `HCBConfig`'s default.
    `executor`: `"eager"`, `"inductor"` or `"auto"`. `on_oom`: `"replan"` runs a step that was out of memory again,
    under a tighter plan, on one device and in automatic optimization; `"raise"` lets the error pass. `check`: compare
    every replayed tensor with the forward's. `observers`: told of every plan and every step. `config`: a whole
    `HCBConfig` in place of the first five. All other options are the Lightning strategy's.

    **Raises:** `ConfigError` and `BudgetError` as `HCBConfig` does.
    """

    _step_log_type: ClassVar[type[StepLogMixin]]

    def __init__(
        self,
        *,
        memory_budget: int | str | None = None,
        activation_budget: int | str | None = None,
        executor: Literal["auto", "eager", "inductor"] = "auto",
        on_oom: Literal["replan", "raise"] = "replan",
        check: bool = False,
        observers: "Iterable[Observer]" = (),
        config: HCBConfig | None = None,
        **strategy_options: Any,
    ) -> None:
        self._init_lightning(**strategy_options)
        self._hcb_config = config_from(
            config,
            memory_budget=memory_budget,
            activation_budget=activation_budget,
            executor=executor,
            on_oom=on_oom,
            check=check,
            environ=os.environ,
        )
        is_many = isinstance(observers, Iterable) and not isinstance(observers, (str, bytes))
        check_observers(given := tuple(observers) if is_many else observers)
        self._hcb_observers = tuple(given)
        self._hcb_attachment: _Attachment | None = None

    def _init_lightning(self, **strategy_options: Any) -> None:
        super().__init__(**strategy_options)

    @property
    def hcb_config(self) -> HCBConfig:
        """The budget and options that every fit of this strategy plans under."""
        return self._hcb_config

    def setup(self, trainer: Any) -> None:
        """Set up as the Lightning strategy does, then attach if this is a fit."""
        super().setup(trainer)
        self._detach()
        # The enum of either namespace compares equal to its string.
        if trainer.state.fn != "fit" or _is_compiled(self.lightning_module):
            return
        # Evaluation does not load the engine.
        from tinybp_lightning.integrations._owned_step import OwnedStep  # noqa: PLC0415
        from tinybp_lightning.runtime.torch import attach  # noqa: PLC0415

        step_log = self._step_log_type()
        observers = (*self._hcb_observers, step_log)
        # After `super`: DDP has wrapped the LightningModule, and the session acts on the modules inside it.
        session = attach(self.lightning_module, config=self._hcb_config, observers=observers, discover=True)
        self._hcb_attachment = _Attachment(session, OwnedStep(self, session, trainer), step_log, trainer)
        trainer.callbacks.insert(0, step_log)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's `training_step`, again if memory runs out and nothing is lost by that."""
        if self._hcb_attachment is None:
            return super().training_step(*args, **kwargs)
        return self._hcb_attachment.step.training_step(super().training_step, args, kwargs)

    def backward(self, closure_loss: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        """Run backward; if memory runs out, forward and backward again."""
        if self._hcb_attachment is None:
            return super().backward(closure_loss, *args, **kwargs)
        return self._hcb_attachment.step.backward(super().backward, closure_loss, *args, **kwargs)

    def teardown(self) -> None:
        """Detach, then tear down as the Lightning strategy does; the Trainer calls this after an exception too."""
        try:
            self._detach()
        finally:
            super().teardown()

    def _detach(self) -> None:
        attachment, self._hcb_attachment = self._hcb_attachment, None
        if attachment is not None:
            attachment.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A session belongs to its process and its live module. Spawned children attach their own in `setup`.
        return {**super().__getstate__(), "_hcb_attachment": None}


class ManyDevicesMixin(HCBMixin):
    """The HCB strategy over `DDPStrategy`; its options are checked by name, which Lightning leaves to the first fit."""

    _ddp_strategy_type: ClassVar[type[Any]]

    @classmethod
    def check_options(cls, names: Iterable[str]) -> None:
        """Raise `ConfigError` for a name that neither Lightning's `DDPStrategy` nor torch's DDP takes."""
        check_option_names(names, accepted_by=(cls._ddp_strategy_type, DistributedDataParallel))

    def _init_lightning(self, **strategy_options: Any) -> None:
        self.check_options(strategy_options)
        super()._init_lightning(**strategy_options)


class OneDeviceMixin(HCBMixin):
    """The HCB strategy on the one device that the Trainer was given, of whatever accelerator.

    Lightning tells a parallel strategy its devices and nodes by setting these attributes, and hands a single-device one
    nothing (`Trainer(strategy="single_device", accelerator="cuda")` stays on the CPU). So they are taken here as well.
    """

    parallel_devices: "list[torch.device] | None" = None
    num_nodes: int = 1

    @property
    def root_device(self) -> "torch.device":
        """The Trainer's device; before there is a Trainer, the CPU."""
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
    """`strategy="hcb"`: one device stays as it is, several become `DDPStrategy`, as Lightning's own `"auto"` chooses.

    The choice falls in `_configure_launcher`, the Trainer's last call while it is built, when devices and nodes are
    known and nothing has asked for the strategy's type yet. It is a change of class: a proxy would fail the
    `isinstance` checks of the Note above, and always DDP would shard the sampler and change the order of the data.
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
        if self._num_processes > 1:
            self._become_ddp()
        else:
            super()._configure_launcher()

    def _become_ddp(self) -> None:
        """Turn this object into the DDP strategy and replay what the Trainer has told it so far."""
        if "_many_devices_type" not in vars(type(self)):
            raise ConfigError(
                f"`{type(self).__name__}` cannot choose between one device and several: it subclasses `HCBStrategy`. "
                f"Subclass `HCBSingleDeviceStrategy` or `{self._many_devices_type.__name__}`."
            )
        told: dict[str, Any] = dict(vars(self))
        # Lightning's "auto" forks in a notebook, where a script cannot be started again.
        start_method = {"start_method": "fork"} if hasattr(sys, "ps1") else {}
        num_nodes, layer_sync = self.num_nodes, self._layer_sync
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


def _is_compiled(lightning_module: Any) -> bool:
    """Say whether the user compiled the LightningModule as a whole, and warn that it is then left as it is."""
    if getattr(lightning_module, "_compiler_ctx", None) is None:
        return False
    warnings.warn(
        f"`{type(lightning_module).__name__}` went through `torch.compile` and trains as compiled, without "
        "height-compressed backpropagation: its `training_step` is one compiled function. Pass it uncompiled and "
        "choose `executor='inductor'`.",
        HCBWarning,
        stacklevel=2,
    )
    return True
