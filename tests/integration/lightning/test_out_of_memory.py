"""Does a fit go on, bit for bit, when its steps run out of memory, and does the right error come when it cannot?"""

import importlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

from benchmarks.faults import Faults, Place
from tinybp_lightning.config import HCBConfig
from tinybp_lightning.runtime.torch.replay.engine import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*` ran out of device memory:tinybp_lightning.errors.HCBWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture
def faults() -> Iterator[Faults]:
    with Faults() as entered:
        yield entered


def sized(base: type[Any]) -> type[Any]:
    class Sized(base):
        """Has the batch size that the finder sets, and notes the sizes that it saw."""

        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.sizes: list[int] = []

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(batch))
            return super().loss(batch)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=self.batch_size)

    return Sized


def counting(base: type[Any]) -> type[Any]:
    class Counting(base):
        """Averages its loss over the epoch twice: by `self.log`, and in a metric of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()
            self.epochs: list[dict[str, torch.Tensor]] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
            out = self.net(batch)
            loss = out.float().square().mean()
            self.mean(loss.detach())
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return {"loss": loss, "out": out}

        def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, batch_idx: int) -> None:
            self.losses.append(outputs["loss"].clone())

        def on_train_epoch_end(self) -> None:
            self.epochs.append({name: self.trainer.callback_metrics[name].clone() for name in ("loss_step",)})
            self.epochs.append({"mean": self.mean.compute().clone()})

    return Counting


def arm_every_third(model: Any, faults: Faults, place: Place) -> None:
    """Arm `faults` as each third batch begins; in backward they strike half-way through the parameters."""
    model.net[4][0].weight.register_hook(faults.hook)

    def on_train_batch_start(batch: torch.Tensor, batch_idx: int) -> None:
        faults.disarm()
        if batch_idx % 3 == 2:
            faults.arm(place, after=0 if place is Place.BACKWARD else 1)

    model.on_train_batch_start = on_train_batch_start


CASES = {
    "forward": ({}, Place.FORWARD),
    "replay": ({}, Place.REPLAY),
    "backward": ({}, Place.BACKWARD),
    "forward, accumulation": ({"accumulate_grad_batches": 2}, Place.FORWARD),
    "backward, accumulation": ({"accumulate_grad_batches": 2}, Place.BACKWARD),
    "backward, clipping": ({"gradient_clip_val": 0.1}, Place.BACKWARD),
    "replay, bf16-mixed": ({"precision": "bf16-mixed"}, Place.REPLAY),
}


@pytest.mark.parametrize(("options", "place"), CASES.values(), ids=CASES)
def test_a_fit_loses_nothing(
    models: dict[str, Any],
    trainer_for: Callable[..., Any],
    batches: Any,
    strategy: Any,
    recorder: Any,
    faults: Faults,
    options: dict[str, Any],
    place: Place,
) -> None:
    trained: list[Any] = []
    for chosen in ("auto", strategy):
        model = counting(models["Model"])()
        if chosen is strategy:
            arm_every_third(model, faults, place)
        torch.manual_seed(2)
        trainer_for(chosen, **options).fit(model, batches(6))
        trained.append((model, torch.rand(4)))
    (plain, plain_drawn), (ours, drawn) = trained
    assert faults.num_raised == 4
    assert any(plan.reason == "out of memory" for plan in recorder.plans)
    assert len(ours.losses) == len(plain.losses) == 12
    assert all(torch.equal(*pair) for pair in zip(ours.losses, plain.losses, strict=True))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(drawn, plain_drawn)
    for found, expected in zip(ours.epochs, plain.epochs, strict=True):
        assert {n: v.item() for n, v in found.items()} == {n: v.item() for n, v in expected.items()}


def test_nothing_of_the_failed_run_is_alive_in_the_second(
    models: dict[str, Any],
    trainer_for: Callable[..., Any],
    batches: Any,
    strategy: Any,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop holds the failed run by its loss, and by what `training_step` returned beside it."""
    model = counting(models["Model"])()
    arm_every_third(model, faults, Place.BACKWARD)
    runs: list[weakref.ref[Run]] = []
    num_alive: list[int] = []
    original = Run.begin

    def begin(self: Run, root: list[object]) -> None:
        num_alive.append(sum(r() is not None for r in runs))
        runs.append(weakref.ref(self))
        original(self, root)

    monkeypatch.setattr(Run, "begin", begin)
    trainer_for(strategy, max_epochs=1).fit(model, batches(4))
    assert faults.num_raised == 1
    assert num_alive == [0] * 5


def test_the_first_error_is_raised_when_nothing_helps(
    models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, strategy: Any
) -> None:
    model = models["Model"]()
    errors: list[torch.OutOfMemoryError] = []

    def loss(batch: torch.Tensor) -> torch.Tensor:
        errors.append(torch.OutOfMemoryError(f"CUDA out of memory. Run {len(errors)}."))
        raise errors[-1]

    model.loss = loss
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer_for(strategy).fit(model, batches(3))
    assert caught.value is errors[0]
    assert len(errors) == 2
    assert "the step cannot be saved" in caught.value.__notes__[0]


def test_lightnings_batch_size_finder_recognises_the_error(
    pl: Any, models: dict[str, Any], trainer_for: Callable[..., Any], hcb: Any, tmp_path: Path
) -> None:
    """It doubles the batch until memory runs out, and then goes back."""

    class Limited(sized(models["Model"])):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            if len(batch) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            return super().loss(batch)

    tuner = importlib.import_module(f"{pl.__name__}.tuner")
    model = Limited()
    trainer = trainer_for(
        hcb.HCBStrategy(activation_budget="16MiB", executor="eager"), max_epochs=1, default_root_dir=tmp_path
    )
    found = tuner.Tuner(trainer).scale_batch_size(model, mode="power", steps_per_trial=2, max_trials=5)
    assert found == 8


def test_all_of_plain_training_is_enough_for_the_finders_smallest_batch(
    pl: Any, models: dict[str, Any], trainer_for: Callable[..., Any], hcb: Any, tmp_path: Path
) -> None:
    """A step so small that what the blocks' model leaves out is most of it."""

    tuner = importlib.import_module(f"{pl.__name__}.tuner")
    trainer = trainer_for(hcb.HCBStrategy(activation_budget="100%"), max_epochs=1, default_root_dir=tmp_path)
    model = sized(models["Model"])()
    found = tuner.Tuner(trainer).scale_batch_size(model, mode="power", steps_per_trial=4, max_trials=3)
    assert found == 8
    assert model.sizes == [2] * 4 + [4] * 4 + [8] * 4


def test_manual_optimization_is_never_run_again(
    models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, strategy: Any, faults: Faults
) -> None:
    model = models["Manual"]()
    arm_every_third(model, faults, Place.FORWARD)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer_for(strategy).fit(model, batches(3))
    assert faults.num_raised == 1
    assert "manual optimization steps the optimizer inside `training_step`" in caught.value.__notes__[0]


@pytest.mark.parametrize("place", [Place.FORWARD, Place.BACKWARD], ids=lambda place: place.value)
def test_raise_lets_the_error_pass(
    hcb: Any, models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, faults: Faults, place: Place
) -> None:
    model = models["Model"]()
    arm_every_third(model, faults, place)
    strategy = hcb.HCBStrategy(config=HCBConfig(activation_budget="60%", on_oom="raise"))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer_for(strategy).fit(model, batches(3))
    assert faults.num_raised == 1
    assert '`on_oom="raise"` was asked for' in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1


@pytest.fixture
def ends_process_group() -> Iterator[None]:
    """Lightning leaves the group to the process's end; later tests are not distributed."""
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("ends_process_group")
@pytest.mark.parametrize("place", [Place.FORWARD, Place.BACKWARD], ids=lambda place: place.value)
def test_a_synchronised_step_is_never_run_again(
    hcb: Any, models: dict[str, Any], trainer_for: Callable[..., Any], batches: Any, faults: Faults, place: Place
) -> None:
    """One process of `DistributedDataParallel` has the same reducer as many: a second backward would confuse it."""
    model = models["Model"]()
    arm_every_third(model, faults, place)
    strategy = hcb.HCBDDPStrategy(activation_budget="60%", executor="eager", process_group_backend="gloo")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer_for(strategy).fit(model, batches(3))
    assert faults.num_raised == 1
    assert "`DistributedDataParallel` synchronises backward" in caught.value.__notes__[0]
