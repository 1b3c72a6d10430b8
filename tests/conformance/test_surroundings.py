"""The same training whatever surrounds the forward, or a part inside it: each state that the registry names."""

import contextlib
import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tinybp_lightning as tbp
from tests.conformance.lockstep import assert_same_training
from tests.conformance.nets import DEVICE, LENGTH, NETS, ROWS, WIDTH, Block, Net, batch
from tinybp_lightning.capture.torch import ambient
from tinybp_lightning.runtime.torch import targets

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def default_dtype() -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def matmul_precision() -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def without_onednn() -> Generator[None]:
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


@contextlib.contextmanager
def deterministic() -> Generator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


FUSED = SDPBackend.FLASH_ATTENTION if DEVICE.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION  # in float32
AROUND: dict[str, Context] = {
    "math attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "fused attention": lambda: sdpa_kernel(FUSED),
    "order of attention backends": lambda: sdpa_kernel([SDPBackend.MATH, FUSED], set_priority=True),
    "autocast": lambda: torch.autocast(DEVICE.type, torch.bfloat16),
    "autocast without cache": lambda: torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False),
    "cuDNN off": lambda: torch.backends.cudnn.flags(enabled=False),
    "cuDNN deterministic": lambda: torch.backends.cudnn.flags(enabled=True, deterministic=True),
    "oneDNN off": without_onednn,
    "matmul precision": matmul_precision,
    "deterministic": deterministic,
    "default dtype": default_dtype,
    "default device": lambda: torch.device(DEVICE),
}
# What a forward may write so that a tracer follows it; the others make it be trained by its blocks.
INSIDE = ("math attention", "autocast", "autocast without cache", "default dtype", "matmul precision")


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("net", NETS)
def test_around_the_forward(net: str, around: str) -> None:
    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        with AROUND[around]():
            out = module(batch(i))
        loss = out.float().square().mean()
        loss.backward()
        return [loss]

    assert_same_training(NETS[net], step)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("part", ["whole", "middle"])
@pytest.mark.parametrize("net", NETS)
def test_inside_the_forward(net: str, part: str, inside: str) -> None:
    class Inside(NETS[net]):  # type: ignore[misc]
        def body(self, x: Tensor) -> Tensor:
            start, stop = (0, len(self.layers)) if part == "whole" else (1, len(self.layers) - 1)
            for layer in self.layers[:start]:
                x = layer(x)
            with AROUND[inside]():
                for layer in self.layers[start:stop]:
                    x = layer(x)
            for layer in self.layers[stop:]:
                x = layer(x)
            return x

    torch.set_float32_matmul_precision("highest")  # said explicitly, it is another setting than the same by default
    before = ambient.settings_now()

    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        loss = module(batch(i)).float().square().mean()
        assert ambient.settings_now() == before
        loss.backward()
        assert ambient.settings_now() == before
        return [loss]

    assert_same_training(Inside, step)


def test_a_traced_region_does_not_make_one_block_of_its_layers() -> None:
    """As `Accelerator.prepare` makes it: autocast inside the forward, around all of it."""

    class Inside(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return super().forward(x)

    model = tbp.hcb(Inside().to(DEVICE), activation_budget="60%", plan_cache=False)
    model(batch(0)).float().square().mean().backward()
    (report,) = targets(model)[0].reports
    assert len(report.chain.blocks) > 8


def _python(shape: Any) -> Tensor:
    return torch.full(shape, random.uniform(0.5, 1.5))


def _numpy(shape: Any) -> Tensor:
    return torch.from_numpy(np.random.rand(*shape).astype(np.float32))  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.parametrize("owner", ["python", "numpy", "torch's own", "python's own", "numpy's own"])
@pytest.mark.parametrize("net", NETS)
def test_generators(net: str, owner: str) -> None:
    class Drawing(Block):
        def __init__(self) -> None:
            super().__init__()
            self.generator: Any = {
                "torch's own": torch.Generator().manual_seed(5),
                "python's own": random.Random(5),
                "numpy's own": np.random.default_rng(5),
            }.get(owner)

        def draw(self, shape: Any) -> Tensor:
            match owner:
                case "python":
                    return _python(shape)
                case "numpy":
                    return _numpy(shape)
                case "torch's own":
                    return torch.rand(shape, generator=self.generator)
                case "python's own":
                    return torch.full(shape, self.generator.uniform(0.5, 1.5))
                case _:
                    return torch.from_numpy(self.generator.random(shape).astype(np.float32))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.draw((ROWS, LENGTH, WIDTH)).to(x.device))

    class Draws(NETS[net]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Drawing() for _ in range(4))

    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        loss = module(batch(i)).square().mean()
        loss.backward()
        return [loss]

    assert_same_training(Draws, step)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_a_setting_of_ones_own() -> None:
    """A library's switch, which the blocks read: replays find it as it was once it is registered."""
    switch = [1.0]

    class Reads(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * float(str(switch[0])))

    class Switched(NETS["by blocks"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Reads() for _ in range(4))

    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        switch[0] = 1.25
        loss = module(batch(i)).square().mean()
        switch[0] = 1.0
        loss.backward()
        return [loss]

    remove = ambient.register_ambient("switch", lambda: switch[0], lambda value: switch.__setitem__(0, value))
    try:
        assert_same_training(Switched, step)
    finally:
        remove()
