"""The one set of checks that every executor has to pass on every architecture of the zoo, under every budget.

By default the fast architectures are trained; the others are marked `slow`.
"""

import pytest

from benchmarks.conformance_check import BUDGETS, Executor, check
from benchmarks.zoo import ZOO, Architecture

# Compiling takes a minute and more for most.
_FAST_COMPILED = {"dlrm"}


def _is_fast(architecture: Architecture, executor: Executor) -> bool:
    return architecture.is_fast if executor is Executor.EAGER else architecture.name in _FAST_COMPILED


_CASES = [
    pytest.param(
        architecture,
        executor,
        marks=() if _is_fast(architecture, executor) else pytest.mark.slow,
        id=f"{architecture.name}-{executor.value}",
    )
    for executor in Executor
    for architecture in ZOO
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("architecture", "executor"), _CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_training_is_the_same_within_the_budget(architecture: Architecture, executor: Executor, budget: str) -> None:
    result = check(architecture, executor, budget)
    assert result.sameness.first_difference == ""
    assert result.measured_peak_bytes <= result.budget_bytes
    assert result.blocks is architecture.blocks
    assert result.replayed_blocks + result.num_partial > 0
    assert result.out_of_order_blocks == 0


def test_the_zoo_is_large_and_its_names_are_unique() -> None:
    names = [architecture.name for architecture in ZOO]
    assert len(set(names)) == len(names) >= 25
