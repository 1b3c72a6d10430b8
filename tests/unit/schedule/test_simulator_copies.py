"""Copies to host memory, counted by hand: two directions, shared storages, what waits for what."""

import pytest

from tests.unit.schedule.chains_by_hand import pass_through_chain, uniform_chain
from tinybp_lightning.errors import ConfigError
from tinybp_lightning.graph import Chain
from tinybp_lightning.schedule import from_text, simulate


def _live(chain: Chain, text: str, *, rate: float) -> dict[str, int]:
    """Return the bytes alive before each action, by its word; a word that comes twice keeps its last."""
    schedule = from_text(text, num_blocks=len(chain.blocks))
    moments = simulate(chain, schedule, link_bytes_per_s=rate).moments
    return dict(zip(text.split(), (m.before_bytes for m in moments), strict=True))


def test_copies_of_one_direction_follow_each_other() -> None:
    # Two seconds a byte: boundary 1 leaves from 1 s to 3 s, boundary 2 (offered at 2 s) from 3 s to 5 s.
    live = _live(
        uniform_chain(6),
        "F0 S1 O1 F1 S2 O2 F2 F3 F4 K5 B5 R2 F2 F3 K4 B4 F2 K3 B3 K2 D2 B2 R1 K1 D1 B1 K0 B0",
        rate=0.5,
    )
    assert [live[word] for word in ("K5", "B5")] == [1, 3]
    stays = _live(uniform_chain(6), "F0 S1 F1 S2 F2 F3 F4 K5 B5 F2 F3 K4 B4 F2 K3 B3 K2 D2 B2 K1 D1 B1 K0 B0", rate=0.5)
    assert [stays[word] for word in ("K5", "B5")] == [3, 5]


def test_the_two_directions_do_not_wait_for_each_other() -> None:
    chain = uniform_chain(4)
    text = "F0 S1 O1 F1 S2 F2 F3 F2 O2 R1 K3 B3 R2 K2 D2 B2 K1 D1 B1 K0 B0"
    timeline = simulate(chain, from_text(text), link_bytes_per_s=0.5)
    starts = dict(zip(text.split(), (m.start_s for m in timeline.moments), strict=True))
    # O2 at 5 s leaves till 7 s, R1 at 5 s arrives at 7 s, R2 at 7 s at 9 s: K2 waits for two seconds, K1 not at all.
    assert (starts["O2"], starts["R1"], starts["K3"], starts["R2"]) == (5, 5, 5, 7)
    assert (timeline.wait_s, timeline.total_s) == (2, 4 + 5 + 4 + 2)


def test_a_storage_of_two_boundaries_is_copied_once() -> None:
    # Boundary 1: table 8 and x 1; boundary 2: table and y 2. Nine bytes leave, then only y's two.
    chain = pass_through_chain()
    text = "F0 S1 O1 F1 S2 O2 F2 R2 K2 D2 B2 R1 K1 D1 B1 K0 B0"
    timeline = simulate(chain, from_text(text), link_bytes_per_s=1.0)
    starts = dict(zip(text.split(), (m.start_s for m in timeline.moments), strict=True))
    # O1 at 1 s leaves till 10 s, O2 at 2 s till 12 s; R2 (at 3 s) waits for that and brings 10 bytes back till 22 s.
    assert starts["K2"] == 12
    assert starts["B2"] == 22 + 1
    # After K2 and D2, block 1's replay needs table and x again: nothing holds them, so both are copied.
    assert starts["K1"] == 25
    assert timeline.total_s == 25 + 9 + 1 + 2 + 1 + 2


def test_what_another_boundary_holds_is_not_copied_back() -> None:
    chain = pass_through_chain()
    text = "F0 S1 O1 F1 S2 F2 K2 D2 R1 B2 K1 D1 B1 K0 B0"
    kept = simulate(chain, from_text(text.replace("D2 R1", "R1 D2")), link_bytes_per_s=9.0)
    # The table never left: boundary 2 holds it. One byte takes a ninth of a second and hides under B2.
    assert kept.wait_s == 0
    assert kept.moments[-1].after_bytes == 115


def test_a_boundary_dropped_while_it_arrives_is_held_until_it_is_there() -> None:
    rest = ["D1", "K0", "F1", "F2", "K3", "B3", "F0", "F1", "K2", "B2", "F0", "K1", "B1", "B0"]
    words = {rest.index("F2"): 1, rest.index("K3"): 1, rest.index("B3"): 0}
    chain = uniform_chain(4)
    held = simulate(chain, from_text("F0 S1 O1 F1 F2 F3 R1 " + " ".join(rest)), link_bytes_per_s=0.25)
    gone = simulate(chain, from_text("F0 S1 O1 F1 F2 F3 " + " ".join(rest)), link_bytes_per_s=0.25)
    # R1 waits at 4 s till the byte has left at 5 s; it arrives at 9 s, when B3 starts.
    found = {k: held.moments[7 + k].before_bytes - gone.moments[6 + k].before_bytes for k in words}
    assert found == words


def test_a_boundary_leaves_again_only_when_it_has_arrived() -> None:
    chain = uniform_chain(3)
    text = "F0 S1 O1 F1 F2 R1 O1 F0 F1 K2 B2 R1 K1 D1 B1 K0 B0"
    timeline = simulate(chain, from_text(text), link_bytes_per_s=0.25)
    # Out from 1 s to 5 s; R1 at 3 s waits till 5 s, arrives at 9 s; out again till 13 s, and R1 waits: back at 17 s.
    assert timeline.total_s == 17 + 1 + 1 + 1 + 1
    assert timeline.wait_s == timeline.total_s - 3 - 2 - 1 - 1 - 2 * 2


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_refuses_a_bandwidth_that_is_none(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"`link_bytes_per_s={rate}`"):
        simulate(uniform_chain(2), from_text("K0 K1 B1 B0"), link_bytes_per_s=rate)
