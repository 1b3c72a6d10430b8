"""When does the strategy attach and detach, what does it choose, and what does it log? The engine is a stand-in."""

import csv
import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tinybp_lightning.runtime.torch
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.errors import ConfigError, HCBWarning
from tinybp_lightning.integrations._shared.import_hook import ADAPTERS, Adapter
from tinybp_lightning.runtime.profile import StepProfile

# Lightning 2.6's combined loader asks torch's tree module a question that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")

MIB = 2**20
QUIET = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False, "logger": False}


@dataclass
class Session:
    """Reports one profile of `step` MiB for every backward, and remembers how it was attached."""

    root: nn.Module
    config: HCBConfig
    observers: tuple[Any, ...]
    discover: bool
    events: list[str]
    steps: int = 0
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events.append("attach")
        (first, *_) = self.root.parameters()
        self.handles.append(first.register_post_accumulate_grad_hook(self.finish_step))

    def finish_step(self, _: nn.Parameter) -> None:
        self.steps += 1
        profile = StepProfile(
            target="Model",
            step=self.steps,
            predicted_peak_bytes=self.steps * MIB,
            measured_peak_bytes=None,
            replayed_blocks=1,
            advanced_blocks=0,
            out_of_order_blocks=0,
            replay_s=1.0,
            step_s=4.0,
            plan_summary="",
        )
        for observer in self.observers:
            observer.on_replay(profile)

    def detach(self) -> None:
        self.events.append("detach")
        for handle in self.handles:
            handle.remove()


@dataclass
class Engine:
    """What `attach` was asked for."""

    sessions: list[Session] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def attach(self, root: nn.Module, *, config: HCBConfig, observers: Any = (), discover: bool = False) -> Session:
        session = Session(root, config, tuple(observers), discover, self.events)
        self.sessions.append(session)
        return session


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(tinybp_lightning.runtime.torch, "attach", engine.attach)
    return engine


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.package)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return request.param


@pytest.fixture
def pl(adapter: Adapter) -> ModuleType:
    return importlib.import_module(adapter.package)


@pytest.fixture
def hcb(adapter: Adapter) -> ModuleType:
    return importlib.import_module(adapter.module)


@pytest.fixture
def model(pl: ModuleType) -> Any:
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.fail = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if self.fail:
                raise RuntimeError("injected")
            loss = self.net(batch).square().mean()
            self.log("loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val", self.net(batch).mean(), batch_size=len(batch))

        def on_train_batch_end(self, *_: Any) -> None:
            self.log("mine", 1.0, on_step=True, on_epoch=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model()


class Batches:
    """Plain iterables are loaders too, and need no filter for a warning about worker processes."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((2, 4), float(index)) for index in range(self.length))


BATCHES, ONE_BATCH = Batches(4), Batches(1)


def trainer_for(pl: ModuleType, strategy: Any, **options: Any) -> Any:
    return pl.Trainer(**{**QUIET, "accelerator": "cpu", "devices": 1, "max_epochs": 1, **options}, strategy=strategy)


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        ("hcb", {"devices": 1}, "HCBStrategy"),
        ("hcb", {"devices": 2}, "HCBDDPStrategy"),
        ("hcb", {"devices": 1, "num_nodes": 2}, "HCBDDPStrategy"),
        ("hcb_single", {"devices": 1}, "HCBSingleDeviceStrategy"),
        ("hcb_ddp", {"devices": 1}, "HCBDDPStrategy"),
        ("hcb_ddp_find_unused_parameters_true", {"devices": 2}, "HCBDDPStrategy"),
        ("hcb_ddp_spawn", {"devices": 2}, "HCBDDPStrategy"),
        ("hcb_ddp_notebook", {"devices": 2}, "HCBDDPStrategy"),
    ],
)
def test_the_name_and_the_devices_choose_the_class(
    pl: ModuleType, hcb: ModuleType, strategy: str, options: dict[str, int], expected: str
) -> None:
    trainer = trainer_for(pl, strategy, **options)
    ddp = expected == "HCBDDPStrategy"
    assert type(trainer.strategy) is getattr(hcb, expected)
    assert isinstance(trainer.strategy, pl.strategies.DDPStrategy if ddp else pl.strategies.SingleDeviceStrategy)
    assert trainer._accelerator_connector.is_distributed is ddp
    assert trainer.world_size == options.get("devices", 1) * options.get("num_nodes", 1)
    assert trainer.strategy.root_device == torch.device("cpu")


def test_auto_hands_everything_it_was_given_and_told_to_ddp(pl: ModuleType, hcb: ModuleType) -> None:
    observer = SimpleNamespace(on_plan=print, on_replay=print)
    strategy = hcb.HCBStrategy(
        activation_budget="30%",
        executor="eager",
        check=True,
        observers=[observer],
        find_unused_parameters=True,
        process_group_backend="gloo",
        start_method="spawn",
    )
    trainer = trainer_for(pl, strategy, devices=2, num_nodes=3, sync_batchnorm=True, precision="bf16-mixed")
    assert trainer.strategy is strategy
    assert strategy.hcb_config == HCBConfig(None, "30%", executor="eager", check=True)
    assert strategy._hcb_observers == (observer,)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert strategy.process_group_backend == "gloo"
    assert strategy._start_method == "spawn"
    assert (strategy.num_processes, strategy.num_nodes, strategy.world_size) == (2, 3, 6)
    assert strategy._layer_sync is not None
    assert strategy.accelerator is trainer.accelerator
    assert strategy.precision_plugin is trainer.precision_plugin
    assert strategy.precision_plugin.precision == "bf16-mixed"
    plain = trainer_for(pl, "ddp", devices=2)
    assert vars(strategy).keys() - vars(plain.strategy).keys() == {
        "_hcb_attachment",
        "_hcb_config",
        "_hcb_observers",
    }


def test_auto_forks_in_a_notebook_as_lightnings_own_auto_does(
    pl: ModuleType, hcb: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert trainer_for(pl, hcb.HCBStrategy(), devices=2).strategy._start_method == "fork"
    assert trainer_for(pl, hcb.HCBStrategy(start_method="spawn"), devices=2).strategy._start_method == "spawn"


@pytest.mark.parametrize("options", [{"devices": 2}, {"num_nodes": 2}], ids=str)
def test_hcb_single_refuses_more_than_one_process(pl: ModuleType, hcb: ModuleType, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="`hcb_single` trains on one device"):
        trainer_for(pl, "hcb_single", **options)


def test_a_subclass_of_auto_chooses_nothing(pl: ModuleType, hcb: ModuleType) -> None:
    class Mine(hcb.HCBStrategy): ...

    assert type(trainer_for(pl, Mine()).strategy) is Mine
    with pytest.raises(ConfigError, match="`Mine` cannot choose"):
        trainer_for(pl, Mine(), devices=2)


@pytest.mark.parametrize("name", ["HCBStrategy", "HCBDDPStrategy"])
def test_a_mistyped_option_is_refused(hcb: ModuleType, name: str) -> None:
    with pytest.raises(ConfigError, match=r"`memroy_budget` is not an option.*Did you mean `memory_budget`"):
        getattr(hcb, name)(memroy_budget="2GiB")


@pytest.mark.parametrize("name", ["HCBStrategy", "HCBSingleDeviceStrategy", "HCBDDPStrategy"])
def test_classes_and_unused_strategies_pickle_by_name(hcb: ModuleType, name: str) -> None:
    cls = getattr(hcb, name)
    assert pickle.loads(pickle.dumps(cls)) is cls
    copied = pickle.loads(pickle.dumps(cls(activation_budget="30%")))
    assert type(copied) is cls
    assert copied.hcb_config.activation_budget == "30%"


def test_a_fit_attaches_after_setup_and_detaches_before_teardown(
    pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = type("Quiet", (), {"on_plan": lambda *_: None, "on_replay": lambda *_: None})()
    trainer = trainer_for(pl, hcb.HCBStrategy(activation_budget="30%", observers=[observer]))
    callbacks = list(trainer.callbacks)
    for name in ("setup", "teardown"):
        original: Callable[..., None] = getattr(trainer.accelerator, name)

        def record(*args: Any, name: str = name, original: Callable[..., None] = original) -> None:
            engine.events.append(name)
            original(*args)

        monkeypatch.setattr(trainer.accelerator, name, record)
    trainer.fit(model, BATCHES, ONE_BATCH)
    (session,) = engine.sessions
    assert engine.events == ["setup", "attach", "detach", "teardown"]
    assert session.root is model
    assert session.config == trainer.strategy.hcb_config
    assert session.discover
    assert session.observers[0] is observer
    assert trainer.callbacks == callbacks


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_only_fitting_attaches(pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine, run: str) -> None:
    model.test_step = model.validation_step
    model.predict_step = lambda batch, batch_idx: model.net(batch)
    getattr(trainer_for(pl, "hcb"), run)(model, BATCHES)
    assert engine.events == []


def test_each_fit_has_its_own_session(pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine) -> None:
    trainer = trainer_for(pl, "hcb")
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, BATCHES, ONE_BATCH)
    assert engine.events == ["attach", "detach"] * 2
    assert [session.steps for session in engine.sessions] == [4, 4]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_training_step_detaches(
    pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine, error: type[BaseException]
) -> None:
    def training_step(batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        raise error("injected")

    model.training_step = training_step
    trainer = trainer_for(pl, "hcb")
    callbacks = list(trainer.callbacks)
    # Lightning ends an interrupted fit with `sys.exit(1)`.
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model, BATCHES, ONE_BATCH)
    assert engine.events == ["attach", "detach"]
    assert trainer.callbacks == callbacks


def test_a_failed_attach_is_raised_and_torn_down(
    pl: ModuleType, hcb: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach(*_: Any, **__: Any) -> None:
        raise ConfigError("no budget for this device")

    monkeypatch.setattr(tinybp_lightning.runtime.torch, "attach", attach)
    trainer = trainer_for(pl, "hcb")
    with pytest.raises(ConfigError, match="no budget for this device"):
        trainer.fit(model, BATCHES, ONE_BATCH)
    assert trainer.strategy._hcb_attachment is None


def test_a_live_session_is_not_pickled(pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine) -> None:
    trainer = trainer_for(pl, "hcb")
    states: list[dict[str, Any]] = []
    model.on_train_end = lambda: states.append(trainer.strategy.__getstate__())
    trainer.fit(model, BATCHES, ONE_BATCH)
    assert states[0]["_hcb_attachment"] is None
    assert engine.events == ["attach", "detach"]


def test_a_compiled_lightning_module_is_left_with_a_warning(
    pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine
) -> None:
    # `LightningModule.log` does not compile under torch 2.13.
    model.log = lambda *_, **__: None
    trainer = trainer_for(pl, "hcb")
    with pytest.warns(HCBWarning, match=r"`Model` went through `torch.compile`"):
        trainer.fit(torch.compile(model, backend="eager"), BATCHES, ONE_BATCH)
    assert engine.events == []


def rows(trainer: Any) -> list[dict[str, str]]:
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_logs_beside_the_users_metrics_at_the_users_pace(
    pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine, tmp_path: Path, every: int, accumulate: int
) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    logged: list[list[dict[str, str]]] = []
    for strategy in ("auto", "hcb"):
        model.load_state_dict(state)
        trainer = trainer_for(
            pl,
            strategy,
            logger=pl.loggers.CSVLogger(tmp_path, name=strategy),
            log_every_n_steps=every,
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(model, BATCHES, ONE_BATCH)
        logged.append(rows(trainer))
    plain, ours = logged
    added = [{key: row.pop(key) for key in ("hcb/peak_mib", "hcb/recompute_share")} for row in ours]
    assert ours == plain
    steps = range(every * accumulate, 4 + 1, every * accumulate)
    assert [row for row in added if row["hcb/peak_mib"]] == [
        {"hcb/peak_mib": str(float(step)), "hcb/recompute_share": "0.25"} for step in steps
    ]


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_the_bar_shows_the_step_that_just_ended(
    pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine, bar: str
) -> None:
    shown: list[dict[str, float]] = []
    bar_type: Any = getattr(pl.callbacks, bar)

    class Bar(bar_type):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            metrics = super().get_metrics(trainer, pl_module)
            shown.append(dict(metrics))
            return metrics

        def on_train_batch_end(self, *args: Any) -> None:
            shown.clear()
            super().on_train_batch_end(*args)
            assert shown[-1]["hcb/peak_mib"] == engine.sessions[0].steps
            assert shown[-1]["hcb/recompute_share"] == 0.25
            assert "loss" in shown[-1]

    trainer_for(pl, "hcb", callbacks=[Bar()], enable_progress_bar=True).fit(model, BATCHES, ONE_BATCH)
    assert shown


def test_the_log_leaves_checkpoints_without_a_trace(
    pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine, tmp_path: Path
) -> None:
    checkpoints: dict[str, dict[str, Any]] = {}
    for strategy in ("auto", "hcb"):
        trainer = trainer_for(
            pl, strategy, callbacks=[pl.callbacks.ModelCheckpoint(tmp_path / strategy)], enable_checkpointing=True
        )
        trainer.fit(model, BATCHES, ONE_BATCH)
        path = trainer.checkpoint_callback.best_model_path
        checkpoints[strategy] = torch.load(path, weights_only=False)
    assert list(checkpoints["hcb"]) == list(checkpoints["auto"])
    assert len(checkpoints["hcb"]["callbacks"]) == len(checkpoints["auto"]["callbacks"]) == 1
    assert list(checkpoints["hcb"]["state_dict"]) == list(checkpoints["auto"]["state_dict"])


def test_a_barebones_trainer_trains(pl: ModuleType, hcb: ModuleType, model: Any, engine: Engine) -> None:
    model.log = lambda *_, **__: None
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True, strategy="hcb")
    trainer.fit(model, BATCHES, ONE_BATCH)
    assert engine.events == ["attach", "detach"]
