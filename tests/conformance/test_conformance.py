"""The one set of checks that every executor has to pass on every architecture of the zoo, under every budget.

By default the fast architectures are trained; the others are marked `slow`.
"""

import pytest

from benchmarks.conformance_check import BUDGETS, Executor, check
from benchmarks.zoo import ZOO, Architecture

_ARCHITECTURES = [
    pytest.param(architecture, marks=() if architecture.is_fast else pytest.mark.slow, id=architecture.name)
    for architecture in ZOO
]


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("executor", Executor, ids=lambda executor: executor.value)
def test_training_is_the_same_within_the_budget(architecture: Architecture, budget: str, executor: Executor) -> None:
    result = check(architecture, executor, budget)
    assert result.sameness.first_difference == ""
    assert result.measured_peak_bytes <= result.budget_bytes
    assert result.blocks is architecture.blocks
    assert result.replayed_blocks > 0
    assert result.rescued_blocks == 0


def test_the_zoo_is_large_and_its_names_are_unique() -> None:
    names = [architecture.name for architecture in ZOO]
    assert len(set(names)) == len(names) >= 25
