"""Train one public architecture at 50 % and at the smallest budget, and ask of each what conformance asks."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.conformance_check import Executor, check
from benchmarks.conformance_training import NUM_STEPS, Training, differences
from benchmarks.public_models_list import NoTinyConfigError, architecture_of, listed
from benchmarks.public_models_table import HALF, SMALLEST
from benchmarks.zoo import Architecture

__all__ = ["train"]

_NEVER_ENOUGH = "1B"


def train(key: str) -> Iterator[dict[str, Any]]:
    """Yield what is known of the architecture `key`, more each time; the last one is complete.

    A `reason` says that it cannot be tried. Otherwise `50%` and `smallest` have a `Conformity` each, the first one
    `None` if 50 % is refused: what is trained then is the smallest budget that the refusal named.
    """
    (model,) = [one for one in listed() if one.key == key]
    try:
        architecture = architecture_of(model)
    except NoTinyConfigError as error:
        yield {"reason": str(error)}
        return
    found: dict[str, Any] = {"built": True}
    yield found
    half = check(architecture, Executor.EAGER, HALF)
    found = found | {HALF: None if half.is_smallest else asdict(half)}
    yield found
    smallest = half if half.is_smallest else check(architecture, Executor.EAGER, _NEVER_ENOUGH)
    same = half.sameness.all_equal and smallest.sameness.all_equal
    yield found | {SMALLEST: asdict(smallest), "is_repeatable": same or _is_repeatable(architecture)}


def _is_repeatable(architecture: Architecture) -> bool:
    """Whether a plain training that is begun again has the bits of a new one, as the check needs."""
    again, new = (Training(architecture, torch.device("cpu")) for _ in range(2))
    again.peak_bytes()
    again.restart()
    steps = [(again.step(), new.step()) for _ in range(NUM_STEPS)]
    return not any(differences(getattr(a, name), getattr(b, name)) for a, b in steps for name in a.__slots__)
