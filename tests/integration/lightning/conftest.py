"""Real Trainer runs, in both Lightning namespaces, under the plain strategy and under `hcb`."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError

from tinybp_lightning.integrations._import_hook import ADAPTERS, Adapter
from tinybp_lightning.runtime.profile import PlanReport, StepProfile

WIDTH = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Lightning 2.6's combined loader asks torch's tree module a question that torch 2.13 deprecates.
    ignore = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
    for item in items:
        if item.path.parent.name == "lightning":
            item.add_marker(ignore)


class Batches:
    """Plain iterables are loaders too, and need no filter for a warning about worker processes."""

    def __init__(self, length: int, *, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(7)
        self.batches = list(torch.randn(length, 64, width, generator=generator))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)


def network() -> nn.Sequential:
    """Eight blocks with something to save, to draw and, in BatchNorm, to update."""
    blocks = [
        nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))
        for _ in range(8)
    ]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 1))


@dataclass
class Recorder:
    """An observer: what the engine planned and replayed."""

    plans: list[PlanReport] = field(default_factory=list)
    profiles: list[StepProfile] = field(default_factory=list)

    def on_plan(self, plan: PlanReport) -> None:
        self.plans.append(plan)

    def on_replay(self, profile: StepProfile) -> None:
        self.profiles.append(profile)

    @property
    def num_replayed(self) -> int:
        return sum(profile.replayed_blocks for profile in self.profiles)


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
def batches() -> type[Batches]:
    return Batches


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def strategy(hcb: ModuleType, recorder: Recorder) -> Any:
    """HCB at 60 % of what plain training allocates: some blocks are replayed in every step."""
    return hcb.HCBStrategy(activation_budget="60%", executor="eager", observers=[recorder])


@pytest.fixture
def trainer_for(pl: ModuleType) -> Callable[..., Any]:
    def make(strategy: Any, **options: Any) -> Any:
        quiet = {
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
        }
        return pl.Trainer(
            **{**quiet, "accelerator": "cpu", "devices": 1, "max_epochs": 2, **options}, strategy=strategy
        )

    return make


@pytest.fixture
def models(pl: ModuleType) -> dict[str, type[Any]]:
    """LightningModules by name; each keeps its losses."""
    base = base_model(pl)
    return {cls.__name__: cls for cls in (base, *models_by_optimisation(base), *models_by_composition(base))}


def base_model(pl: ModuleType) -> type[Any]:
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = network()
            self.losses: list[torch.Tensor] = []

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self.net(batch).float().square().mean()
            self.losses.append(loss.detach().clone())
            return loss

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("loss", loss, prog_bar=True)
            return loss

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Model


def models_by_optimisation(base: type[Any]) -> tuple[type[Any], ...]:
    class OwnForward(base):
        """Calls itself, so that the LightningModule is the target."""

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.net(batch).float().square().mean()

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self(batch)
            self.losses.append(loss.detach().clone())
            return loss

    class Validated(base):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val", self.net(batch).mean(), batch_size=len(batch))

    class Manual(base):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for part in batch.chunk(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(part))
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()

    class GAN(base):
        """Two networks, two optimizers, and `toggle_optimizer` switching `requires_grad` in every step."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = nn.Sequential(network(), nn.Linear(1, WIDTH)), network()
            del self.net

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for_generator, for_critic = self.optimizers()
            self.toggle_optimizer(for_generator)
            self.descend(for_generator, -self.critic(self.generator(batch)).mean())
            self.untoggle_optimizer(for_generator)
            self.toggle_optimizer(for_critic)
            fake = self.generator(batch).detach()
            self.descend(for_critic, self.critic(fake).mean() - self.critic(batch).mean())
            self.untoggle_optimizer(for_critic)

        def descend(self, optimizer: Any, loss: torch.Tensor) -> None:
            self.losses.append(loss.detach().clone())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (self.generator, self.critic)]

    return OwnForward, Validated, Manual, GAN


def models_by_composition(base: type[Any]) -> tuple[type[Any], ...]:
    class Parts(base):
        """Two networks called in turn, with the user's own code between them."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = network()[:4], network()
            del self.net

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            code = self.encoder(batch)
            loss = self.decoder(code + 0.1 * torch.randn_like(code)).square().mean()
            self.losses.append(loss.detach().clone())
            return loss

    class StepMeasurement(base):
        """A loss and a metric that are modules without parameters: nothing to plan there."""

        def __init__(self) -> None:
            super().__init__()
            self.mse, self.metric = nn.MSELoss(), MeanSquaredError()

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            out = self.net(batch)
            loss = self.mse(out, torch.zeros_like(out))
            self.metric(out.detach(), torch.zeros_like(out))
            self.log("mse", self.metric, on_step=True, on_epoch=True)
            self.losses.append(loss.detach().clone())
            return loss

    class Distilled(base):
        """A frozen teacher, called with gradients enabled: it has no backward."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher = network().requires_grad_(False)

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            loss = (self.net(batch) - self.teacher(batch)).square().mean()
            self.losses.append(loss.detach().clone())
            return loss

    return Parts, StepMeasurement, Distilled
