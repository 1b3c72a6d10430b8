"""What chains are there beside the captured ones? Longer ones of the same layers, and made-up ones of other shapes."""

import random
from dataclasses import replace

from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId, verify_chain

__all__ = ["dense_chain", "random_dag_chain", "repeated", "uniform_chain"]


def repeated(chain: Chain, *, first_block: int, layer_blocks: int, num_copies: int) -> Chain:
    """Return `chain` with the layer at `first_block` there `num_copies` times more, each after the other.

    **Arguments:** `layer_blocks`: blocks of the layer; the layer before it must be of the same blocks.
    """
    start, end = first_block, first_block + layer_blocks
    born = [len(chain.boundaries)] * len(chain.storage_bytes)
    for i, boundary in reversed(list(enumerate(chain.boundaries))):
        for storage in boundary.storages:
            born[storage] = i
    before, after = ([s for s in chain.boundaries[i].storages if born[s] > i - layer_blocks] for i in (start, end))
    assert len(before) == len(after), "the boundaries at the layer's ends are not of the same storages"
    size, names = list(chain.storage_bytes), {s: s for s in range(len(chain.storage_bytes))}
    own = [s for s, first in enumerate(born) if start < first <= end]
    blocks, boundaries = list(chain.blocks[:end]), list(chain.boundaries[: end + 1])
    for _ in range(num_copies):
        names |= {old: names[new] for old, new in zip(before, after, strict=True)}
        names |= {storage: len(size) + k for k, storage in enumerate(own)}
        size += [chain.storage_bytes[s] for s in own]
        blocks += [_renamed(block, names) for block in chain.blocks[start:end]]
        boundaries += [_renamed_boundary(boundary, names) for boundary in chain.boundaries[start + 1 : end + 1]]
    blocks += [_renamed(block, names) for block in chain.blocks[end:]]
    boundaries += [_renamed_boundary(boundary, names) for boundary in chain.boundaries[end + 1 :]]
    longer = replace(chain, storage_bytes=tuple(size), blocks=tuple(blocks), boundaries=tuple(boundaries))
    verify_chain(longer)
    return longer


def uniform_chain(num_blocks: int) -> Chain:
    """Return equal blocks: a boundary of 1 byte, a saved set of 1 more, all times 1."""
    return _made([[1]] * num_blocks, [1] * num_blocks, [1.0] * num_blocks, last=[[0]] * num_blocks)


def dense_chain(num_blocks: int, *, stage_blocks: int = 16) -> Chain:
    """Return a DenseNet-like chain: within a stage every block reads what all blocks before it made."""
    lasts = [[min(num_blocks - 1, (i // stage_blocks + 1) * stage_blocks - 1) - i] for i in range(num_blocks)]
    widths = [1 + i % stage_blocks for i in range(num_blocks)]
    saved = [4 * 2**16 + 2 * 2**16 * width for width in widths]
    return _made([[2**16]] * num_blocks, saved, [2.0 + 0.25 * width for width in widths], last=lasts)


def random_dag_chain(num_blocks: int, *, seed: int) -> Chain:
    """Return a chain of unlike blocks, a third of whose outputs skip up to eight blocks."""
    rng = random.Random(seed)
    sizes = [[rng.randint(1, 8) * 2**14 for _ in range(rng.choice([1, 1, 2]))] for _ in range(num_blocks)]
    lasts = [
        [min(num_blocks - 1 - i, rng.randint(1, 8) if rng.random() < 1 / 3 else 0) for _ in own]
        for i, own in enumerate(sizes)
    ]
    saved = [rng.randint(0, 24) * 2**14 for _ in range(num_blocks)]
    return _made(sizes, saved, [float(rng.randint(1, 9)) for _ in range(num_blocks)], last=lasts)


def _made(sizes: list[list[int]], saved: list[int], times: list[float], *, last: list[list[int]]) -> Chain:
    """Block `i` makes storages of `sizes[i]`, which go `last[i]` boundaries beyond the next one; it saves its input."""
    storage_bytes, members = [0], [[0], *([] for _ in sizes)]
    for i, (own, beyond) in enumerate(zip(sizes, last, strict=True)):
        for size, more in zip(own, beyond, strict=True):
            for boundary in range(i + 1, i + 2 + more):
                members[boundary].append(len(storage_bytes))
            storage_bytes.append(size)
    blocks: list[Block] = []
    for i, own in enumerate(sizes):
        saved_set = SavedSet(
            name="all",
            storages=tuple(map(StorageId, members[i])),
            saved_bytes=saved[i],
            save_peak_bytes=saved[i] + sum(own),
            replay_s=times[i],
            replay_peak_bytes=saved[i],
            backward_s=2 * times[i],
            backward_peak_bytes=sum(storage_bytes[s] for s in members[i]),
        )
        blocks.append(Block(f"b{i}", f"s{i}", times[i], sum(own), 0, (saved_set,)))
    boundaries = [Boundary(tuple(map(StorageId, m)), sum(storage_bytes[s] for s in m)) for m in members]
    chain = Chain(tuple(storage_bytes), tuple(blocks), tuple(boundaries))
    verify_chain(chain)
    return chain


def _renamed(block: Block, names: dict[int, int]) -> Block:
    def storages(option: SavedSet) -> tuple[StorageId, ...]:
        return tuple(sorted(StorageId(names[s]) for s in option.storages))

    return replace(block, options=tuple(replace(option, storages=storages(option)) for option in block.options))


def _renamed_boundary(boundary: Boundary, names: dict[int, int]) -> Boundary:
    return replace(boundary, storages=tuple(sorted(StorageId(names[s]) for s in boundary.storages)))
