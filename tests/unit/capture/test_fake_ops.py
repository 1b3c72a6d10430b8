"""Ops that torch runs in a dtype and cannot trace there are traced, with the shapes that they have."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tinybp_lightning as tbp
from tests.unit.runtime.training import assert_all_same, train
from tinybp_lightning.runtime.torch import targets


class Experts(nn.Module):
    """Rows that come in groups, each for a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(3, 32, 16) / 6)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([8, 24, 32], dtype=torch.int32)
        hidden = nn.functional.gelu(torch._grouped_mm(x, self.up, offs=ends))
        return x + torch._grouped_mm(hidden, self.down, offs=ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mixture_of_experts_is_traced(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(Experts() for _ in range(4))).to(dtype)
    x = torch.randn(32, 16, dtype=dtype)
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget="80%", plan_cache=False)
    got = train(ours, lambda net: net(x).float().square().mean())
    assert_all_same(got, train(plain, lambda net: net(x).float().square().mean()))
    assert targets(ours)[0].module_steps is None


@pytest.mark.parametrize("sizes", [((32, 16), (3, 16, 8)), ((8, 32), (32, 16)), ((3, 8, 16), (3, 16, 8))])
def test_the_shape_is_that_of_the_result(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    ends = None if len(sizes[0]) == 3 else torch.tensor([8, 24, 32], dtype=torch.int32)
    a, b = (torch.randn(size) for size in sizes)
    real = torch._grouped_mm(a, b, offs=ends)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch._grouped_mm(mode.from_tensor(a), mode.from_tensor(b), offs=ends)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_what_torch_refuses_it_refuses_in_its_own_words() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="Expected inputs of BF16 type"):
        torch._grouped_mm(torch.randn(2, 4, 4), torch.randn(2, 4, 4, dtype=torch.float16))
