"""Chains of known shape with small whole numbers, so that peaks and times can be counted by hand, and random ones."""

import random
from dataclasses import replace

from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId

__all__ = ["pass_through_chain", "random_chain", "transformer_chain", "uniform_chain", "with_heavy_skips"]


def uniform_chain(num_blocks: int, *, saved_bytes: int = 2, replay_s: float = 1.0) -> Chain:
    """Every boundary one byte; a saved set holds its block's input and `saved_bytes` of its own; all times 1."""
    blocks = tuple(
        Block(
            name=f"b{i}",
            signature="uniform",
            forward_s=1.0,
            forward_peak_bytes=1,
            parameter_gradient_bytes=0,
            options=(
                SavedSet(
                    name="all",
                    storages=(StorageId(i),),
                    saved_bytes=saved_bytes,
                    save_peak_bytes=saved_bytes + 1,
                    replay_s=replay_s,
                    replay_peak_bytes=saved_bytes,
                    backward_s=1.0,
                    backward_peak_bytes=1,
                ),
            ),
        )
        for i in range(num_blocks)
    )
    return Chain(
        storage_bytes=(0, *(1 for _ in range(num_blocks))),
        blocks=blocks,
        boundaries=tuple(Boundary((StorageId(i),), 0) for i in range(num_blocks + 1)),
    )


def pass_through_chain() -> Chain:
    """Three blocks; storage 1 (8 bytes, a table) is made by block 0 and crosses to block 2, which reads it last.

    Block 1's saved set aliases the table. Boundary 0 is the batch, which the caller owns.
    """

    def block(i: int, storages: tuple[int, ...], new_bytes: int) -> Block:
        saved = SavedSet("all", tuple(map(StorageId, storages)), 3, 3 + new_bytes, 1.0, 3, 2.0, 2)
        return Block(f"b{i}", "s", 1.0, new_bytes, 5, (saved,))

    return Chain(
        storage_bytes=(0, 8, 1, 2, 4),
        blocks=(block(0, (0,), 9), block(1, (1, 2), 2), block(2, (3,), 4)),
        boundaries=tuple(
            Boundary(tuple(map(StorageId, storages)), gradient_bytes)
            for storages, gradient_bytes in (((0,), 0), ((1, 2), 1), ((1, 3), 2), ((4,), 4))
        ),
        tail_peak_bytes=7,
        tail_live_bytes=6,
        unmodelled_bytes=100,
    )


def random_chain(rng: random.Random, num_blocks: int, *, max_options: int = 2) -> Chain:
    """Draw a chain with skips, zero-byte storages, aliases, several options, parameter gradients and a tail."""
    sizes = [0]
    members: list[list[int]] = [[0], *([] for _ in range(num_blocks))]
    for made in range(1, num_blocks + 1):
        for _ in range(rng.choice([1, 1, 1, 2])):
            last = rng.randint(made, num_blocks) if rng.random() < 0.35 else made
            for boundary in range(made, last + 1):
                members[boundary].append(len(sizes))
            sizes.append(rng.choice([0, 1, 1, 2, 3, 4]))
    blocks: list[Block] = []
    for i in range(num_blocks):
        output_bytes = sum(sizes[s] for s in members[i + 1] if s not in members[i])
        forward_s = rng.randint(1, 4)
        options: list[SavedSet] = []
        for option in range(rng.randint(1, max_options)):
            storages = tuple(StorageId(s) for s in sorted({*members[i], *members[i + 1]}) if rng.random() < 0.5)
            saved_bytes = rng.randint(0, 4)
            replay_peak_bytes = saved_bytes + rng.randint(0, 2)
            save_peak_bytes = max(saved_bytes + output_bytes, replay_peak_bytes) + rng.randint(0, 1)
            times = float(rng.randint(0, forward_s)), replay_peak_bytes, float(rng.randint(1, 4)), rng.randint(0, 4)
            options.append(SavedSet(f"option{option}", storages, saved_bytes, save_peak_bytes, *times))
        blocks.append(
            Block(
                f"b{i}",
                f"s{i}",
                float(forward_s),
                output_bytes + rng.randint(0, 2),
                rng.choice([0, 0, 1]),
                tuple(options),
            )
        )
    tail_live_bytes = rng.choice([0, 0, 1])
    return Chain(
        storage_bytes=tuple(sizes),
        blocks=tuple(blocks),
        boundaries=tuple(Boundary(tuple(map(StorageId, m)), rng.randint(0, 2)) for m in members),
        tail_peak_bytes=tail_live_bytes + rng.randint(0, 3),
        tail_live_bytes=tail_live_bytes,
        unmodelled_bytes=rng.choice([0, 2]),
    )


def transformer_chain(num_layers: int, *, unit_bytes: int = 2**20) -> Chain:
    """An embedding, four blocks a layer (in, attention, out, mlp) with a rotary table across them, and a head."""
    sizes, blocks, boundaries = [0], list[Block](), [Boundary((StorageId(0),), 0)]

    def add(name: str, times: tuple[float, float, float], outputs: list[int], aliases: list[int], own: int) -> None:
        forward_s, replay_s, backward_s = times
        new_bytes = sum(sizes[s] for s in outputs if s not in boundaries[-1].storages)
        extra, gradient_bytes = unit_bytes // 8, max(sizes[s] for s in outputs)
        options = tuple(
            SavedSet(
                name=option,
                storages=tuple(StorageId(s) for s in sorted(aliases)),
                saved_bytes=saved_bytes,
                save_peak_bytes=own + new_bytes + extra,
                replay_s=replay_s,
                replay_peak_bytes=own + extra,
                backward_s=backward_s + slower_s,
                backward_peak_bytes=2 * gradient_bytes + own - saved_bytes,
            )
            for option, saved_bytes, slower_s in (("all", own, 0.0), ("half", own // 2, 0.2 * forward_s))[
                : 1 + (own > 0)
            ]
        )
        blocks.append(Block(name, name.rsplit(".", maxsplit=1)[-1], forward_s, new_bytes + extra, 0, options))
        boundaries.append(Boundary(tuple(StorageId(s) for s in sorted(outputs)), gradient_bytes))

    def new(quarters: int) -> int:
        sizes.append(quarters * unit_bytes // 4)
        return len(sizes) - 1

    table, x = new(1), new(4)
    add("embed", (0.2, 0.0, 0.2), [table, x], [], 0)
    for layer in range(num_layers):
        qkv = new(12)
        add(f"{layer}.in", (3.0, 2.0, 6.0), [table, x, qkv], [x], unit_bytes)
        attended = new(4)
        add(f"{layer}.attention", (2.0, 1.9, 5.0), [table, x, attended], [table, qkv, attended], unit_bytes // 4)
        y = new(4)
        add(f"{layer}.out", (1.0, 0.1, 2.0), [table, y], [attended], 0)
        x = new(4)
        add(f"{layer}.mlp", (8.0, 5.5, 16.0), [table, x], [y], 9 * unit_bytes)
    add("head", (5.0, 5.0, 10.0), [new(16)], [x], 4 * unit_bytes)
    return Chain(tuple(sizes), tuple(blocks), tuple(boundaries), 8 * unit_bytes)


def with_heavy_skips(chain: Chain, rng: random.Random) -> Chain:
    """Make every storage of several boundaries three or six times as large, as a U-Net's skips are."""
    of = [set(boundary.storages) for boundary in chain.boundaries]
    sizes = list(chain.storage_bytes)
    for storage in range(1, len(sizes)):
        if sum(storage in members for members in of) > 1:
            sizes[storage] *= rng.choice([3, 6])
    more = [new - old for new, old in zip(sizes, chain.storage_bytes, strict=True)]
    blocks: list[Block] = []
    for block, before, after in zip(chain.blocks, of, of[1:], strict=False):
        made = sum(more[storage] for storage in after - before)
        options = [
            replace(
                option,
                save_peak_bytes=option.save_peak_bytes + made + sum(more[s] for s in option.storages),
                replay_peak_bytes=option.replay_peak_bytes + made + sum(more[s] for s in option.storages),
            )
            for option in block.options
        ]
        blocks.append(replace(block, forward_peak_bytes=block.forward_peak_bytes + made, options=tuple(options)))
    return replace(chain, storage_bytes=tuple(sizes), blocks=tuple(blocks))
