"""Twenty optimizer steps of everything people train: equal to plain training bit for bit, and replayed.

What a forward may do is in `test_forwards.py`, what a backward may do in `test_backwards.py`; here are whole models and
loops that need more than one of these, with the optimizers they are trained with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812

import tinybp_lightning as tbp
from tests.unit.runtime.training import Outcome, Recorder, Residual, assert_all_same, outcome_of, residual_net
from tinybp_lightning.runtime.torch.kept_modules import pinned_paths
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending

WIDTH, ROWS, STEPS = 16, 128, 20
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))

Optimizers = Callable[[Any], torch.optim.Optimizer]
Loop = Callable[[nn.Module, Optimizers], list[Outcome]]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, foreach=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, amsgrad=True, foreach=False)


class Layers(nn.Module):
    """Repeats one kind of block, with a residual connection."""

    def __init__(self, kind: Callable[[], nn.Module], depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class NestedRandom(nn.Module):
    """Draws the rate of what it draws next."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = 0.5 + 0.5 * torch.rand(())
        kept = torch.bernoulli(rate.expand_as(x)) * torch.normal(torch.ones_like(x), 0.1)
        order = torch.randperm(WIDTH)
        return F.dropout(self.down(F.gelu(self.up(x * kept))[:, order]), 0.2)


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weighted(F.leaky_relu(self.linear(x), 0.2).tanh())


class Fourier(nn.Module):
    """Complex activations, multiplied by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x) * self.filter
        return self.out(torch.fft.irfft(spectrum * spectrum.conj().exp().abs(), n=WIDTH).tanh())


class Router(nn.Module):
    """A mixture of experts with static shapes: integer activations, gather, scatter, top-k."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, num_experts)
        self.experts = nn.Parameter(0.1 * torch.randn(num_experts, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        counts = torch.zeros(len(self.experts), dtype=torch.long).scatter_add_(
            0, chosen.flatten(), torch.ones_like(chosen.flatten())
        )
        mixed = torch.einsum("rk,rkio,ri->ro", weights, self.experts[chosen], x)
        return mixed.index_add(0, chosen[:, 0], x[: len(chosen)] * 0.01) / counts.float().mean()


class Dispatching(Router):
    """The same with shapes that depend on data: no single graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for expert in range(len(self.experts)):
            (rows,) = (chosen == expert).nonzero(as_tuple=True)  # may be none
            out = out.index_add(0, rows, (x[rows] @ self.experts[expert]).tanh() * weights[rows, None])
        return out


class Dispatched(Layers):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Sequential(Dispatching()), nn.Dropout(0.1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.view(4, -1, WIDTH)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        return self.out((mixed + dropped).transpose(1, 2).flatten(2)).view(-1, WIDTH)


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", bidirectional=True)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, last = self.gru(x.view(8, -1, WIDTH))
        return self.out(self.rnn(y)[0]).reshape(-1, WIDTH) * last.mean()


class TeacherAndStudent(nn.Module):
    """The forward moves an exponential average of its own weights, and is trained towards what that says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)
        self.register_buffer("teacher", self.body[0].up.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.teacher.lerp_(self.body[0].up.weight, 0.1)
            target = F.gelu(x @ self.teacher.t()) @ self.body[1].down.weight.t()
        return self.body(x) - target


@dataclass
class Output:
    value: torch.Tensor
    more: dict[str, Any]


class Nested(nn.Module):
    """Takes keywords and gives a structure of structures, part of which no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(4)

    def forward(self, *, batch: dict[str, torch.Tensor], scale: float = 1.0) -> Output:
        x, seen = batch["x"] * scale, []
        for layer in self.body:
            x = layer(x)
            seen.append((x.mean(), {"norm": x.norm(), "argmax": x.argmax()}))
        return Output(x, {"seen": seen, "unused": x.exp(), "name": "nested", "none": None})


def mean_square(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def nested_loss(model: nn.Module) -> torch.Tensor:
    out = model(batch={"x": X}, scale=0.9)
    return out.value.square().mean() + out.more["seen"][1][0].abs() + out.more["seen"][2][1]["norm"]


# ---- loops -----------------------------------------------------------------------------------------------------------


def ordinary(loss_of: Callable[[nn.Module], torch.Tensor] = mean_square) -> Loop:
    def loop(model: nn.Module, optimizers: Optimizers) -> list[Outcome]:
        optimizer = optimizers([p for p in model.parameters() if p.requires_grad])
        outcomes = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            outcomes.append(outcome_of(model, loss))
        return outcomes

    return loop


def accumulating_and_clipping(model: nn.Module, optimizers: Optimizers) -> list[Outcome]:
    optimizer = optimizers(model.parameters())
    outcomes = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in X.split(ROWS // 2):
            loss = model(part).square().mean() / 2
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        outcomes.append(outcome_of(model, torch.stack([loss.detach(), norm])))
    return outcomes


def scaled_half_precision(model: nn.Module, optimizers: Optimizers) -> list[Outcome]:
    """Begins with a scale that overflows, so that steps are left out until it has come down."""
    optimizer, scaler = optimizers(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    outcomes = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(X).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        for p in model.parameters():
            p.grad.nan_to_num_(nan=123.0)  # a NaN equals nothing, and where there are any is the same too
        outcomes.append(outcome_of(model, torch.stack([loss.detach().float(), torch.tensor(scaler.get_scale())])))
    return outcomes


def sizes_down_to_nothing(model: nn.Module, optimizers: Optimizers) -> list[Outcome]:
    optimizer = optimizers(model.parameters())
    outcomes = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(X[: (ROWS, 0, ROWS // 4, 1)[step % 4]]).square().sum()
        loss.backward()
        optimizer.step()
        outcomes.append(outcome_of(model, loss))
    return outcomes


def adversarial(model: nn.Module, optimizers: Optimizers) -> list[Outcome]:
    """Two optimizers take turns; what does not learn does not ask for gradients."""
    maker, critic = model.maker, model.critic
    turns = [(critic, optimizers(critic.parameters()), 1.0), (maker, optimizers(maker.parameters()), -1.0)]
    outcomes = []
    for _ in range(STEPS):
        for learner, optimizer, sign in turns:
            model.requires_grad_(False)
            learner.requires_grad_(True)
            optimizer.zero_grad()
            loss = F.softplus(sign * model(X, detached=learner is critic)).mean()
            loss.backward()
            optimizer.step()
            outcomes.append(outcome_of(model, loss))
    return outcomes


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.critic = residual_net(3), nn.Sequential(Layers(Spectral, 3), nn.Linear(WIDTH, 1))

    def forward(self, x: torch.Tensor, *, detached: bool) -> torch.Tensor:
        fake = self.maker(x)
        return self.critic(fake.detach() if detached else fake) - self.critic(x)


def with_adapters() -> nn.Module:
    """Low-rank adapters around frozen weights, one of them tied."""
    net = residual_net(5)
    net[3].up.weight = net[1].up.weight
    return get_peft_model(
        net, LoraConfig(r=2, target_modules=["up", "down"], lora_dropout=0.1, init_lora_weights=False)
    )


ORDINARY = ordinary()


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    loop: Loop = ORDINARY
    optimizers: Optimizers = adamw
    budget: int | str = "90%"


CASES = {
    "nested-random": Case(lambda: Layers(NestedRandom)),
    "spectral-norm": Case(lambda: Layers(Spectral), optimizers=sgd),
    "complex": Case(lambda: Layers(Fourier)),
    "top-k-routing": Case(lambda: Layers(Router)),
    "data-dependent-routing": Case(Dispatched),
    "attention": Case(lambda: Layers(Attention), optimizers=adam),
    "recurrent": Case(lambda: Layers(Gru, 3)),
    "average-of-weights": Case(TeacherAndStudent, optimizers=sgd),
    "nested-outputs": Case(Nested, ordinary(nested_loss)),
    "adapters": Case(with_adapters),
    "accumulation": Case(lambda: residual_net(5), accumulating_and_clipping, sgd),
    "half-precision": Case(lambda: residual_net(5), scaled_half_precision, adam),
    "empty-batches": Case(lambda: residual_net(5), sizes_down_to_nothing, adamw, "1MiB"),
    "adversarial": Case(Adversaries, adversarial, adam, "1MiB"),
}


@pytest.mark.filterwarnings("ignore:`Dispatched` cannot be traced")
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_the_same(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    plain = case.make()
    torch.manual_seed(0)
    ours = case.make()
    torch.manual_seed(7)
    want = case.loop(plain, case.optimizers)
    recorder = Recorder()
    tbp.hcb(ours, activation_budget=case.budget, observers=[recorder])
    torch.manual_seed(7)
    got = case.loop(ours, case.optimizers)
    settle_pending()
    assert_all_same(got, want)
    assert len(got) >= STEPS
    assert any(profile.replayed_blocks > 0 for profile in recorder.profiles)
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), case.make().parameters(), strict=True))


class OnAnyDevice(nn.SyncBatchNorm):
    """torch's own refuses the CPU; what is tested is who asks for its collective again."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        torch._dynamo.graph_break()
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)


@pytest.fixture
def process_group() -> Any:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`Layers` cannot be traced")
@pytest.mark.usefixtures("process_group")
def test_a_block_that_synchronises_ranks_is_not_replayed() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Layers(lambda: nn.Sequential(Residual(WIDTH), nn.Sequential(OnAnyDevice(WIDTH))))

    plain, model, recorder = make(), make(), Recorder()
    torch.manual_seed(7)
    want = ORDINARY(plain, sgd)
    tbp.hcb(model, activation_budget="2MiB", observers=[recorder])
    torch.manual_seed(7)
    with pytest.warns(tbp.HCBWarning, match=r"`Layers.layers.\d` is not replayed: it synchronises ranks") as caught:
        got = ORDINARY(model, sgd)
    assert_all_same(got, want)
    assert len([w for w in caught if "synchronises" in str(w.message)]) == 5
    assert sum(profile.replayed_blocks for profile in recorder.profiles) == 0


@pytest.mark.usefixtures("process_group")
def test_a_traced_norm_that_synchronises_ranks_is_kept() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.SyncBatchNorm(1)))
    assert pinned_paths(model) == ("1.0",)


def test_one_that_has_no_ranks_is_not() -> None:
    assert pinned_paths(nn.Sequential(nn.SyncBatchNorm(1))) == ()
