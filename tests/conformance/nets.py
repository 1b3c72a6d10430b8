"""Two networks with all that surroundings can change: one is traced as a graph, one is trained by its blocks."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

DEVICE = torch.device(os.environ.get("CONFORMANCE_DEVICE", "cpu"))
# CUDA's allocator rounds each tensor up to 512 bytes: activations must be large beside that.
WIDTH, HEADS, ROWS, LENGTH = (32, 2, 4, 16) if DEVICE.type == "cpu" else (128, 2, 8, 64)


class Block(nn.Module):
    """Attention, a norm with statistics, dropout, and a constant made by a factory function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(LENGTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(self.norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up((x + torch.ones(WIDTH, device=x.device) / 3).to(x.dtype)))))


class Net(nn.Module):
    """Blocks in a row."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Broken(Net):
    """Looks at a value, so that no tracer follows it."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e30:
            return x
        return super().forward(x)


NETS: dict[str, Callable[[], nn.Module]] = {"traced": Net, "by blocks": Broken}


def batch(step: int, rows: int = ROWS) -> Tensor:
    """Return the inputs of one step, of shape (rows, LENGTH, WIDTH)."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, LENGTH, WIDTH, generator=generator, dtype=torch.float32, device="cpu").to(DEVICE)
