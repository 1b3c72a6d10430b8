"""Capture what surrounds a block's first run, autocast and random state, and restore it around a replay.

Autocast is captured when the step begins, the generators before each random block. A replay never draws new random
numbers: the generators end where they were.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "Autocast",
    "RandomState",
    "autocast_as",
    "autocast_now",
    "closing_regions",
    "device_type_of",
    "random_state_now",
    "set_random_state",
]


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast setting of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool


def device_type_of(devices: Sequence[torch.device]) -> tuple[str, ...]:
    """Return the sorted device types to guard, with the CPU's."""
    return tuple(sorted({"cpu", *(d.type for d in devices if d.type != "meta")}))


def autocast_now(device_types: Sequence[str]) -> tuple[Autocast, ...]:
    """Return the autocast settings in force now."""
    cache = torch.is_autocast_cache_enabled()
    return tuple(
        Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache) for kind in device_types
    )


@contextlib.contextmanager
def autocast_as(settings: Sequence[Autocast]) -> Generator[None]:
    """Run the body under the given autocast settings."""
    with contextlib.ExitStack() as stack:
        for s in settings:
            stack.enter_context(
                torch.amp.autocast(s.device_type, enabled=s.enabled, dtype=s.dtype, cache_enabled=s.cache_enabled)
            )
        yield


@contextlib.contextmanager
def closing_regions() -> Generator[None]:
    """Leave every autocast and `no_grad` region that the body entered and that an exception kept it from leaving.

    A traced block enters and leaves a region by two plain calls, and a replay that stops early never reaches the
    second. With autocast left open, later steps would use this step's cached weights.
    """
    nesting = _autocast_nesting()
    settings = autocast_now(("cpu", "cuda"))
    grad_mode = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad_mode)
        if _autocast_nesting() > nesting:
            while torch.autocast_decrement_nesting() > nesting:
                pass
            if nesting == 0:
                torch.clear_autocast_cache()
            for s in settings:
                torch.set_autocast_enabled(s.device_type, s.enabled)
                torch.set_autocast_dtype(s.device_type, s.dtype)
                torch.set_autocast_cache_enabled(s.cache_enabled)


def _autocast_nesting() -> int:
    # In one line: an interrupt between two lines would leave the region open that is entered only to be counted.
    return (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1]


@dataclass(frozen=True, slots=True)
class RandomState:
    """The state of the CPU's generator, and of the CUDA devices in use, by device index."""

    cpu: torch.Tensor
    cuda: tuple[tuple[int, torch.Tensor], ...]

    def same_as(self, other: "RandomState") -> bool:
        """Return whether both hold the same states, bit for bit."""
        mine, theirs = ([state.cpu, *(t for _, t in state.cuda)] for state in (self, other))
        return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def random_state_now(devices: Sequence[torch.device]) -> RandomState:
    """Return the states of the generators of the CPU and of the CUDA devices among `devices`."""
    indices = sorted({d.index for d in devices if d.type == "cuda"})
    return RandomState(torch.get_rng_state(), tuple((i, torch.cuda.get_rng_state(i)) for i in indices))


def set_random_state(state: RandomState) -> None:
    """Restore the generators to `state`."""
    torch.set_rng_state(state.cpu)
    for index, value in state.cuda:
        torch.cuda.set_rng_state(value, index)
