"""What surrounds a block is put back: autocast, generators, and regions that an exception left open."""

import pytest
import torch
from torch import nn

from tinybp_lightning.runtime.torch.replay.ambient import (
    autocast_as,
    autocast_now,
    closing_regions,
    device_type_of,
    random_state_now,
    set_random_state,
)

CPU = torch.device("cpu")


def casts() -> torch.dtype:
    return nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype


def test_autocast_is_seen_again() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        settings = autocast_now(("cpu",))
    assert casts() is torch.float32
    with autocast_as(settings):
        assert casts() is torch.bfloat16
    assert casts() is torch.float32


def test_autocast_turned_off_is_seen_again() -> None:
    settings = autocast_now(("cpu",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with autocast_as(settings):
            assert casts() is torch.float32
        assert casts() is torch.bfloat16


def test_random_state_is_put_back() -> None:
    state = random_state_now([CPU])
    first = torch.rand(3)
    assert not random_state_now([CPU]).same_as(state)
    set_random_state(state)
    assert random_state_now([CPU]).same_as(state)
    assert torch.equal(torch.rand(3), first)


def test_devices_to_guard() -> None:
    assert device_type_of([torch.device("meta"), torch.device("cuda", 1), torch.device("cuda", 0)]) == ("cpu", "cuda")


def leave_open() -> None:
    torch.amp.autocast_mode._enter_autocast("cpu", torch.bfloat16, True, None)
    torch.set_grad_enabled(False)
    raise KeyError


def enter_and_leave() -> None:
    with pytest.raises(KeyError), closing_regions():
        leave_open()


def test_regions_left_open_are_closed() -> None:
    before = (autocast_now(("cpu", "cuda")), torch.is_grad_enabled())
    enter_and_leave()
    assert (autocast_now(("cpu", "cuda")), torch.is_grad_enabled()) == before
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


def test_a_region_around_stays_open() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        enter_and_leave()
        assert casts() is torch.bfloat16
        assert not torch.is_grad_enabled()
    assert casts() is torch.float32
