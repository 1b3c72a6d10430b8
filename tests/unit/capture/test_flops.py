"""Operations are counted as torch counts them, and attention also where its formula of some versions raises."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinybp_lightning.capture.torch.flops import flops_of

ATEN = torch.ops.aten
BATCH, HEADS, LENGTH, WIDTH = 2, 8, 16, 32


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("num_key_heads", [HEADS, 2])
def test_attention_with_fewer_heads_of_keys_takes_as_many_operations(kernel: str, num_key_heads: int) -> None:
    query = torch.empty(BATCH, HEADS, LENGTH, WIDTH, device="meta")
    key = torch.empty(BATCH, num_key_heads, 2 * LENGTH, WIDTH, device="meta")
    value = torch.empty(BATCH, num_key_heads, 2 * LENGTH, 2 * WIDTH, device="meta")
    packet = getattr(ATEN, f"_scaled_dot_product_{kernel}_attention")
    found = flops_of(packet, (query, key, value), {"is_causal": True}, (None,))
    scores, weighted = 2 * LENGTH * (2 * LENGTH) * WIDTH, 2 * LENGTH * (2 * LENGTH) * (2 * WIDTH)
    assert found == BATCH * HEADS * (scores + weighted)


def test_other_kernels_are_counted_by_torch() -> None:
    x, w = torch.empty(4, 8), torch.empty(8, 16)
    with FlopCounterMode(display=False) as counter:
        out = x @ w
    assert flops_of(ATEN.mm, (x, w), {}, out) == counter.get_total_flops() == 2 * 4 * 8 * 16
    assert flops_of(ATEN.relu, (x,), {}, x) == 0
