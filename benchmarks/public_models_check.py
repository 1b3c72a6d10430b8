"""Train one public architecture at 50 % and at the smallest budget, and ask of each what conformance asks."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.conformance_check import Executor, check
from benchmarks.conformance_training import NUM_STEPS, Training, differences
from benchmarks.public_models_list import NoTinyConfigError, architecture_of, listed
from benchmarks.public_models_table import HALF, SMALLEST
from benchmarks.zoo import Architecture
from tinybp_lightning.runtime.torch.dispatcher import Target

__all__ = ["cause_in", "train"]

_NEVER_ENOUGH = "1B"
# What Dynamo says of an op's error, of the line that a branch depends on, and of what it does not know.
_CAUSES = (r"got (\w+\(.*\))$", r", code: (.*)$", r"Developer debug context: (.*)$")


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
    causes: list[str] = []
    with patch.object(Target, "_by_module_steps", _noting(causes)):
        half = check(architecture, Executor.EAGER, HALF)
    found = found | {HALF: None if half.is_smallest else asdict(half), "cause": causes[0] if causes else ""}
    yield found
    smallest = half if half.is_smallest else check(architecture, Executor.EAGER, _NEVER_ENOUGH)
    same = half.sameness.all_equal and smallest.sameness.all_equal
    yield found | {SMALLEST: asdict(smallest), "is_repeatable": same or _is_repeatable(architecture)}


def _noting(causes: list[str]) -> Any:
    """Return the method that begins module steps, which also notes why: the reason that it is given is one line."""
    begin: Any = Target._by_module_steps  # pyright: ignore[reportPrivateUsage]

    def noted(self: Target, *args: Any) -> Any:
        raised = sys.exc_info()[1]
        causes.append(cause_in(str(getattr(raised, "__cause__", None) or "")))
        return begin(self, *args)

    return noted


def cause_in(message: str) -> str:
    """Return the error or the line of code that Dynamo's `message` goes back to; empty if it names none."""
    for pattern in _CAUSES:
        if match := re.search(pattern, message, re.MULTILINE):
            return match[1].strip()[:120]
    return ""


def _is_repeatable(architecture: Architecture) -> bool:
    """Whether a plain training that is begun again has the bits of a new one, as the check needs."""
    again, new = (Training(architecture, torch.device("cpu")) for _ in range(2))
    again.peak_bytes()
    again.restart()
    steps = [(again.step(), new.step()) for _ in range(NUM_STEPS)]
    return not any(differences(getattr(a, name), getattr(b, name)) for a, b in steps for name in a.__slots__)
