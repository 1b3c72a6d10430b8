"""What does the planner see? A chain of blocks, the states between them, and what each costs.

A `Chain` is cut from a `Graph` (or recorded from module calls) and carries measured costs. Boundary `i` is the state
before block `i`; boundary 0 is what the step starts from and boundary `n` what the last block returns. A boundary is a
*frontier*: the set of storages that later blocks still read, so a skip connection belongs to every boundary it crosses
and, because it is one `StorageId`, is counted once however many boundaries hold it.

Terms are defined in `docs/theory.md`. Times are seconds, sizes are bytes.
"""

from dataclasses import dataclass

from tinybp_lightning.graph.ids import StorageId

__all__ = ["Block", "Boundary", "Chain", "SavedSet"]


@dataclass(frozen=True, slots=True)
class SavedSet:
    """One way to run a block so that its backward can follow: the option a `ForwardSave` names.

    `storages` are boundary storages (of any boundary) that the saved tensors alias: they stay alive with the saved
    set but are not new. `saved_bytes` is what the saved set holds beside those.
    `save_peak_bytes`: the most *new* bytes alive at once while the block runs and saves, above what was alive when it
    began; its saved set and its outputs are included.
    `replay_s`, `replay_peak_bytes`: the same run in a replay that stops at the last saved tensor because nobody needs
    the outputs (early stop); never more than `forward_s` and `save_peak_bytes`.
    `backward_s`, `backward_peak_bytes`: the block's backward; the peak is in new bytes above what was alive when it
    began (saved set and output gradients were), its input gradients included, parameter gradients left out.
    `is_estimated`: its peaks and seconds were not measured, and must be before a step goes by it.
    """

    name: str
    storages: tuple[StorageId, ...]
    saved_bytes: int
    save_peak_bytes: int
    replay_s: float
    replay_peak_bytes: int
    backward_s: float
    backward_peak_bytes: int
    is_estimated: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """One step of the chain. Blocks with equal `signature` are structurally equal and share their costs.

    `forward_s`, `forward_peak_bytes`: run it and keep nothing but the outputs; the peak is in new bytes above what was
    alive when it began, outputs included.
    `parameter_gradient_bytes`: gradients that its backward allocates and leaves behind (0 when the budget does not
    count them).
    `options[0]` saves everything autograd wants; further options save less and recompute inside the block.
    """

    name: str
    signature: str
    forward_s: float
    forward_peak_bytes: int
    parameter_gradient_bytes: int
    options: tuple[SavedSet, ...]


@dataclass(frozen=True, slots=True)
class Boundary:
    """The state between two blocks: the storages it is made of, and the bytes of their gradients.

    `gradient_bytes` are alive from the backward of the block after the boundary to the backward of the one before.
    """

    storages: tuple[StorageId, ...]
    gradient_bytes: int


@dataclass(frozen=True, slots=True)
class Chain:
    """The planner's input: `n` blocks, `n + 1` boundaries, and the bytes of each boundary storage.

    A storage of 0 bytes is one that somebody else owns and holds anyway (the batch, a parameter): boundary 0 is made
    of such storages. `tail_peak_bytes` is the most that the code after the last block (the loss) has alive at once
    between the end of the forward and the backward of the last block, above boundary `n`; `tail_live_bytes` what it
    still holds, beside boundary `n`'s gradients, while the blocks' backwards run.
    `workspace_bytes` is added to every moment: what measurement showed and the model does not explain.
    """

    storage_bytes: tuple[int, ...]
    blocks: tuple[Block, ...]
    boundaries: tuple[Boundary, ...]
    tail_peak_bytes: int = 0
    tail_live_bytes: int = 0
    workspace_bytes: int = 0
