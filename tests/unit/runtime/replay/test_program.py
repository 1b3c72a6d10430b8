"""A schedule is split at its backwards into what autograd can drive."""

import random
from dataclasses import replace

import pytest

from tests.unit.schedule.chains_by_hand import random_chain, uniform_chain
from tinybp_lightning.errors import ScheduleError
from tinybp_lightning.graph.ids import BlockId, BoundaryId
from tinybp_lightning.graph.join import join_chains, spans
from tinybp_lightning.runtime.torch.replay.program import ReplayProgram, part_of_program, replay_program_of
from tinybp_lightning.schedule import verify_schedule
from tinybp_lightning.schedule.actions import Action, Backward, Forward, ForwardSave, Schedule, Store
from tinybp_lightning.schedule.baselines import revolve
from tinybp_lightning.schedule.notation import from_text, to_text
from tinybp_lightning.schedule.planner.planner import Planner


def words(text: str) -> list[str]:
    """Each block's replay steps, with `!` behind a `K` whose outputs nobody reads."""
    program = replay_program_of(from_text(text))
    return [
        " ".join(to_text(Schedule(1, (step.action,))) + ("!" if step.stops_early else "") for step in steps)
        for steps in program.steps
    ]


@pytest.mark.parametrize(
    ("schedule", "kept", "stored", "steps"),
    [
        ("K0 K1 B1 B0", (True, True), set(), ["", ""]),
        ("F0 S1 F1 K1 D1 B1 K0 B0", (False, False), {1}, ["K0!", "K1! D1"]),
        ("F0 S1 K1 D1 B1 K0 B0", (False, True), {1}, ["K0!", "D1"]),
        # A boundary that the sweep itself lets go of is not stored from it.
        ("F0 S1 F1 D1 F0 K1 B1 K0 B0", (False, False), {1}, ["K0!", "D1 F0 K1!"]),
        ("F0 S1 F1 D1 S2 F2 K2 D2 B2 F0 K1 B1 K0 B0", (False, False, False), {2}, ["K0!", "F0 K1!", "K2! D2"]),
        # The outputs of a replay that the next action reads keep it from stopping early.
        ("F0 F1 K2 B2 K0 K1 B1 B0", (False, False, True), set(), ["", "K0 K1!", ""]),
        ("F0 F1 F2 K0 S1 F1 K2 B2 K1 D1 B1 B0", (False, False, False), set(), ["", "K1! D1", "K0 S1 F1 K2!"]),
    ],
)
def test_split(schedule: str, kept: tuple[bool, ...], stored: set[int], steps: list[str]) -> None:
    program = replay_program_of(from_text(schedule))
    assert program.kept == kept
    assert program.stored == stored
    assert words(schedule) == steps


def test_every_action_of_a_long_schedule_is_among_the_replay_steps() -> None:
    schedule = revolve(uniform_chain(40), num_slots=4)
    program = replay_program_of(schedule)
    num_steps = sum(len(steps) for steps in program.steps)
    assert num_steps + len(program.kept) + len(program.stored) + 40 == len(schedule.actions)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [("F0 S1 O1 F1 R1 K1 B1 K0 B0", "host memory"), ("K0.1 B0", "uses option `0`")],
)
def test_what_the_engine_cannot_play_is_an_error(schedule: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        replay_program_of(from_text(schedule))


def test_every_run_of_a_block_goes_by_the_option_of_its_backward() -> None:
    assert replay_program_of(from_text("F0 S1 F1 K1.2 D1 B1.2 K0.1 B0.1")).options == (1, 2)


def _schedule_of(program: ReplayProgram) -> Schedule:
    """Return a program as the schedule that autograd makes of it."""
    actions: list[Action] = []
    for b, is_kept in enumerate(program.kept):
        actions.append(ForwardSave(BlockId(b), program.options[b]) if is_kept else Forward(BlockId(b)))
        if b + 1 in program.stored:
            actions.append(Store(BoundaryId(b + 1)))
    for b in reversed(range(len(program.kept))):
        actions += [
            replace(a, option=program.options[a.block]) if isinstance(a, ForwardSave) else a
            for a in (step.action for step in program.steps[b])
        ]
        actions.append(Backward(BlockId(b), program.options[b]))
    return Schedule(len(program.kept), tuple(actions))


@pytest.mark.parametrize("seed", range(20))
def test_each_call_of_a_joined_plan_plays_its_own_part(seed: int) -> None:
    rng = random.Random(seed)
    calls = [random_chain(rng, rng.randint(1, 7)) for _ in range(rng.randint(2, 4))]
    joined = join_chains(calls, [0] * len(calls[-1].blocks))
    planner = Planner(joined)
    budget_bytes = rng.randint(planner.smallest_bytes, planner.largest_bytes)
    program = replay_program_of(planner.plan(budget_bytes=budget_bytes).schedule)
    for chain, span in zip(calls, spans(calls), strict=True):
        part = part_of_program(program, span)
        verify_schedule(chain, _schedule_of(part))
        assert part.kept == program.kept[span.start : span.stop]


def test_a_later_calls_replay_leaves_to_an_earlier_call_what_is_the_earlier_ones() -> None:
    """Blocks 0 and 1 are the first call, 3 and 4 the second; a replay of 4 runs from the start of the first."""
    program = replay_program_of(from_text("F0 F1 F2 F3 F4 F0 S1 F1 F2 F3 K4 B4 F1 F2 K3 B3 F1 K2 B2 K1 D1 B1 K0 B0"))
    first, second = part_of_program(program, range(2)), part_of_program(program, range(3, 5))
    assert to_text(_schedule_of(first)) == "F0 F1 F0 S1 K1 D1 B1 K0 B0"
    assert to_text(_schedule_of(second)) == "F0 F1 F0 K1 B1 K0 B0"
