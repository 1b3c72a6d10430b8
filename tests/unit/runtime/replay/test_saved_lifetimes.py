"""What a block's saved tensors hold on to, and when they let go; what counts as a change, and as another tensor."""

import weakref

import pytest
import torch

from tinybp_lightning.capture.torch.op_filter import SkippableOp, filtered_by
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.runtime.torch.replay.saved_tensors import SavedTensors


def test_a_change_before_it_was_saved_is_no_change_since() -> None:
    weight = torch.ones(3)
    weight.add_(1)
    packed = SavedTensors(0, frozenset([storage_key(weight)]), []).pack(weight)
    assert torch.equal(packed.tensor_checked("x"), torch.full((3,), 2.0))  # type: ignore[union-attr]


def test_after_the_first_run_the_input_is_not_held() -> None:
    leaf = torch.ones(3)
    saved = SavedTensors(0, frozenset(), [leaf])
    slot = saved.pack(leaf)
    held = weakref.ref(leaf)
    del leaf
    assert held() is not None
    saved.close()
    assert held() is None
    assert slot is not None


def test_a_skippable_op_that_saves_fewer_tensors_than_before_is_an_error() -> None:
    saved, num_saved = SavedTensors(0, frozenset(), []), 2
    op = SkippableOp(lambda: None, 0, is_silent=False)
    with filtered_by(saved.note_skippable):
        op.function = lambda: slots.extend(saved.pack(torch.ones(2)) for _ in range(num_saved))
        slots: list[object] = []
        op()
        slots.append(saved.pack(torch.ones(2)))
    saved.close()
    with saved.filling(stops_early=True) as pack:
        op.function = lambda: pack(torch.ones(2))
        with pytest.raises(ReplayError, match="has saved 1 tensors where it had saved 2 in the forward"):
            op()


@pytest.mark.parametrize(
    "other",
    [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_a_replay_that_saves_a_tensor_of_another_form_is_an_error(other: torch.Tensor) -> None:
    saved = SavedTensors(0, frozenset(), [])
    slots = [saved.pack(torch.ones(2)) for _ in range(2)]
    saved.close()
    assert len(slots) == 2
    with saved.filling(stops_early=True) as pack:
        pack(torch.ones(2))
        with pytest.raises(ReplayError, match="at position 1, expected"):
            pack(other)
