"""What does the comparison of a first replay cost? Llama by module steps, with the comparison and without it, in turns.

Each run trains in a process of its own: the first step's seconds, and the median of the settled ones.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import tinybp_lightning as tbp
from tinybp_lightning.runtime.torch import submodules

_SETTLED_AFTER, _STEPS = 6, 16
_WAYS = ("compared", "not compared", "plain")


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """The seconds of one run, and the reasons for which parts were kept."""

    way: str
    first_step_s: float
    settled_step_s: float
    warnings: list[str]


class _Broken(nn.Module):
    """A model whose forward looks at a value, so that its layers' calls become the blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if int(ids.sum()) < 0:
            raise ValueError("no token is negative")
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def _model(device: torch.device, *, is_small: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - slow to import

    torch.manual_seed(0)
    width, layers = (128, 4) if is_small else (2048, 16)
    config = LlamaConfig(
        vocab_size=1000 if is_small else 32000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return _Broken(LlamaForCausalLM(config)).to(device, torch.float32 if is_small else torch.bfloat16)


def _run(way: str, device: torch.device, *, is_small: bool) -> Price:
    import warnings  # noqa: PLC0415 - a child's own

    model = _model(device, is_small=is_small)
    ids = torch.randint(0, 1000, (2, 64) if is_small else (4, 4096), device=device)
    if way != "plain":
        tbp.hcb(model, activation_budget="50%", plan_cache=False, executor="eager")
    if way == "not compared":
        submodules._first_difference = lambda *_: None  # pyright: ignore[reportPrivateUsage]
    seconds: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tbp.HCBWarning)
        for _ in range(_STEPS):
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            model(ids).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    said = [str(w.message) for w in caught if issubclass(w.category, tbp.HCBWarning)]
    return Price(way, seconds[0], statistics.median(seconds[_SETTLED_AFTER:]), said)


def main(
    export: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/module_step_price.json"),
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="How often each way is run, in turns.")] = 2,
    way: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time the first step and the settled ones of Llama by module steps, in turns."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"`{device}`: expected cpu, or cuda where there is one.", param_hint="--device")
    if way:
        sys.stdout.write(json.dumps(dataclasses.asdict(_run(way, torch.device(device), is_small=device == "cpu"))))
        return
    runs: list[dict[str, object]] = []
    for _ in range(rounds):
        for one in _WAYS:
            command = [sys.executable, "-m", "benchmarks.module_step_price", "--device", device, "--way", one]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(found.splitlines()[-1]))
            typer.echo(
                f"{one:14} first step {runs[-1]['first_step_s']:.3f} s, settled {runs[-1]['settled_step_s']:.4f} s"
            )
    export.parent.mkdir(parents=True, exist_ok=True)
    export.write_text(json.dumps({"torch": torch.__version__, "device": device, "runs": runs}, indent=1))
    typer.echo(f"wrote {export}")


if __name__ == "__main__":
    typer.run(main)
