"""What is logged for a batch, and what is left alone?"""

from types import SimpleNamespace
from typing import Any

import pytest

from tinybp_lightning.integrations._shared.step_log import StepLogMixin, summarise
from tinybp_lightning.runtime.profile import StepProfile

MIB = 2**20


def profile(*, predicted_mib: int, measured_mib: int | None = None, replay_s: float, step_s: float) -> StepProfile:
    measured_bytes = None if measured_mib is None else measured_mib * MIB
    return StepProfile(
        target="Model",
        step=1,
        predicted_peak_bytes=predicted_mib * MIB,
        measured_peak_bytes=measured_bytes,
        replayed_blocks=1,
        advanced_blocks=0,
        out_of_order_blocks=0,
        replay_s=replay_s,
        step_s=step_s,
        plan_summary="",
    )


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ([profile(predicted_mib=3, replay_s=1, step_s=4)], (3.0, 0.25)),
        ([profile(predicted_mib=3, measured_mib=2, replay_s=0, step_s=4)], (2.0, 0.0)),
        (
            [profile(predicted_mib=3, replay_s=1, step_s=2), profile(predicted_mib=5, replay_s=0, step_s=2)],
            (5.0, 0.25),
        ),
        ([profile(predicted_mib=3, replay_s=0, step_s=0)], (3.0, 0.0)),
    ],
    ids=["predicted", "measured", "two backwards", "no time"],
)
def test_summary(profiles: list[StepProfile], expected: tuple[float, float]) -> None:
    peak_mib, recompute_share = expected
    assert summarise(profiles) == {"hcb/peak_mib": peak_mib, "hcb/recompute_share": recompute_share}


class Module:
    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], dict[str, Any]]] = []

    def log_dict(self, values: dict[str, float], **options: Any) -> None:
        self.calls.append((values, options))


def end_batch(log: StepLogMixin, *, logger: object = None, barebones: bool = False) -> list[Any]:
    module = Module()
    log.on_train_batch_end(SimpleNamespace(logger=logger, barebones=barebones), module, None, None, 0)
    return module.calls


@pytest.mark.parametrize("logger", [None, object()], ids=["no logger", "logger"])
def test_logs_each_profile_once_and_to_a_logger_only_where_there_is_one(logger: object) -> None:
    log = StepLogMixin()
    log.on_replay(profile(predicted_mib=3, replay_s=1, step_s=4))
    options = {"prog_bar": True, "logger": logger is not None, "on_step": True, "on_epoch": False, "batch_size": 1}
    assert end_batch(log, logger=logger) == [({"hcb/peak_mib": 3.0, "hcb/recompute_share": 0.25}, options)]
    assert end_batch(log, logger=logger) == []


def test_a_barebones_trainer_is_left_alone() -> None:
    log = StepLogMixin()
    log.on_replay(profile(predicted_mib=3, replay_s=1, step_s=4))
    assert end_batch(log, barebones=True) == []
