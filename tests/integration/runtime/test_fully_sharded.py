"""`hcb` over blocks under `fully_shard` (FSDP2): the same gradients on every rank."""

import pytest

from tests.integration.runtime.processes import Rank, run_ranks

CASES = ["fsdp", "fsdp-bf16", "fsdp-keep"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    return run_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_of_fsdp_alone(ranks: dict[str, list[Rank]], case: str) -> None:
    for rank in ranks[case]:
        assert rank.same
        assert rank.replayed[0] > 0
