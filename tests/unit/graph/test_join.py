"""The chain of a step of several calls: what each holds counts until its own backward, and nothing counts twice."""

from dataclasses import replace

from hypothesis import given

from tests.unit.graph.strategies_chain import chains
from tests.unit.schedule.chains_by_hand import uniform_chain
from tinybp_lightning.graph.chain import Chain
from tinybp_lightning.graph.join import join_chains, spans
from tinybp_lightning.graph.verify import verify_chain
from tinybp_lightning.schedule.baselines import keep_all, per_block
from tinybp_lightning.schedule.simulator import simulate


def test_a_single_chain_is_itself() -> None:
    chain = uniform_chain(3)
    assert join_chains([chain], []) is chain
    assert spans([chain]) == (range(3),)


def test_blocks_stand_in_order_with_nothing_between_the_calls() -> None:
    chain = join_chains([uniform_chain(3), uniform_chain(2)], [7, 9])
    assert [block.name for block in chain.blocks[3:]] == ["between two calls", "b0 (call 2)", "b1 (call 2)"]
    assert [block.parameter_gradient_bytes for block in chain.blocks] == [0, 0, 0, 0, 7, 9]
    assert spans([uniform_chain(3), uniform_chain(2), uniform_chain(4)]) == (range(3), range(4, 6), range(7, 11))


@given(chains(), chains(), chains())
def test_any_calls_can_be_joined(a: Chain, b: Chain, c: Chain) -> None:
    joined = join_chains([a, b, c], [0] * len(c.blocks))
    verify_chain(joined)
    assert len(joined.blocks) == len(a.blocks) + len(b.blocks) + len(c.blocks) + 2
    assert joined.unmodelled_bytes == a.unmodelled_bytes + b.unmodelled_bytes + c.unmodelled_bytes
    assert (joined.tail_peak_bytes, joined.tail_live_bytes) == (c.tail_peak_bytes, c.tail_live_bytes)


@given(chains())
def test_two_equal_calls_that_keep_everything_hold_it_twice(chain: Chain) -> None:
    chain = replace(chain, tail_peak_bytes=0, tail_live_bytes=0, unmodelled_bytes=0)
    twice = join_chains([chain, chain], [0] * len(chain.blocks))
    one, two = (simulate(c, keep_all(c)) for c in (chain, twice))
    given_bytes = one.moments[0].before_bytes  # before the first block, whatever the caller holds
    held_bytes = one.tail.before_bytes - given_bytes
    assert two.tail.before_bytes == 2 * given_bytes + 2 * held_bytes
    assert two.total_s == 2 * one.total_s


def test_the_result_of_a_call_is_alive_while_the_next_one_runs() -> None:
    chain = uniform_chain(3)
    one, two = (simulate(c, per_block(c)) for c in (chain, join_chains([chain, chain], [0] * 3)))
    out_bytes = sum(chain.storage_bytes[s] for s in chain.boundaries[-1].storages)
    assert out_bytes > 0
    assert two.moments[-1].after_bytes == one.moments[-1].after_bytes
    assert two.tail.before_bytes >= one.tail.before_bytes + out_bytes
