"""Random chains that `verify_chain` accepts: skips, several options, shared storages, parameter gradients, a tail."""

from hypothesis import strategies as st

from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId

SMALL = st.integers(0, 9)
SECONDS = st.integers(0, 5).map(float)


@st.composite
def chains(draw: st.DrawFn, *, max_blocks: int = 5) -> Chain:
    """Draw a chain of 1 to `max_blocks` blocks. Each block makes up to two storages that cross some boundaries."""
    num_blocks = draw(st.integers(1, max_blocks))
    sizes = [0]
    boundaries: list[list[int]] = [[0], *([] for _ in range(num_blocks))]
    for block in range(num_blocks):
        for _ in range(draw(st.integers(1, 2))):
            for boundary in range(block + 1, draw(st.integers(block + 1, num_blocks)) + 1):
                boundaries[boundary].append(len(sizes))
            sizes.append(draw(SMALL))
    blocks = tuple(draw(_blocks(block, sizes, boundaries)) for block in range(num_blocks))
    tail_live = draw(SMALL)
    return Chain(
        storage_bytes=tuple(sizes),
        blocks=blocks,
        boundaries=tuple(Boundary(tuple(map(StorageId, storages)), draw(SMALL)) for storages in boundaries),
        tail_peak_bytes=tail_live + draw(SMALL),
        tail_live_bytes=tail_live,
        unmodelled_bytes=draw(SMALL),
    )


@st.composite
def _blocks(draw: st.DrawFn, index: int, sizes: list[int], boundaries: list[list[int]]) -> Block:
    output_bytes = sum(sizes[s] for s in boundaries[index + 1] if s not in boundaries[index])
    forward_s = draw(SECONDS)
    options: list[SavedSet] = []
    for option in range(draw(st.integers(1, 2))):
        saved_bytes = draw(SMALL)
        aliased = draw(st.lists(st.sampled_from([*boundaries[index], *boundaries[index + 1]]), max_size=2, unique=True))
        replay_peak_bytes = saved_bytes + draw(SMALL)
        options.append(
            SavedSet(
                name=f"option{option}",
                storages=tuple(map(StorageId, sorted(aliased))),
                saved_bytes=saved_bytes,
                save_peak_bytes=max(replay_peak_bytes, saved_bytes + output_bytes) + draw(SMALL),
                replay_s=min(forward_s, draw(SECONDS)),
                replay_peak_bytes=replay_peak_bytes,
                backward_s=draw(SECONDS),
                backward_peak_bytes=draw(SMALL),
            )
        )
    return Block(f"b{index}", "s", forward_s, output_bytes + draw(SMALL), draw(SMALL), tuple(options))
