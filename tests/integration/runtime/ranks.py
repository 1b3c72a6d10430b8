"""What the two processes of `test_data_parallel.py` and `test_fully_sharded.py` run.

`python ranks.py CASES FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; CASES are joined by commas.
Trains plainly and under `hcb`, and writes what was seen to `FOLDER/CASE.RANK.json`; comparing happens here, where the
tensors are.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import tinybp_lightning as tbp
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending
from tinybp_lightning.runtime.torch.replay.engine import Run

WIDTH, ROWS, DEPTH, STEPS = 32, 64, 8, 4


_FORWARD_SAVE = Run._forward_save


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.dropout(self.down(torch.tanh(self.up(self.norm(x)))), 0.1)


class Net(nn.Module):
    """`path`: `all` blocks, one of them `unused`, the first and the last `tied`, or one whose graph `breaks`."""

    def __init__(self, path: str = "all") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, WIDTH)
        if path == "tied":
            self.blocks[-1].up.weight = self.blocks[0].up.weight
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if self.path == "breaks":
                torch._dynamo.graph_break()
            if not (self.path == "unused" and i == 3):
                x = block(x)
        return self.head(x)


def batch(step: int) -> torch.Tensor:
    seed = 100 * step + dist.get_rank()
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, *, accumulate: int = 1, order: list[str] | None = None) -> list[dict[str, torch.Tensor]]:
    """Return the loss and all gradients of each step; write `step` into `order` where one begins."""
    seen = []
    for step in range(STEPS):
        if order is not None:
            order.append("step")
        for part in range(accumulate):
            torch.manual_seed(10 * step + part)
            syncs = part == accumulate - 1 or not isinstance(model, DistributedDataParallel)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", tbp.HCBWarning)
                if syncs:
                    loss = model(batch(step + part)).square().mean()
                    loss.backward()
                else:
                    with model.no_sync():
                        loss = model(batch(step + part)).square().mean()
                        loss.backward()
        found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        seen.append({"loss": loss.detach(), **found})
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
                p.grad = None
    settle_pending()
    return seen


def whole(gradient: torch.Tensor) -> torch.Tensor:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.detach().clone()


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


class Recorder:
    def __init__(self) -> None:
        self.replayed: list[int] = []

    def on_plan(self, plan: Any) -> None: ...

    def on_replay(self, profile: Any) -> None:
        self.replayed.append(profile.replayed_blocks)


def record_order(model: nn.Module, ddp: DistributedDataParallel) -> list[str]:
    """Words in order: `bucket` when one is launched, `replay` when a block runs again, `grad NAME`."""
    order: list[str] = []

    def launch(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        order.append("bucket")
        return default_hooks.allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, launch)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(f"grad {name}"))

    def forward_save(self: Run, *args: Any, **kwargs: Any) -> None:
        order.append("replay")
        _FORWARD_SAVE(self, *args, **kwargs)

    Run._forward_save = forward_save  # type: ignore[method-assign]
    return order


def data_parallel(
    *, path: str = "all", budget: int = 150_000, accumulate: int = 1, frozen: bool = False, **options: Any
) -> dict[str, Any]:
    def make(budget: int | None, observers: tuple[Any, ...] = ()) -> tuple[nn.Module, DistributedDataParallel]:
        model = Net(path)
        if frozen:
            model.blocks[1].requires_grad_(requires_grad=False)
        if budget is not None:
            tbp.hcb(model, activation_budget=budget, observers=observers)
        return model, DistributedDataParallel(model, bucket_cap_mb=0.02, **options)

    want = train(make(None)[1], accumulate=accumulate)
    recorder = Recorder()
    model, ddp = make(budget, (recorder,))
    order = record_order(model, ddp)
    got = train(ddp, accumulate=accumulate, order=order)
    return {"same": same(got, want), "order": order, "replayed": recorder.replayed, "names": names(model)}


def names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def fully_sharded(*, policy: str = "plain", **options: Any) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if policy == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def make() -> nn.Module:
        model = Net()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
        return model

    want = train(make())
    recorder = Recorder()
    model = tbp.hcb(make(), activation_budget=400_000, observers=(recorder,))
    got = train(model)
    return {"same": same(got, want), "replayed": recorder.replayed, "order": [], "names": names(model)}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": data_parallel,
    "ddp-find-unused": lambda: data_parallel(path="unused", find_unused_parameters=True),
    "ddp-static-graph": lambda: data_parallel(static_graph=True),
    "ddp-bucket-view": lambda: data_parallel(gradient_as_bucket_view=True),
    "ddp-no-sync": lambda: data_parallel(accumulate=3),
    "ddp-tied": lambda: data_parallel(path="tied"),
    "ddp-frozen": lambda: data_parallel(frozen=True),
    "ddp-breaks": lambda: data_parallel(path="breaks", budget=250_000),
    "fsdp": fully_sharded,
    "fsdp-bf16": lambda: fully_sharded(policy="bf16"),
    "fsdp-keep": lambda: fully_sharded(reshard_after_forward=False),
}


def main(cases: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases.split(","):
        result = CASES[case]()
        Path(folder, f"{case}.{os.environ['RANK']}.json").write_text(json.dumps(result), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
