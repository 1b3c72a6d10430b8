"""Options that are not compiled: a plan that uses their estimates asks for measurements, and never runs."""

import re
from dataclasses import replace

import pytest

from tests.unit.runtime.controllers import control_loop_of, middle_bytes
from tests.unit.schedule.chains_by_hand import transformer_chain
from tinybp_lightning.errors import BudgetTooSmallError
from tinybp_lightning.graph.chain import Block, Chain, SavedSet
from tinybp_lightning.graph.ids import OptionId
from tinybp_lightning.runtime.torch.controller import OptionsMeasured, unmeasured_options
from tinybp_lightning.runtime.torch.executors.options import (
    estimated_options,
    measured_part,
    options_to_measure,
    prefer_measured,
    with_measured,
)
from tinybp_lightning.schedule.actions import Backward, ForwardSave, Schedule
from tinybp_lightning.schedule.baselines import keep_all, per_block
from tinybp_lightning.schedule.measured import measured_plan
from tinybp_lightning.schedule.planner.planner import Planner
from tinybp_lightning.schedule.simulator import simulate
from tinybp_lightning.schedule.verify import verify_schedule


def _chain(*, saved: float, slower: float, is_estimated: bool, held: float = 1.0) -> Chain:
    """A transformer whose blocks have a second option: it saves a share of the bytes, in a backward `slower` times."""

    def with_option(block: Block) -> Block:
        (first, *_) = block.options
        saved_bytes = int(saved * first.saved_bytes)
        second = replace(
            first,
            name="second",
            saved_bytes=saved_bytes,
            backward_s=slower * first.backward_s,
            backward_peak_bytes=int(held * (first.backward_peak_bytes + first.saved_bytes - saved_bytes)),
            is_estimated=is_estimated,
        )
        return replace(block, options=(first, second))

    chain = transformer_chain(6)
    return replace(chain, blocks=tuple(with_option(block) for block in chain.blocks))


def _options(chain: Chain, budget_bytes: int) -> list[OptionId]:
    found = prefer_measured(Planner(chain).plan(budget_bytes=budget_bytes), chain)
    verify_schedule(chain, found.schedule)
    return [a.option for a in found.schedule.actions if isinstance(a, Backward)]


def test_a_plan_takes_an_estimated_option_where_it_promises_much_and_not_for_little() -> None:
    good = _chain(saved=0.3, slower=1.01, is_estimated=True)
    assert 1 in _options(good, middle_bytes(good))
    little = _chain(saved=0.97, slower=1.0, is_estimated=True)
    budget_bytes = middle_bytes(little)
    assert any(
        isinstance(a, Backward) and a.option for a in Planner(little).plan(budget_bytes=budget_bytes).schedule.actions
    )
    assert set(_options(little, budget_bytes)) == {0}


def test_the_promise_of_a_measured_option_is_taken_however_small() -> None:
    chain = _chain(saved=0.3, slower=1.01, is_estimated=False)
    found = Planner(chain).plan(budget_bytes=middle_bytes(chain))
    assert prefer_measured(found, chain) is found


def test_a_schedule_of_the_measured_part_is_one_of_the_whole_chain() -> None:
    chain = _chain(saved=0.3, slower=1.0, is_estimated=False)

    def with_estimate(block: Block) -> Block:
        (first, second) = block.options
        return replace(block, options=(first, replace(first, is_estimated=True), second))

    chain = replace(chain, blocks=tuple(with_estimate(block) for block in chain.blocks))
    part = measured_part(chain)
    assert estimated_options(part.chain) == frozenset()
    found = Planner(part.chain).plan(budget_bytes=middle_bytes(part.chain))
    whole = part.renumbered(found.schedule)
    verify_schedule(chain, whole)
    assert {a.option for a in whole.actions if isinstance(a, Backward)} == {0, 2}
    assert simulate(chain, whole).peak_bytes == found.peak_bytes


def test_of_equal_blocks_the_option_that_most_take_is_measured_first() -> None:
    chain = transformer_chain(6)
    layer = max(chain.blocks, key=lambda b: sum(b.signature == other.signature for other in chain.blocks))
    equal = [i for i, b in enumerate(chain.blocks) if b.signature == layer.signature]

    def options(first: SavedSet) -> tuple[SavedSet, ...]:
        return (first, replace(first, is_estimated=True), replace(first, is_estimated=True))

    # Light, so that no kind has all its options measured for its share of the step.
    light = [replace(b, options=options(b.options[0]), forward_s=b.forward_s / 100) for b in chain.blocks]
    light = [replace(b, options=tuple(replace(o, backward_s=o.backward_s / 100) for o in b.options)) for b in light]
    heavy = replace(chain.blocks[0], forward_s=100 * chain.blocks[0].forward_s, signature="heavy")
    chain = replace(chain, blocks=(heavy, *light[1:]))
    assert options_to_measure(chain, keep_all(chain)) == frozenset()

    def taking(taken: dict[int, int]) -> Schedule:
        kept = keep_all(chain)
        actions = (
            replace(a, option=OptionId(taken.get(a.block, 0))) if isinstance(a, (Backward, ForwardSave)) else a
            for a in kept.actions
        )
        return replace(kept, actions=tuple(actions))

    assert options_to_measure(chain, taking({equal[0]: 1, equal[1]: 2, equal[2]: 2})) == {(equal[1], 2)}


def test_kinds_that_a_step_spends_its_time_in_have_all_options_measured_unless_all_is_kept() -> None:
    chain = _chain(saved=0.5, slower=3.0, is_estimated=True)
    assert options_to_measure(chain, keep_all(chain)) == frozenset()
    replayed = per_block(chain)
    wanted = options_to_measure(chain, replayed)
    kinds = {chain.blocks[b].signature for b, _ in wanted}
    assert len(wanted) == len(kinds)
    total_s = sum(b.forward_s + b.options[0].backward_s for b in chain.blocks)
    for kind in {b.signature for b in chain.blocks}:
        mine_s = sum(b.forward_s + b.options[0].backward_s for b in chain.blocks if b.signature == kind)
        assert (kind in kinds) == (mine_s >= 0.1 * total_s)


def test_of_one_structure_compiled_apart_each_is_measured() -> None:
    """Blocks of one signature may differ in constants and strides: measuring one says nothing of the other."""
    chain = _chain(saved=0.5, slower=1.1, is_estimated=True)
    layer = max(chain.blocks, key=lambda b: sum(b.signature == other.signature for other in chain.blocks))
    equal = [i for i, b in enumerate(chain.blocks) if b.signature == layer.signature]
    blocks = list(chain.blocks)
    blocks[equal[0]] = replace(layer, options=tuple(replace(o, is_estimated=False) for o in layer.options))
    chain = replace(chain, blocks=tuple(blocks))
    kept = keep_all(chain)
    actions = (
        replace(a, option=OptionId(1)) if isinstance(a, (Backward, ForwardSave)) and a.block in equal else a
        for a in kept.actions
    )
    assert {b for b, _ in options_to_measure(chain, replace(kept, actions=tuple(actions)))} & set(equal[1:])


def test_what_another_process_measured_is_kept_beside_what_is_estimated_here() -> None:
    known = _chain(saved=0.3, slower=3.0, is_estimated=False)
    found = with_measured(known, _chain(saved=0.3, slower=1.0, is_estimated=True))
    assert not estimated_options(found)
    assert found.blocks[1].options[1].backward_s == known.blocks[1].options[1].backward_s


def test_the_first_step_goes_by_measured_options_alone() -> None:
    chain = _chain(saved=0.1, slower=1.0, is_estimated=True, held=0.1)
    control = control_loop_of(chain, middle_bytes(chain) * 2)
    assert set(control.program.options) == {0}
    assert not unmeasured_options(control.state)


def test_a_budget_that_only_estimated_options_meet_has_them_measured_first() -> None:
    chain = _chain(saved=0.1, slower=1.0, is_estimated=True, held=0.1)
    measured_bytes = Planner(measured_part(chain).chain).smallest_bytes
    assert Planner(chain).smallest_bytes < 0.9 * measured_bytes
    control = control_loop_of(chain, int(0.95 * measured_bytes))
    assert unmeasured_options(control.state) == estimated_options(chain)


def test_a_later_plan_too_has_all_options_measured_before_a_budget_is_called_too_small() -> None:
    estimated = _chain(saved=0.1, slower=1.0, is_estimated=True)
    measured = _chain(saved=0.1, slower=1.0, is_estimated=False, held=0.1)
    budget_bytes = int(1.05 * Planner(measured).smallest_bytes)
    known = measured_plan(estimated, keep_all(estimated), headroom_bytes=2 * Planner(estimated).largest_bytes)
    control = control_loop_of(known, budget_bytes)
    assert unmeasured_options(control.state) == estimated_options(estimated)
    control.observe(OptionsMeasured(measured))
    assert control.report.predicted_peak_bytes <= budget_bytes


def test_a_budget_is_called_too_small_by_measured_costs_only() -> None:
    """By its estimate the second option saves nothing at the peak; measured, it does: the budget can be met."""
    estimated = _chain(saved=0.1, slower=1.0, is_estimated=True)
    measured = _chain(saved=0.1, slower=1.0, is_estimated=False, held=0.1)
    smallest_bytes = Planner(measured).smallest_bytes
    assert smallest_bytes < 0.9 * Planner(estimated).smallest_bytes
    budget_bytes = int(1.05 * smallest_bytes)
    control = control_loop_of(estimated, budget_bytes)
    assert unmeasured_options(control.state) == estimated_options(estimated)
    control.observe(OptionsMeasured(measured))
    assert not unmeasured_options(control.state)
    assert control.report.predicted_peak_bytes <= budget_bytes

    control = control_loop_of(estimated, smallest_bytes // 2)
    with pytest.raises(BudgetTooSmallError) as caught:
        control.observe(OptionsMeasured(measured))
    found = re.search(r"needs (\d+) bytes", str(caught.value))
    assert found is not None
    assert int(found[1]) == pytest.approx(1.03 * smallest_bytes, rel=0.01)
    assert caught.value.smallest_bytes > int(found[1])  # a loss is allowed for
