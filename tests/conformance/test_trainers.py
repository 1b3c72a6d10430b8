"""The same training in other people's loops: Lightning, Accelerate and transformers' `Trainer`, stock, with `tbp.hcb`.

Lightning under our own strategy, and what it does with validation, checkpoints, profilers and several devices, is
compared in `tests/integration/lightning/test_same_training.py`; here `hcb` is called by hand, on parts of the model.
"""

import copy
import importlib
import re
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tinybp_lightning as tbp
from tests.conformance.lockstep import Recorder
from tests.conformance.nets import NETS, Net, batch
from tests.integration.lightning.conftest import Batches, base_model, models_by_optimisation
from tinybp_lightning.runtime.torch import targets

BUDGET = "70%"
Attach = Callable[[nn.Module], nn.Module]


@dataclass
class Trained:
    """What a training leaves behind, and what was seen of it on the way."""

    losses: list[Any] = field(default_factory=list)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)
    """Weights and buffers, the optimizers' state, and torch's generator."""

    def see_gradients(self, module: nn.Module) -> None:
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])

    def end(self, module: nn.Module, optimizers: Sequence[Any]) -> None:
        self.left = [module.state_dict(), [o.state_dict() for o in optimizers], torch.get_rng_state()]


def same_training(train: Callable[[Attach], Trained], *, kept: str | None = None, replays: bool = True) -> None:
    """Train plainly and under a budget, and compare all that both leave behind, bit for bit.

    **Arguments:** `train`: calls what it is given on each module that is to have a budget; `kept`: what a warning must
    say, without which none may be given; `replays`: whether blocks of each of these modules must be replayed.
    """
    recorders: list[Recorder] = []

    def attach(module: nn.Module) -> nn.Module:
        recorders.append(Recorder())
        return tbp.hcb(module, activation_budget=BUDGET, plan_cache=False, observers=[recorders[-1]])

    plain = train(lambda module: module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tbp.HCBWarning)
        ours = train(attach)
    said = [str(w.message) for w in caught if "cannot be traced as one graph" not in str(w.message)]
    assert len(plain.losses) > 2
    assert plain.gradients
    for name in ("losses", "gradients", "left"):
        assert_equal(name, getattr(plain, name), getattr(ours, name))
    assert said == [] if kept is None else any(re.search(kept, text) for text in said), said
    assert not replays or all(r.num_replayed for r in recorders), "not replayed, so not compared"


def assert_equal(name: str, wanted: Any, found: Any) -> None:
    (want, spec), (have, other) = tree_flatten(wanted), tree_flatten(found)
    assert spec == other
    for i, (a, b) in enumerate(zip(want, have, strict=True)):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f"{name}: leaf {i} differs"


# Lightning


def lightning(name: str, parts: Sequence[str], **options: Any) -> Callable[[Attach], Trained]:
    pl = importlib.import_module("lightning.pytorch")
    base = base_model(pl)
    cls = {cls.__name__: cls for cls in (base, *models_by_optimisation(base))}[name]

    def train(attach: Attach) -> Trained:
        seen = Trained()

        class Watched(cls):  # type: ignore[misc]
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                seen.see_gradients(self)

        model = Watched()
        for part in parts:
            attach(model.get_submodule(part))
        quiet = ("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "logger")
        trainer = pl.Trainer(**dict.fromkeys(quiet, False), accelerator="cpu", devices=1, max_epochs=1, **options)
        torch.manual_seed(2)
        trainer.fit(model, Batches(4))
        seen.losses = model.losses
        seen.end(model, trainer.optimizers)
        return seen

    return train


def test_lightning_automatic() -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    same_training(lightning("Model", ["net"], **options))


def test_lightning_manual() -> None:
    same_training(lightning("Manual", ["net"]))


# Dynamo in torch 2.13 reads `.grad` of a graph input that is no leaf: here, what the critic gets from the generator.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_lightning_two_optimizers() -> None:
    same_training(lightning("GAN", ["generator", "critic"]))


def test_a_lightning_module_that_calls_itself() -> None:
    same_training(lightning("OwnForward", [""]))


def test_a_lightning_module_that_calls_only_its_parts_says_that_its_budget_is_not_enforced() -> None:
    train = lightning("Model", [""])
    same_training(train, kept="is trained plainly, .* where it is not called itself", replays=False)


# Accelerate


@pytest.fixture(autouse=True)
def _an_accelerator_of_its_own() -> Generator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerator_for(precision: str) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of the first one would stay
    return Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("net", NETS)
def test_accelerate(net: str, precision: str, when: str) -> None:
    def train(attach: Attach) -> Trained:
        seen = Trained()
        torch.manual_seed(3)
        model: Any = NETS[net]()
        accelerator = accelerator_for(precision)
        if when == "before prepare":
            attach(model)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        if when == "after prepare":
            attach(model)
        for i in range(6):
            with accelerator.accumulate(model):
                loss = model(batch(i)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                seen.see_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
            seen.losses.append(loss.detach())
        seen.end(model, [optimizer])
        return seen

    same_training(train)


PREPARED = [("no", "before prepare"), ("bf16", "before prepare"), ("bf16", "after prepare")]


def loss_and_gradients(model: nn.Module, *, is_step: bool = False) -> list[Tensor]:
    """Return what one training step makes of the model, run by `tbp.run_step` or by hand."""
    torch.manual_seed(5)
    model.zero_grad()

    def compute_loss() -> Tensor:
        return model(batch(9)).square().mean()

    if is_step:
        loss = tbp.run_step(model, compute_loss)
    else:
        loss = compute_loss()
        loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def under_budget(model: nn.Module) -> nn.Module:
    return tbp.hcb(model, activation_budget=BUDGET, plan_cache=False)


def num_replayed(model: nn.Module) -> int:
    return sum(t.profile.replayed_blocks for t in targets(model) if t.profile is not None)


def prepared_pair(accelerator: Accelerator, when: str) -> list[Any]:
    """Return a plain model and one under a budget, prepared and trained for a step."""
    pair: list[Any] = []
    for attach in (lambda model: model, under_budget):
        torch.manual_seed(3)
        model: Any = Net(depth=2)
        if when == "before prepare":
            attach(model)
        model = accelerator.prepare(model)
        if when == "after prepare":
            attach(model)
        loss_and_gradients(model)
        pair.append(model)
    assert num_replayed(pair[1]) > 0
    return pair


@pytest.mark.parametrize(("precision", "when"), PREPARED)
def test_a_prepared_model_is_explained_stepped_and_restored(precision: str, when: str) -> None:
    plain, ours = prepared_pair(accelerator_for(precision), when)
    assert "plan for Net" in str(tbp.explain(ours))
    assert_equal("run_step", loss_and_gradients(plain), loss_and_gradients(ours, is_step=True))
    tbp.restore(ours)
    assert targets(ours) == ()
    assert_equal("restored", loss_and_gradients(plain), loss_and_gradients(ours))
    assert targets(ours) == ()


@pytest.mark.parametrize(("precision", "when"), PREPARED)
def test_a_copy_of_a_prepared_model_trains_its_own_weights(precision: str, when: str) -> None:
    pair = prepared_pair(accelerator_for(precision), when)
    plain, ours = (copy.deepcopy(model) for model in pair)
    for p in (*plain.parameters(), *ours.parameters()):
        p.data.mul_(0.5)
    assert_equal("copies", loss_and_gradients(plain), loss_and_gradients(ours))
    assert num_replayed(ours) > 0
    under_budget(ours)  # in place of the copied budget
    assert_equal("copies", loss_and_gradients(plain), loss_and_gradients(ours))
    assert num_replayed(ours) > 0
    assert_equal("originals", *map(loss_and_gradients, pair))


@pytest.mark.parametrize(("precision", "when"), PREPARED)
def test_a_prepared_model_is_unwrapped(precision: str, when: str) -> None:
    """In bf16, what the wrapper casts is no longer cast; a budget that was put around it comes off with it."""
    accelerator = accelerator_for(precision)
    pair = prepared_pair(accelerator, when)
    wrapped = loss_and_gradients(pair[0])
    plain, ours = (accelerator.unwrap_model(model, keep_fp32_wrapper=False) for model in pair)
    unwrapped = loss_and_gradients(plain)
    assert_equal("unwrapped", unwrapped, loss_and_gradients(ours))
    assert torch.equal(wrapped[0], unwrapped[0]) == (precision == "no")


# transformers

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=32,
        )
    ),
}


class Sequences(Dataset[dict[str, Tensor]]):
    """Random tokens, which are their own labels."""

    def __init__(self, length: int) -> None:
        self.tokens = torch.randint(0, 64, (length, 24), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


@pytest.mark.parametrize(
    ("net", "when", "options"),
    [
        ("gpt2", "before", {}),
        ("gpt2", "trainer.model", {"gradient_accumulation_steps": 2}),
        ("llama", "before", {"gradient_accumulation_steps": 2, "bf16": True}),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_transformers_trainer(tmp_path: Path, net: str, when: str, options: dict[str, Any]) -> None:
    def train(attach: Attach) -> Trained:
        seen = Trained()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(1)
        model: Any = CAUSAL[net]()

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                seen.see_gradients(model)

        if when == "before":
            attach(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Sequences(32),
            eval_dataset=Sequences(8),
            callbacks=[Watch()],
        )
        if when == "trainer.model":
            attach(trainer.model)
        trainer.train()
        names = ("loss", "grad_norm", "eval_loss")
        seen.losses = [log[name] for log in trainer.state.log_history for name in names if name in log]
        seen.end(model, [trainer.optimizer])
        return seen

    same_training(train)
