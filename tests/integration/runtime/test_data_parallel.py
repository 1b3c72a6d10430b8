"""`hcb` inside plain DDP: the same gradients on every rank, every hook once, and communication that overlaps replay."""

from collections import Counter

import pytest

from tests.integration.runtime.processes import Rank, run_ranks

CASES = [
    "ddp",
    "ddp-find-unused",
    "ddp-static-graph",
    "ddp-bucket-view",
    "ddp-no-sync",
    "ddp-tied",
    "ddp-frozen",
    "ddp-breaks",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    return run_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_of_ddp_alone(ranks: dict[str, list[Rank]], case: str) -> None:
    for rank in ranks[case]:
        assert rank.same
        assert all(num > 0 for num in rank.replayed)


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_is_ready_once(ranks: dict[str, list[Rank]], case: str) -> None:
    num_backwards = 3 if case == "ddp-no-sync" else 1
    for rank in ranks[case]:
        used = [name for name in rank.names if not (case == "ddp-find-unused" and name.startswith("blocks.3."))]
        for step in rank.steps:
            fired = Counter(word.removeprefix("grad ") for word in step if word.startswith("grad "))
            assert fired == dict.fromkeys(used, num_backwards)


@pytest.mark.parametrize("case", CASES)
def test_buckets_are_launched_between_the_replays(ranks: dict[str, list[Rank]], case: str) -> None:
    for rank in ranks[case]:
        # In its first step (with a static graph, its second) DDP learns the order of the parameters.
        for step in rank.steps[2:]:
            last_replay = len(step) - 1 - step[::-1].index("replay")
            assert step[:last_replay].count("bucket") >= step.count("bucket") // 2 >= 2
