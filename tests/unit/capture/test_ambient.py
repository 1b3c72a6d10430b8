"""What surrounds a block is put back: settings, generators, and regions that an exception left open."""

import random
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinybp_lightning.capture.torch.ambient import (
    changed_settings,
    closing_regions,
    generators_in,
    keeping_casts,
    random_state_now,
    register_ambient,
    set_random_state,
    settings_as,
    settings_now,
)
from tinybp_lightning.errors import ConfigError

CPU = torch.device("cpu")


def casts() -> torch.dtype:
    return nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype


def test_autocast_is_seen_again() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        settings = settings_now()
    assert casts() is torch.float32
    with settings_as(settings):
        assert casts() is torch.bfloat16
    assert casts() is torch.float32


def test_autocast_turned_off_is_seen_again() -> None:
    settings = settings_now()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with settings_as(settings):
            assert casts() is torch.float32
        assert casts() is torch.bfloat16


def fill_uninitialised() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False


def switch(flags: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(flags, name, value)


SWITCHES: list[tuple[str, Callable[[], object]]] = [
    ("autocast", lambda: torch.set_autocast_enabled("cpu", True)),
    ("autocast", lambda: torch.set_autocast_dtype("cuda", torch.bfloat16)),
    ("autocast", lambda: torch.set_autocast_cache_enabled(False)),
    ("attention backends", lambda: torch.backends.cuda.enable_flash_sdp(False)),
    ("attention backends", lambda: torch.backends.cuda.enable_math_sdp(False)),
    ("attention backends", lambda: torch.backends.cuda.enable_mem_efficient_sdp(False)),
    ("attention backends", lambda: torch.backends.cuda.enable_cudnn_sdp(False)),
    ("float32 precision", lambda: torch.set_float32_matmul_precision("medium")),
    ("float32 precision", switch(torch.backends.cudnn.rnn, "fp32_precision", "ieee")),
    ("float32 precision", switch(torch.backends.cudnn.conv, "fp32_precision", "ieee")),
    ("kernels", switch(torch.backends.cudnn, "benchmark", True)),
    ("kernels", switch(torch.backends.cudnn, "deterministic", True)),
    ("kernels", switch(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)),
    ("kernels", lambda: torch._C._set_mkldnn_enabled(False)),
    ("deterministic algorithms", lambda: torch.use_deterministic_algorithms(True)),
    ("deterministic algorithms", lambda: torch.use_deterministic_algorithms(True, warn_only=True)),
    ("deterministic algorithms", fill_uninitialised),
    ("default dtype", lambda: torch.set_default_dtype(torch.float64)),
    ("default device", lambda: torch.set_default_device("meta")),
]


@pytest.mark.parametrize(("name", "change"), SWITCHES)
def test_a_setting_is_put_in_place_and_taken_back(name: str, change: Callable[[], object]) -> None:
    before = settings_now()
    try:
        with settings_as(before):
            change()
            changed = settings_now()
        assert list(changed_settings(before, changed)) == [name]
        assert settings_now() == before
        with settings_as(changed):
            assert settings_now() == changed
        assert settings_now() == before
    finally:
        with settings_as(before):
            pass


def test_the_order_of_attention_backends_is_a_setting() -> None:
    before = settings_now()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        inside = settings_now()
    with settings_as(inside):
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.MATH)
    assert settings_now() == before


def test_mixed_spellings_of_a_precision_do_not_raise() -> None:
    """Torch refuses to name the matmul precision once the newer attributes have set it."""
    before = settings_now()
    with settings_as(before):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert settings_now() != before
    assert settings_now() == before


def draw_numpy() -> object:
    return np.random.rand()  # noqa: NPY002 - the global generator is what users draw from


@pytest.mark.parametrize("draw", [lambda: torch.rand(3).tolist(), random.random, draw_numpy])
def test_global_generators_are_put_back(draw: Callable[[], object]) -> None:
    state = random_state_now([CPU], ())
    first = draw()
    moved = state.moved(random_state_now([CPU], ()))
    assert len(moved.states) == 1
    set_random_state(moved)
    assert draw() == first


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (torch.Generator(), lambda g: torch.rand(2, generator=g).tolist()),
        (random.Random(1), lambda g: g.random()),
        (np.random.default_rng(1), lambda g: g.random()),
        (np.random.RandomState(1), lambda g: g.rand()),
    ],
)
def test_generators_of_ones_own_are_found_and_put_back(generator: object, draw: Callable[[object], object]) -> None:
    owned = generators_in([3, {"of a dict": generator}, [generator]])
    assert len(owned) == 1
    state = random_state_now([CPU], owned)
    first = draw(generator)
    moved = state.moved(random_state_now([CPU], owned))
    assert len(moved.states) == 1
    set_random_state(moved)
    assert draw(generator) == first


def test_what_draws_nothing_has_moved_nothing() -> None:
    state = random_state_now([CPU], ())
    assert state.moved(random_state_now([CPU], ())).states == ()


def test_a_setting_of_ones_own() -> None:
    backend = ["fast"]
    remove = register_ambient("my backend", lambda: backend[0], lambda value: backend.__setitem__(0, value))
    try:
        fast = settings_now()
        backend[0] = "exact"
        with settings_as(fast):
            assert backend == ["fast"]
        assert backend == ["exact"]
        with pytest.raises(ConfigError, match="in use"):
            register_ambient("my backend", list, print)
    finally:
        remove()
    assert "my backend" not in dict(settings_now())


def test_a_generator_of_ones_own() -> None:
    position = [0]
    remove = register_ambient("tape", lambda: position[0], lambda value: position.__setitem__(0, value), advances=True)
    try:
        state = random_state_now([CPU])
        position[0] += 1
        assert [s.name for s, _ in state.moved(random_state_now([CPU])).states] == ["tape"]
        set_random_state(state)
        assert position == [0]
    finally:
        remove()


def test_wrong_entries_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected a function"):
        register_ambient("x", 3, print)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hashed"):
        register_ambient("x", list, print)


def leave_open() -> None:
    torch.amp.autocast_mode._enter_autocast("cpu", torch.bfloat16, True, None)
    torch.backends.cuda.enable_math_sdp(False)
    torch.set_grad_enabled(False)
    raise KeyError


def enter_and_leave() -> None:
    with pytest.raises(KeyError), closing_regions():
        leave_open()


def test_regions_left_open_are_closed() -> None:
    before = (settings_now(), torch.is_grad_enabled())
    enter_and_leave()
    assert (settings_now(), torch.is_grad_enabled()) == before
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


def test_cast_weights_are_not_kept_beyond_a_region_left_open() -> None:
    """Were the nesting not mended, autocast would go on using a weight's old copy."""
    linear = nn.Linear(2, 2, bias=False)
    x = torch.ones(1, 2)

    def use_and_leave_open() -> None:
        with closing_regions(), torch.autocast("cpu", dtype=torch.bfloat16):
            linear(x)
            leave_open()

    with pytest.raises(KeyError):
        use_and_leave_open()
    with torch.no_grad():
        linear.weight.fill_(3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x), torch.full((1, 2), 6.0, dtype=torch.bfloat16))


def test_casts_are_kept_from_region_to_region_and_not_longer() -> None:
    linear = nn.Linear(2, 2, bias=False)
    x = torch.ones(1, 2)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear(x)

    with keeping_casts():
        first = run()
        linear.weight.data.fill_(3.0)
        assert torch.equal(run(), first)
    assert torch.equal(run(), torch.full((1, 2), 6.0, dtype=torch.bfloat16))


def test_a_region_around_stays_open() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        enter_and_leave()
        assert casts() is torch.bfloat16
        assert not torch.is_grad_enabled()
    assert casts() is torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the order is CUDA's")
def test_attention_runs_under_the_settings_that_were_read_before_it() -> None:
    torch.cuda.init()
    code = """
import torch
from tinybp_lightning.capture.torch.ambient import settings_now
q = torch.randn(1, 2, 256, 128, device="cuda", dtype=torch.bfloat16)
before = settings_now()
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
assert settings_now() == before, "torch has changed the order of backends"
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # in a process that has run no attention yet
