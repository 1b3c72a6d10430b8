"""Do the command line, spawned processes and the public name reach the same strategies?"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tinybp_lightning import integrations
from tinybp_lightning.integrations._shared.import_hook import Adapter

ROOT = Path(integrations.__file__).parents[2]

SCRIPT = """
import importlib, json, os, sys
import torch
from torch import nn
import tinybp_lightning

pl = importlib.import_module({package!r})
hcb = importlib.import_module({module!r})

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        blocks = [
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
            for _ in range(8)
        ]
        self.net = nn.Sequential(*blocks)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.losses.append(loss.item().hex())
        return loss

    def on_fit_end(self):
        # A spawned child does not return to the caller: it writes what it saw.
        rank = self.trainer.global_rank
        with open(os.path.join({folder!r}, f"{{self.run}}-{{rank}}.json"), "w") as file:
            json.dump({{
                "losses": self.losses,
                "weights": [value.double().sum().item().hex() for value in self.state_dict().values()],
                "replayed": sum(profile.replayed_blocks for profile in PROFILES),
                "sampler": type(self.trainer.train_dataloader.sampler).__name__,
                "strategy": type(self.trainer.strategy).__name__,
            }}, file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

PROFILES = []

class Recorder:
    def on_plan(self, plan): ...
    def on_replay(self, profile): PROFILES.append(profile)

def fit(run, strategy):
    PROFILES.clear()
    data = torch.randn(512, 16, generator=torch.Generator().manual_seed(3))
    loader = torch.utils.data.DataLoader(data, batch_size=64)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    model = Model()
    model.run = run
    torch.manual_seed(2 + trainer.global_rank)
    trainer.fit(model, loader)

if __name__ == "__main__":
    torch.set_num_threads(1)
    fit("plain", pl.strategies.DDPStrategy(process_group_backend="gloo", start_method={start_method!r}))
    fit("hcb", hcb.{strategy}(
        activation_budget="70%", executor="eager", process_group_backend="gloo", start_method={start_method!r},
        observers=[Recorder()],
    ))
"""


@pytest.mark.parametrize(
    ("strategy", "start_method"),
    [("HCBStrategy", "popen"), pytest.param("HCBDDPStrategy", "spawn", marks=pytest.mark.slow)],
)
def test_two_processes_on_gloo(
    hcb: ModuleType, pl: ModuleType, tmp_path: Path, strategy: str, start_method: str
) -> None:
    script = tmp_path / "train.py"
    options = {"folder": str(tmp_path), "strategy": strategy, "start_method": start_method}
    script.write_text(SCRIPT.format(package=pl.__name__, module=hcb.__name__, **options))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr
    runs = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(runs) == ["hcb-0", "hcb-1", "plain-0", "plain-1"]
    for rank in ("0", "1"):
        ours, plain = runs[f"hcb-{rank}"], runs[f"plain-{rank}"]
        assert ours["losses"] == plain["losses"]
        assert len(ours["losses"]) == 8
        assert ours["weights"] == plain["weights"]
        assert ours["sampler"] == plain["sampler"] == "DistributedSampler"
        assert ours["strategy"] == "HCBDDPStrategy"
        assert ours["replayed"] > 0
    assert runs["hcb-0"]["losses"] != runs["hcb-1"]["losses"]


PLAIN_CLI: dict[str, Any] = {"save_config_callback": None, "seed_everything_default": 1}


# Lightning 2.6's command line calls jsonargparse by a name that 4.53 deprecates.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("hcb", "HCBStrategy"),
        ("hcb_single", "HCBSingleDeviceStrategy"),
        ({"class_path": "tinybp_lightning.HCBStrategy"}, "HCBStrategy"),
        (
            {
                "class_path": "tinybp_lightning.HCBStrategy",
                "init_args": {"activation_budget": "60%", "executor": "eager"},
                "dict_kwargs": {"find_unused_parameters": True},
            },
            "HCBStrategy",
        ),
        (
            {
                "class_path": "tinybp_lightning.HCBStrategy",
                "init_args": {"config": {"activation_budget": "60%", "plan_cache": False, "costs": "operations"}},
            },
            "HCBStrategy",
        ),
    ],
    ids=["name", "single", "class_path", "init_args", "config"],
)
def test_lightning_cli(
    adapter: Adapter,
    pl: ModuleType,
    hcb: ModuleType,
    models: dict[str, Any],
    batches: Any,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    strategy: Any,
    expected: str,
) -> None:
    # Both Lightnings are imported in this process; a program has one.
    monkeypatch.setattr(integrations, "ADAPTERS", (adapter,))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HCB_ACTIVATION_BUDGET", "60%")
    cli = importlib.import_module(f"{pl.__name__}.cli")

    class Model(models["Model"]):
        def train_dataloader(self) -> Any:
            return batches(2)

    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "strategy": strategy,
    }
    made = cli.LightningCLI(Model, args={"fit": {"trainer": settings}, "subcommand": "fit"}, **PLAIN_CLI)
    assert type(made.trainer.strategy) is getattr(hcb, expected)
    assert made.trainer.strategy.hcb_config.activation_budget == "60%"
    assert len(made.model.losses) == 2
    assert 0 < made.trainer.progress_bar_metrics["hcb/recompute_share"] < 1


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("name", "text", "value", "wrong"),
    [
        ("memory_budget", "20GiB", "20GiB", "[1]"),
        ("activation_budget", "4096", 4096, "[1]"),
        ("executor", "eager", "eager", "fast"),
        ("optimizer_state_bytes", "0", 0, "many"),
        ("on_oom", "raise", "raise", "retry"),
        ("plan_cache", "false", False, "[1]"),
        ("check", "true", True, "perhaps"),
        ("costs", "operations", "operations", "flops"),
    ],
)
def test_lightning_cli_knows_the_type_of_every_option(
    adapter: Adapter,
    pl: ModuleType,
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    value: Any,
    wrong: str,
) -> None:
    monkeypatch.setattr(integrations, "ADAPTERS", (adapter,))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = importlib.import_module(f"{pl.__name__}.cli")
    trainer = {"strategy": "tinybp_lightning.HCBStrategy", "accelerator": "cpu", "devices": 1, "logger": "false"}
    path = [f"--trainer.{key}={setting}" for key, setting in trainer.items()]
    option = f"--trainer.strategy.init_args.{name}"
    made = cli.LightningCLI(models["Model"], args=[*path, f"{option}={text}"], run=False, **PLAIN_CLI)
    assert getattr(made.trainer.strategy.hcb_config, name) == value
    with pytest.raises(SystemExit):
        cli.LightningCLI(models["Model"], args=[*path, f"{option}={wrong}"], run=False, **PLAIN_CLI)
    assert name in capsys.readouterr().err
