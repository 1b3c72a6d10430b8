"""What does the planner see? A chain of blocks, the states between them, and their costs.

A `Chain` is cut from a `Graph` (or recorded from module calls) and carries measured costs. Boundary `i` is the state
before block `i`: a *frontier*, the set of storages that later blocks still read. A skip connection belongs to every
boundary that it crosses, but as it is one `StorageId`, it is counted once. Terms are defined in `docs/theory.md`.
"""

from dataclasses import dataclass

from tinybp_lightning.graph.ids import StorageId

__all__ = ["Block", "Boundary", "Chain", "SavedSet"]


@dataclass(frozen=True, slots=True)
class SavedSet:
    """One way to run a block so that its backward can follow: the option that a `ForwardSave` names.

    `storages` are boundary storages (of any boundary) that the saved tensors alias: the saved set keeps them alive, but
    they are not new. `saved_bytes` is the size of the rest of the saved set.
    `save_peak_bytes`: the most *new* bytes alive at once while the block runs and saves, above what was alive when it
    began. The saved set and the outputs are included.
    `replay_s`, `replay_peak_bytes`: the same run in a replay that does not need the outputs and stops at the last saved
    tensor (early stop); at most `forward_s` and `save_peak_bytes`.
    `backward_s`, `backward_peak_bytes`: the block's backward. The peak is in new bytes above what was alive when it
    began (the saved set and the output gradients were); it includes input gradients but not parameter gradients.
    `is_estimated`: the peaks and seconds are not measured yet, and must be before a step uses this option.
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

    `forward_s`, `forward_peak_bytes`: a run that keeps only the outputs. The peak is in new bytes above what was alive
    when it began, outputs included.
    `parameter_gradient_bytes`: gradients that the backward allocates and leaves alive (0 if the budget does not count
    them).
    `options[0]` saves all that autograd asks for; further options save less and recompute inside the block.
    """

    name: str
    signature: str
    forward_s: float
    forward_peak_bytes: int
    parameter_gradient_bytes: int
    options: tuple[SavedSet, ...]


@dataclass(frozen=True, slots=True)
class Boundary:
    """The state between two blocks: its storages, and the bytes of their gradients.

    The gradients are alive from the backward of the block after the boundary to the backward of the block before it.
    """

    storages: tuple[StorageId, ...]
    gradient_bytes: int


@dataclass(frozen=True, slots=True)
class Chain:
    """The planner's input: `n` blocks, `n + 1` boundaries, and the bytes of each boundary storage.

    A storage of 0 bytes has another owner (the batch, a parameter): boundary 0 consists of such storages.
    `tail_peak_bytes` is the most that the code after the last block (the loss) has alive at once, above boundary `n`,
    between the end of the forward and the backward of the last block; `tail_live_bytes` is what it still holds, beside
    the gradients of boundary `n`, while the backwards of the blocks run.
    `unmodelled_bytes` is added to every moment: the measured bytes that the model does not explain.
    """

    storage_bytes: tuple[int, ...]
    blocks: tuple[Block, ...]
    boundaries: tuple[Boundary, ...]
    tail_peak_bytes: int = 0
    tail_live_bytes: int = 0
    unmodelled_bytes: int = 0
