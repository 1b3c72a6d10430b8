"""What a block saved comes back as it was: by reference, as a view of its input, or from a replay."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from tinybp_lightning.capture.torch.op_filter import SkippableOp, filtered_by
from tinybp_lightning.capture.torch.private import storage_key
from tinybp_lightning.errors import ReplayError
from tinybp_lightning.runtime.torch.replay.saved_tensors import Reference, SavedTensors, Slot, _StopReplay


def saved_by(*inputs: torch.Tensor, externals: tuple[torch.Tensor, ...] = ()) -> SavedTensors:
    return SavedTensors(0, frozenset(storage_key(t) for t in externals), inputs)


def test_an_external_is_held_by_reference() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    packed = saved_by(externals=(weight,)).pack(weight[1:])
    assert isinstance(packed, Reference)
    assert packed.tensor_checked("x").data_ptr() == weight[1:].data_ptr()
    assert packed.tensor_checked("x").grad_fn is None
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(ReplayError, match="changed in place after the forward"):
        packed.tensor_checked("x")


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t.flatten()[3:7],
        lambda t: t.expand(2, 4, 6),
        lambda t: t.view(torch.int32),
        lambda t: t.view(torch.float16)[:, 5:],
        lambda t: torch.view_as_complex(t.view(4, 3, 2)),
    ],
    ids=["itself", "transposed", "strided", "shifted", "expanded", "as-int", "as-half", "as-complex"],
)
@pytest.mark.parametrize("offset", [0, 6])
def test_a_view_of_the_input_is_rebuilt(view: Callable[[torch.Tensor], torch.Tensor], offset: int) -> None:
    whole = torch.randn(60)
    leaf = whole[offset : offset + 24].view(4, 6)
    saved = saved_by(leaf)
    slot = saved.pack(view(leaf))
    assert isinstance(slot, Slot)
    assert saved.num_replayed == 0
    # The boundary may have been stored or computed anew: somewhere else, at another offset.
    elsewhere = torch.cat([torch.zeros(2), leaf.flatten()])[2:].view(4, 6)
    saved.fill_views([elsewhere])
    assert slot.value is not None
    want = view(leaf)
    assert (slot.value.dtype, slot.value.stride()) == (want.dtype, want.stride())
    assert torch.equal(slot.value, want)


def test_an_input_changed_since_is_no_alias() -> None:
    leaf = torch.randn(4)
    saved = SavedTensors(0, frozenset(), [leaf], holds=True)
    unchanged = saved.pack(leaf)
    assert (saved.num_replayed, saved.held_bytes([])) == (0, 0)
    leaf.add_(1.0)
    changed = saved.pack(leaf)
    assert (saved.num_replayed, saved.held_bytes([])) == (2, 16)
    del unchanged, changed


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.t(), lambda t: t[1:, ::2]], ids=["itself", "t", "part"])
@pytest.mark.parametrize("is_held", [True, False], ids=["held", "first-let-go"])
def test_what_is_saved_again_is_filled_with_what_was_saved_first(
    view: Callable[[torch.Tensor], torch.Tensor], *, is_held: bool
) -> None:
    made = torch.randn(4, 6)
    saved = SavedTensors(0, frozenset(), (), is_out_of_place=True)
    slots = [saved.pack(made[:, 1:]), saved.pack(view(made))]
    assert saved.num_replayed == 1
    if not is_held:
        del slots[0]
    with saved.filling(stops_early=True) as pack, pytest.raises(_StopReplay):
        pack(made.clone()[:, 1:])
    assert isinstance(slots[-1], Slot)
    assert slots[-1].value is not None
    assert torch.equal(slots[-1].value, view(made))


def test_what_may_have_changed_since_is_not_what_was_saved_first() -> None:
    made = torch.randn(4, 6)
    unknown = saved_by()
    tracked = SavedTensors(0, frozenset(), (), is_out_of_place=True)
    unknown.pack(made)
    tracked.pack(made)
    unknown.pack(made)
    assert unknown.num_replayed == 2
    made.add_(1.0)
    tracked.pack(made)
    assert tracked.num_replayed == 2


def test_only_slots_that_autograd_holds_are_filled() -> None:
    saved = saved_by()
    first, second = saved.pack(torch.ones(1)), saved.pack(torch.ones(2))
    del first
    with saved.filling(stops_early=False) as pack:
        pack(torch.full((1,), 3.0))
        pack(torch.full((2,), 4.0))
    assert isinstance(second, Slot)
    assert second.value is not None
    assert torch.equal(second.value, torch.full((2,), 4.0))
    saved.check_complete()


def test_a_filled_slot_does_not_hold_the_replayed_graph() -> None:
    saved = saved_by()
    slot = saved.pack(torch.ones(1))
    leaf = torch.ones(1, requires_grad=True)
    result = leaf.exp()
    node = weakref.ref(result)
    with saved.filling(stops_early=False) as pack:
        pack(result)
    assert isinstance(slot, Slot)
    assert slot.value is not None
    assert slot.value.grad_fn is None
    del result
    gc.collect()
    assert node() is None


def test_the_replay_stops_at_the_last_one_that_needs_it() -> None:
    leaf = torch.randn(3)
    saved = saved_by(leaf)
    slots = [saved.pack(torch.ones(2)), saved.pack(leaf)]
    assert saved.num_replayed == 1
    with saved.filling(stops_early=True) as pack, pytest.raises(_StopReplay):
        pack(torch.ones(2))
    assert all(isinstance(slot, Slot) for slot in slots)


def save_and_replay(
    saved: SavedTensors,
    first: list[torch.Tensor],
    skippable: list[torch.Tensor],
    last: torch.Tensor,
    *,
    is_silent: bool = False,
) -> tuple[list[object], list[str]]:
    """Save `first`, `skippable` within a skippable op, and `last`; replay: what the slots hold, and what ran."""
    ran: list[str] = []

    def block(op: SkippableOp, pack: Callable[[torch.Tensor], object]) -> list[object]:
        packed = [pack(t) for t in first]

        def save() -> str:
            for t in skippable:
                packed.append(pack(t))
                ran.append("saved")
            ran.append("computed")
            return "result"

        op.function = save
        ran.append(f"gave {op()}")
        return [*packed, pack(last)]

    op = SkippableOp(lambda: None, 0, is_silent=is_silent)
    with filtered_by(saved.note_skippable):
        slots = block(op, saved.pack)
    assert ran == [*["saved"] * len(skippable), "computed", "gave result"]
    saved.close()
    ran.clear()
    saved.fill_views(first[:1])
    with saved.filling(stops_early=True) as pack:
        block(op, pack)
    return [slot.value if isinstance(slot, Slot) else slot for slot in slots], ran


def test_a_skippable_op_is_stopped_once_it_has_saved() -> None:
    made, last = torch.ones(2), torch.ones(3)
    values, ran = save_and_replay(saved_by(), [], [made, torch.zeros(2)], last)
    assert ran == ["saved", "gave None"]
    assert all(isinstance(v, torch.Tensor) for v in values)


def test_a_skippable_op_that_saves_nothing_new_is_not_begun() -> None:
    leaf, weight = torch.randn(3), torch.randn(4)
    saved = SavedTensors(0, frozenset([storage_key(weight)]), [leaf])
    values, ran = save_and_replay(saved, [leaf], [leaf, weight], torch.ones(3))
    assert ran == ["gave None"]
    assert isinstance(values[1], torch.Tensor)
    assert torch.equal(values[1], leaf)


def test_a_skippable_op_that_was_to_save_nothing_but_did_is_run() -> None:
    _, ran = save_and_replay(saved_by(), [], [torch.ones(2)], torch.ones(3), is_silent=True)
    assert ran == ["saved", "computed", "gave result"]


def test_a_replay_that_has_saved_another_number_of_tensors_before_a_skippable_op_is_an_error() -> None:
    saved = saved_by()
    op = SkippableOp(lambda: None, 0, is_silent=False)
    with filtered_by(saved.note_skippable):
        slots = [saved.pack(torch.ones(2))]
        op()
        slots.append(saved.pack(torch.ones(2)))
    saved.close()
    with saved.filling(stops_early=True) as pack:
        with pytest.raises(ReplayError, match="has saved 0 tensors where it had saved 1 in the forward"):
            op()
        pack(torch.ones(2))
        op()
    assert all(isinstance(slot, Slot) for slot in slots)


def test_a_replay_for_the_results_runs_skippable_ops() -> None:
    saved = saved_by()
    op = SkippableOp(lambda: "result", 0, is_silent=False)
    with filtered_by(saved.note_skippable):
        op()
    with saved.filling(stops_early=False):
        assert op() == "result"


@pytest.mark.parametrize("num_saved", [0, 1, 3])
def test_another_number_of_saved_tensors_is_an_error(num_saved: int) -> None:
    saved = saved_by()
    slots = [saved.pack(torch.ones(1)) for _ in range(2)]
    assert len(slots) == 2

    def replay() -> None:
        with saved.filling(stops_early=False) as pack:
            for _ in range(num_saved):
                pack(torch.ones(1))
        saved.check_complete()

    with pytest.raises(ReplayError, match="saved"):
        replay()


def test_held_bytes_are_of_storages_that_would_have_lived_on() -> None:
    whole, other, output = torch.ones(10), torch.ones(20), torch.ones(40)
    saved = SavedTensors(0, frozenset(), [], holds=True)
    slots = [saved.pack(t) for t in (whole, whole[2:4], other, output, output.t())]
    assert saved.held_bytes([]) == 280
    assert saved.held_bytes([output.view(4, 10), None, 3]) == 120
    del slots[0]  # the other half of its storage is still needed
    assert saved.held_bytes([]) == 280
    del slots[1]
    assert saved.held_bytes([]) == 200
    saved.release()
    assert saved.held_bytes([]) == 0


def test_what_is_held_is_there_at_once_until_it_is_released() -> None:
    leaf, made = torch.randn(3), torch.randn(4)
    saved = SavedTensors(0, frozenset(), [leaf], holds=True)
    packed = [saved.pack(leaf), saved.pack(made)]
    slots = [slot for slot in packed if isinstance(slot, Slot)]
    assert [slot.read("block").data_ptr() for slot in slots] == [leaf.data_ptr(), made.data_ptr()]
    saved.release()
    assert [slot.value for slot in slots] == [None, None]
    with saved.filling(stops_early=True) as pack:
        saved.fill_views([leaf])
        pack(leaf)
        pack(made.clone())
    assert torch.equal(slots[0].read("block"), leaf)
    assert torch.equal(slots[1].read("block"), made)


def test_a_replay_that_stops_early_leaves_nothing_to_the_garbage_collector() -> None:
    """CPython 3.12 makes a cycle of the traceback where a generator swallows the exception that stops the replay."""
    saved = saved_by()
    slot = saved.pack(torch.ones(3))
    assert isinstance(slot, Slot)
    saved.close()
    locals_of_the_replay: list[weakref.ref[torch.Tensor]] = []

    def replay(pack: Callable[[torch.Tensor], None]) -> None:
        beside, again = torch.zeros(3), torch.ones(3)
        locals_of_the_replay.append(weakref.ref(beside))
        pack(again)
        raise AssertionError("the replay went on")

    gc.disable()
    try:
        with saved.filling(stops_early=True) as pack:
            replay(pack)
        assert [beside() for beside in locals_of_the_replay] == [None]
    finally:
        gc.enable()
