"""Networks written in plain torch, with graphs that no model of the libraries has."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.zoo.architecture import Architecture, Batch, Phase, Workload

__all__ = ["PLAIN"]


class _RecurrentLanguageModel(nn.Module):
    """A stack of LSTMs with dropout between and inside them; the embedding is also the head."""

    def __init__(self, vocabulary: int = 128, width: int = 96, num_layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(num_layers - 1))
        self.recurrent.append(nn.LSTM(width, width, num_layers=2, dropout=0.2, batch_first=True))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.recurrent:
            hidden, _ = layer(self.dropout(hidden))
        return self.head(self.dropout(hidden))


def _lstm(seed: int) -> Workload:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 128, (8, 33))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch["tokens"][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    return Workload(_RecurrentLanguageModel().train(), {"tokens": tokens}, (Phase(loss),))


def _perceptron(*widths: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(widths)]
    return nn.Sequential(*layers)


class _Recommender(nn.Module):
    """DLRM: bags of sparse features and dense ones, their pairwise products, a classifier on top."""

    def __init__(self, num_tables: int = 6, width: int = 32) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(200, width, mode="sum") for _ in range(num_tables))
        self.bottom = _perceptron(13, 128, 128, 128, width)
        self.register_buffer("pairs", torch.triu_indices(num_tables + 1, num_tables + 1, offset=1))
        self.top = nn.Sequential(
            _perceptron(width + num_tables * (num_tables + 1) // 2, 128, 128, 128, 128), nn.Linear(128, 1)
        )

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        features = torch.stack([bottom, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        return self.top(torch.cat([bottom, products[:, self.pairs[0], self.pairs[1]]], dim=1))[:, 0]


def _dlrm(seed: int) -> Workload:
    torch.manual_seed(seed)
    batch = {
        "dense": torch.randn(1024, 13),
        "sparse": torch.randint(0, 200, (1024, 6, 4)),
        "clicked": torch.randint(0, 2, (1024,)).float(),
    }

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(module(batch["dense"], batch["sparse"]), batch["clicked"])

    return Workload(_Recommender().train(), batch, (Phase(loss),))


class _MessageLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.update = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        self.norm = nn.BatchNorm1d(width)

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor) -> Tensor:
        messages = self.message(torch.cat([nodes[source], nodes[target]], dim=1))
        received = torch.zeros_like(nodes).index_add_(0, target, messages)
        return nodes + self.norm(self.update(torch.cat([nodes, received], dim=1)))


class _GraphNet(nn.Module):
    def __init__(self, width: int = 48, num_layers: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.layers = nn.ModuleList(_MessageLayer(width) for _ in range(num_layers))
        self.head = nn.Linear(width, 4)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = self.embed(nodes)
        for layer in self.layers:
            hidden = layer(hidden, edges[0], edges[1])
        return self.head(hidden)


def _graph_net(seed: int) -> Workload:
    torch.manual_seed(seed)
    batch = {
        "nodes": torch.randn(512, 16),
        "edges": torch.randint(0, 512, (2, 2048)),
        "labels": torch.randint(0, 4, (512,)),
    }

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(module(batch["nodes"], batch["edges"]), batch["labels"])

    return Workload(_GraphNet().train(), batch, (Phase(loss),))


class _DenseBlock(nn.Module):
    """Each layer reads the outputs of all layers before it, and activates in place."""

    def __init__(self, num_channels: int, growth: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(num_channels + i * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(num_channels + i * growth, growth, 3, padding=1, bias=False),
                nn.Dropout(0.1, inplace=True),
            )
            for i in range(num_layers)
        )
        self.num_channels = num_channels + num_layers * growth

    def forward(self, images: Tensor) -> Tensor:
        features = [images]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features, dim=1)


class _DenseNet(nn.Module):
    def __init__(self, growth: int = 12, num_layers: int = 5, num_blocks: int = 3) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)]
        num_channels = 2 * growth
        for _ in range(num_blocks):
            block = _DenseBlock(num_channels, growth, num_layers)
            num_channels = block.num_channels // 2
            stages += [
                block,
                nn.BatchNorm2d(block.num_channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(block.num_channels, num_channels, 1, bias=False),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*stages)
        self.head = nn.Linear(num_channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


class _MixerBlock(nn.Module):
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(
            nn.Linear(num_tokens, 2 * num_tokens), nn.GELU(), nn.Linear(2 * num_tokens, num_tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class _Mixer(nn.Module):
    def __init__(self, num_tokens: int = 64, width: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(_MixerBlock(num_tokens, width) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches)).mean(dim=1))


def _image_loss(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch["images"]), batch["labels"])


def _image_batch(batch_size: int) -> Batch:
    return {"images": torch.randn(batch_size, 3, 32, 32), "labels": torch.randint(0, 10, (batch_size,))}


def _dense_net(seed: int) -> Workload:
    torch.manual_seed(seed)
    return Workload(_DenseNet().train(), _image_batch(8), (Phase(_image_loss),))


def _mixer(seed: int) -> Workload:
    torch.manual_seed(seed)
    return Workload(_Mixer().train(), _image_batch(16), (Phase(_image_loss),))


def _generator() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def _discriminator() -> nn.Sequential:
    normed = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        normed(nn.Conv2d(3, 16, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2, inplace=True),
        normed(nn.Conv2d(16, 32, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2, inplace=True),
        normed(nn.Conv2d(32, 64, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(),
        nn.Linear(64 * 16, 1),
    )


class _AdversarialPair(nn.Module):
    """A generator and a discriminator; `requires_grad` selects the one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = _generator()
        self.discriminator = _discriminator()

    def forward(self, noise: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        fake = self.generator(noise)
        if real is None:
            return self.discriminator(fake), None
        return self.discriminator(fake.detach()), self.discriminator(real)


def _discriminator_loss(module: nn.Module, batch: Batch) -> Tensor:
    fake, real = module(batch["noise"], batch["real"])
    return nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()


def _generator_loss(module: nn.Module, batch: Batch) -> Tensor:
    fake, _ = module(batch["noise"], None)
    return nn.functional.softplus(-fake).mean()


def _gan(seed: int) -> Workload:
    torch.manual_seed(seed)
    batch = {"noise": torch.randn(64, 32, 1, 1), "real": torch.randn(64, 3, 32, 32)}
    phases = (Phase(_discriminator_loss, "discriminator"), Phase(_generator_loss, "generator"))
    return Workload(_AdversarialPair().train(), batch, phases)


PLAIN = (
    Architecture("lstm", _lstm, is_fast=True),
    Architecture("dlrm", _dlrm, is_fast=True),
    Architecture("graph_net", _graph_net),
    Architecture("dense_net", _dense_net, is_fast=True),
    Architecture("mixer", _mixer),
    Architecture("gan", _gan, is_fast=True),
)
