"""How were the kept chains made? One training step of each recipe model; `python -m benchmarks.chains.capture --help`.

Bytes come from the allocator's events and are the same on every run. Seconds are measured on the CPU once for each
different block, and rounded to two significant digits: what counts is that blocks of a real network differ in the
proportions that real blocks do. Blocks are those for tight budgets: with room for the results of products, short
networks are cut finer.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import tinybp_lightning as tbp
from benchmarks.chains import chain_to_json
from recipes.config import Architecture, ModelConfig, ModelName, ResNetShape, Shape, TransformerShape, UNetShape
from recipes.data import make_batches
from recipes.models import build_workload
from tinybp_lightning.graph import Block, Chain

__all__ = ["main"]


def _llama(num_layers: int) -> tuple[ModelConfig, Shape]:
    shape = TransformerShape(
        batch_size=2, num_tokens=128, hidden_size=64, intermediate_size=172, num_layers=num_layers, num_heads=4
    )
    return ModelConfig(ModelName.transformer, Architecture.llama), shape


def _gpt2(num_layers: int) -> tuple[ModelConfig, Shape]:
    shape = TransformerShape(
        batch_size=2, num_tokens=128, hidden_size=64, intermediate_size=256, num_layers=num_layers, num_heads=4
    )
    return ModelConfig(ModelName.transformer, Architecture.gpt2, dropout=0.1), shape


def _resnet() -> tuple[ModelConfig, Shape]:
    return ModelConfig(ModelName.resnet, Architecture.resnet), ResNetShape(
        batch_size=4, image_size=64, depths=[3, 8, 36, 3]
    )


def _unet(*, is_medium: bool) -> tuple[ModelConfig, Shape]:
    # Levels, attention and skips are those of conf/shape/unet_small and unet_medium; the medium one has a quarter of
    # the channels, and a quarter of the picture's edge twice over its depth.
    small = UNetShape(batch_size=8, image_size=32, channels=[32, 64, 64], attention=[2], norm_num_groups=8)
    channels = [32, 32, 64, 64, 128, 128]
    medium = UNetShape(batch_size=2, image_size=64, channels=channels, attention=[4], norm_num_groups=8)
    return ModelConfig(ModelName.unet, Architecture.unet), medium if is_medium else small


_MODELS: dict[str, Callable[[], tuple[ModelConfig, Shape]]] = {
    "llama_8": lambda: _llama(8),
    "llama_16": lambda: _llama(16),
    "llama_80": lambda: _llama(80),
    "gpt2_8": lambda: _gpt2(8),
    "gpt2_48": lambda: _gpt2(48),
    "resnet_152": _resnet,
    "unet_small": lambda: _unet(is_medium=False),
    "unet_medium": lambda: _unet(is_medium=True),
}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    name: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(_MODELS)}; repeat it. All when not given.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where to write the JSON files.")] = Path(__file__).parent,
) -> None:
    """Train each model for one step under a tight budget and write the chain that was planned."""
    console = Console()
    torch.set_num_threads(1)
    for chosen in name or list(_MODELS):
        model, shape = _MODELS[chosen]()
        console.print(f"{chosen}: training one step", soft_wrap=True)
        chain = _rounded(_captured(model, shape))
        made_by = f"python -m benchmarks.chains.capture --name {chosen}: {model} {shape}"
        made_by += f", torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"
        path = folder / f"{chosen}.json"
        path.write_text(chain_to_json(chain, made_by=made_by))
        console.print(f"{chosen}: {len(chain.blocks)} blocks written to {path}", soft_wrap=True)


def _captured(model: ModelConfig, shape: Shape) -> Chain:
    workload = build_workload(model, shape, seed=0, device=torch.device("cpu"))
    (batch,) = make_batches(model.name, shape, num_batches=1, seed=0)
    tbp.hcb(workload.model, activation_budget="39%")
    try:
        workload.loss(batch).backward()
    except tbp.BudgetTooSmallError as error:
        tbp.hcb(tbp.restore(workload.model), activation_budget=error.smallest_bytes)
        workload.loss(batch).backward()
    plans = tbp.explain(workload.model).plans
    assert len(plans) == 1, f"the model was traced in {len(plans)} parts, not one"
    return plans[0].chain


def _rounded(chain: Chain) -> Chain:
    return replace(chain, blocks=tuple(_rounded_block(block) for block in chain.blocks))


def _rounded_block(block: Block) -> Block:
    def rounded(seconds: float) -> float:
        return float(f"{seconds:.2g}")

    options = tuple(
        replace(option, replay_s=rounded(option.replay_s), backward_s=rounded(option.backward_s))
        for option in block.options
    )
    return replace(block, forward_s=rounded(block.forward_s), options=options)


if __name__ == "__main__":
    app()
