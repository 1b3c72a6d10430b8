"""The simulator counts what a reader counts by hand: sets of storages, early stop, the loss, copies to the host."""

import pytest

from tests.unit.schedule.chains_by_hand import pass_through_chain, uniform_chain
from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.schedule import ForwardSave, from_text, keep_all, simulate

# Workspace 100. Boundaries: 1 = table 8 + x 1, 2 = table 8 + y 2, 3 = z 4. Saved sets: 3 private bytes each; block 1's
# aliases table and x, block 2's aliases y. Gradients: 4, 2, 1, 0. Parameter gradients: 5 a block. Loss: peak 7, live 6.
BY_HAND = [
    # action, before, peak, after
    ("K0", 100, 112, 112),  # 3 private, cursor 1 (9)
    ("K1", 112, 117, 117),  # + 3 private + y 2; table and x stay with the saved set
    ("K2", 117, 124, 124),  # + 3 private + z 4; y stays with the saved set
    # loss: 124 + 7 = 131; then z goes (-4), its gradient (4) and the live 6 come: 130
    ("B2", 130, 137, 128),  # + 2 + 5; then - 3 private - y 2 + 5 + gradient 2 - 4
    ("B1", 128, 135, 120),  # + 2 + 5; then - 3 private - table 8 - x 1 + 5 + gradient 1 - 2
    ("B0", 120, 127, 115),  # + 2 + 5; then - 3 private + 5 + gradient 0 - 1 - live 6 + ... = 3 * 5 above the workspace
]


def test_keep_all_by_hand() -> None:
    timeline = simulate(pass_through_chain(), keep_all(pass_through_chain()))
    found = [(m.before_bytes, m.peak_bytes, m.after_bytes) for m in timeline.moments]
    assert found == [tuple(row[1:]) for row in BY_HAND]
    assert (timeline.tail.before_bytes, timeline.tail.peak_bytes, timeline.tail.after_bytes) == (124, 131, 130)
    assert (timeline.peak_bytes, timeline.peak_action, timeline.peak_in_tail) == (137, 3, False)
    assert (timeline.total_s, timeline.recompute_s, timeline.num_forwards) == (9.0, 0.0, (1, 1, 1))


def test_a_table_is_counted_once_however_many_boundaries_hold_it() -> None:
    chain = pass_through_chain()
    timeline = simulate(chain, from_text("F0 S1 F1 S2 F2 K2 D2 B2 K1 D1 B1 K0 B0"))
    after = [moment.after_bytes for moment in timeline.moments[:5]]
    assert after == [109, 109, 111, 111, 115]


def test_the_loss_can_set_the_peak() -> None:
    chain = uniform_chain(2)
    heavy = type(chain)(chain.storage_bytes, chain.blocks, chain.boundaries, tail_peak_bytes=50)
    timeline = simulate(heavy, keep_all(heavy))
    assert (timeline.peak_bytes, timeline.peak_in_tail, timeline.peak_action) == (50 + 6, True, 1)
    assert timeline.tail_after == 1


def test_a_replay_stops_early_only_before_its_own_backward() -> None:
    chain = uniform_chain(2, replay_s=0.25)
    early = simulate(chain, from_text("F0 S1 F1 K1 D1 B1 K0 B0"))
    assert early.recompute_s == 0.5
    assert early.total_s == 2 + 0.5 + 2
    segment = simulate(chain, from_text("F0 F1 K0 K1 B1 B0"))
    assert segment.recompute_s == 1.25


def test_the_first_sweep_never_stops_early() -> None:
    chain = uniform_chain(1, replay_s=0.25)
    assert simulate(chain, from_text("K0 B0")).total_s == 2.0


def test_an_offloaded_boundary_leaves_when_its_copy_ends_and_comes_back_at_reload() -> None:
    chain = uniform_chain(4)
    text = "F0 S1 O1 F1 F2 K3 R1 B3 F1 K2 B2 K1 D1 B1 K0 B0"
    stored = simulate(chain, from_text(text.replace("O1 ", "").replace("R1 ", "")))
    moved = simulate(chain, from_text(text), link_bytes_per_s=1.0)
    live = {str(a): m.before_bytes for a, m in zip(from_text(text).actions, moved.moments, strict=True)}
    plain_text = from_text(text.replace("O1 ", "").replace("R1 ", ""))
    plain = {str(a): m.before_bytes for a, m in zip(plain_text.actions, stored.moments, strict=True)}
    # The copy of one byte takes one second: it runs beside F1, so the byte is gone when F2 starts.
    assert [live[k] - plain[k] for k in ("Forward(block=2)", "ForwardSave(block=3, option=0)")] == [-1, -1]
    assert live["Backward(block=3, option=0)"] == plain["Backward(block=3, option=0)"]
    assert moved.total_s == stored.total_s


def test_reading_a_boundary_waits_for_its_copy() -> None:
    chain = uniform_chain(2)
    text = "F0 S1 O1 F1 R1 K1 D1 B1 K0 B0"
    assert simulate(chain, from_text(text), link_bytes_per_s=0.1).total_s == 1 + 10 + 10 + 4


def test_offload_needs_a_bandwidth() -> None:
    with pytest.raises(ScheduleError, match="`link_bytes_per_s=None` but the schedule offloads"):
        simulate(uniform_chain(2), from_text("F0 S1 O1 F1 R1 K1 D1 B1 K0 B0"))


def test_simulate_refuses_an_illegal_schedule() -> None:
    with pytest.raises(ScheduleError, match="action 2"):
        simulate(uniform_chain(2), from_text("K0 K1 B0"))


def test_moments_follow_each_other() -> None:
    chain = uniform_chain(5)
    schedule = from_text("F0 F1 S2 F2 K3 K4 B4 B3 K2 D2 B2 F0 K1 B1 K0 B0")
    timeline = simulate(chain, schedule)
    assert len(timeline.moments) == len(schedule.actions)
    ends = [moment.end_s for moment in timeline.moments]
    assert [moment.start_s for moment in timeline.moments[1:]] == ends[:-1]
    assert all(m.peak_bytes >= max(m.before_bytes, m.after_bytes) for m in timeline.moments)
    forwards = sum(isinstance(action, ForwardSave) for action in schedule.actions) + 4
    assert sum(timeline.num_forwards) == forwards
