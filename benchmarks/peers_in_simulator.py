"""What do known methods and the plan cost at one peak, in the simulator? `python -m benchmarks.peers_in_simulator`.

A chain with the proportions of a Llama layer (hidden 2048, 4 x 4096 tokens, bf16, 5 ms of forward a layer). For every
peer: its peak, the time it recomputes, and what the plan recomputes within that peak. The last column is how much less
time a step with offload takes than the plan, over a link of `--link-gib-s` each way. The script fails if a peer
recomputes less than the plan.
"""

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId
from tinybp_lightning.schedule import (
    Planner,
    Schedule,
    every_k,
    every_sqrt_n,
    keep_all,
    per_block,
    plan_offload,
    saved_knapsack,
    selective,
    simulate,
)

__all__ = ["llama_chain", "main"]

_MIB, _GIB = 2**20, 2**30
_HIDDEN_MIB = 64
"""A tensor of 16384 tokens by 2048 values in bf16."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A block of a layer; sizes in hidden tensors, times in seconds."""

    name: str
    saved: float
    forward_s: float
    replay_s: float
    backward_s: float


_PARTS = (_Part("attention", 5.25, 2.1e-3, 1.9e-3, 4.6e-3), _Part("mlp", 10.0, 2.9e-3, 2.0e-3, 5.8e-3))


def llama_chain(num_layers: int) -> Chain:
    """Return two blocks a layer with one hidden tensor between them; the logits are the tail's."""
    size = _HIDDEN_MIB * _MIB
    parts = _PARTS * num_layers
    return Chain(
        storage_bytes=(0, *(size for _ in parts)),
        blocks=tuple(_block(index, part, size) for index, part in enumerate(parts)),
        boundaries=tuple(Boundary((StorageId(i),), size if i else 0) for i in range(len(parts) + 1)),
        tail_peak_bytes=16 * size,
    )


def _block(index: int, part: _Part, size: int) -> Block:
    saved_bytes = int(part.saved * size)
    option = SavedSet(
        name="all",
        storages=(StorageId(index),),
        saved_bytes=saved_bytes,
        save_peak_bytes=saved_bytes + size,
        replay_s=part.replay_s,
        replay_peak_bytes=saved_bytes,
        backward_s=part.backward_s,
        backward_peak_bytes=4 * size,
    )
    return Block(f"{index // 2}.{part.name}", part.name, part.forward_s, 4 * size, 0, (option,))


def _peers(chain: Chain) -> list[tuple[str, Schedule]]:
    return [
        ("keep all", keep_all(chain)),
        ("per block", per_block(chain)),
        ("per layer", every_k(chain, k=2)),
        ("every sqrt(n)", every_sqrt_n(chain)),
        *((f"saved bytes {k}/8", saved_knapsack(chain, saved_share=k / 8)) for k in range(8)),
        ("keep attention", selective(chain, signatures=["attention"], k=2)),
        ("keep mlp", selective(chain, signatures=["mlp"], k=2)),
    ]


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the chain.")] = 16,
    link_gib_s: Annotated[float, typer.Option(help="Bandwidth to host memory, each way.")] = 51.6,
) -> None:
    """Print the table."""
    chain = llama_chain(layers)
    planner = Planner(chain)
    table = Table("peer", "peak (GiB)", "recomputed (ms)", "plan (ms)", "offload spares (ms)")
    faster: list[str] = []
    for name, schedule in _peers(chain):
        peer = simulate(chain, schedule)
        plan = simulate(chain, planner.plan(budget_bytes=peer.peak_bytes).schedule)
        away = plan_offload(planner, budget_bytes=peer.peak_bytes, link_bytes_per_s=link_gib_s * _GIB)
        if plan.recompute_s > peer.recompute_s + 1e-9:
            faster.append(name)
        row = (
            peer.peak_bytes / _GIB,
            peer.recompute_s * 1e3,
            plan.recompute_s * 1e3,
            (plan.total_s - away.total_s) * 1e3,
        )
        table.add_row(name, *(f"{figure:.2f}" for figure in row))
    Console(width=100).print(table)
    if faster:
        raise SystemExit(f"recompute less than the plan at their peak: {', '.join(faster)}")


if __name__ == "__main__":
    typer.run(main)
