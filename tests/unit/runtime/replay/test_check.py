"""Does a replay that does something else say so, and name the op? In checked mode for values, always for forms."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import tinybp_lightning as tbp
from tests.unit.runtime.training import Residual, assert_all_same, residual_net, train
from tinybp_lightning.errors import ConfigError, ReplayError
from tinybp_lightning.runtime.torch.replay import check
from tinybp_lightning.runtime.torch.replay.check import fingerprint

WIDTH = 16
X = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


@pytest.fixture(params=["variable", "option"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ask for checked mode in one of its two ways; options for `tbp.hcb`."""
    if request.param == "variable":
        monkeypatch.setenv("HCB_CHECK", "1")
        return {}
    return {"check": True}


def in_backward() -> bool:
    """What a block may ask to do something else in its replays only, so that no comparison in the forward sees it."""
    return torch._C._current_graph_task_id() >= 0


class Hidden(Residual):
    """Does something else in its replays, in a way of its own."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(WIDTH, dropout=0.0)
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.change(x))


def values(x: torch.Tensor) -> torch.Tensor:
    return x * (2.0 if in_backward() else 1.0)


def count(x: torch.Tensor) -> torch.Tensor:
    return x.sin().sin() if in_backward() else x.sin()


def fewer(x: torch.Tensor) -> torch.Tensor:
    return x.sin() if in_backward() else x.sin().sin()


def shape(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]).exp()[: len(x)] if in_backward() else torch.cat([x, x])[: len(x)].exp()


def dtype(x: torch.Tensor) -> torch.Tensor:
    return x.double().sin().float().exp() if in_backward() else x.sin().exp()


class Net(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Hidden(change) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def net(change: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tbp.hcb(Net(change), activation_budget="1MiB", **options)


@pytest.mark.filterwarnings("ignore:`Net` cannot be traced")
def test_other_values_are_an_error_that_names_the_module(checked: dict[str, Any]) -> None:
    with pytest.raises(ReplayError, match=r"`blocks\.2` saved other values.*`norm` \(`LayerNorm`\)") as caught:
        train(net(values, **checked), square_loss, steps=1)
    assert "use_deterministic_algorithms" in str(caught.value)
    assert "tbp.keep" in str(caught.value)


@pytest.mark.filterwarnings("ignore:`Net` cannot be traced")
def test_without_checked_mode_other_values_go_unnoticed() -> None:
    """What the check is for: the gradients are wrong, and nothing says so."""
    got = train(net(values), square_loss, steps=1)
    torch.manual_seed(0)
    want = train(Net(values), square_loss, steps=1)
    with pytest.raises(AssertionError, match="gradient"):
        assert_all_same(got, want)


@pytest.mark.filterwarnings("ignore:`Net` cannot be traced")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (count, r"block `blocks\.2` saved .*an op of its `Hidden` itself"),
        (fewer, r"block `blocks\.2` saved .*an op of `norm` \(`LayerNorm`\)"),
        (shape, r"block `blocks\.2` saved \(64, 16\) .*an op of its `Hidden` itself"),
        (dtype, r"block `blocks\.2` saved \(32, 16\) torch.float64 .*an op of its `Hidden` itself"),
    ],
)
def test_another_form_is_an_error_that_names_the_module(change: Any, message: str) -> None:
    with pytest.raises(ReplayError, match=message) as caught:
        train(net(change), square_loss, steps=1)
    assert "tbp.keep" in str(caught.value)


CALLS = [0]


@torch.library.custom_op("tbp_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    CALLS[0] += 1
    return x + CALLS[0]


@counted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


counted.register_autograd(lambda ctx, gradient: gradient)


class Traced(nn.Module):
    """One graph with an op that computes something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(6, width=WIDTH, dropout=0.0)
        self.last = residual_net(4, width=WIDTH, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(counted(self.body(x)))


def test_a_difference_in_a_traced_block_names_its_op(checked: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with pytest.raises(ReplayError, match=r"saved by op `\w+` of `(body|last)\.\d(\.\w+)?`\. The block does not do"):
        train(tbp.hcb(Traced(), activation_budget="40%", **checked), square_loss, steps=1)


def test_checked_training_is_the_same_training(checked: dict[str, Any]) -> None:
    plain = residual_net(4, width=WIDTH)
    want = train(copy.deepcopy(plain), square_loss)
    assert_all_same(train(tbp.hcb(plain, activation_budget="80%", **checked), square_loss), want)


@pytest.mark.parametrize(("variable", "option", "is_on"), [("0", True, True), ("1", False, True), ("0", False, False)])
def test_either_way_switches_it_on(variable: str, option: bool, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []  # no tensors: to hold them would break the budget
    monkeypatch.setattr(check, "fingerprint", lambda t: hashed.append(t.numel()))
    monkeypatch.setenv("HCB_CHECK", variable)
    config = tbp.HCBConfig(activation_budget="80%", check=option)
    train(tbp.hcb(residual_net(4, width=WIDTH), config=config), square_loss, steps=1)
    assert bool(hashed) is is_on


def test_nothing_is_hashed_when_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("hashed")

    monkeypatch.setattr(check, "fingerprint", never)
    train(tbp.hcb(residual_net(4, width=WIDTH), activation_budget="80%"), square_loss)
    monkeypatch.setenv("HCB_CHECK", "1")
    with pytest.raises(AssertionError, match="hashed"):
        train(tbp.hcb(residual_net(4, width=WIDTH), activation_budget="80%"), square_loss)


def test_another_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCB_CHECK", "yes")
    with pytest.raises(ConfigError, match="`HCB_CHECK=yes`"):
        train(tbp.hcb(residual_net(4, width=WIDTH), activation_budget="80%"), square_loss)


# ---- the hash --------------------------------------------------------------------------------------------------------

TENSORS = [
    torch.randn(7, 300),
    torch.randn(5, 4).t(),
    torch.randn(3, dtype=torch.complex64).conj(),
    torch.randn(6, dtype=torch.complex128),
    torch.randn(40).to(torch.bfloat16),
    torch.arange(9) % 2 == 0,
    torch.arange(12, dtype=torch.uint8).view(3, 4),
    torch.randn(()),
    torch.randn(2, 1).expand(2, 5),
]


@pytest.mark.parametrize("t", TENSORS, ids=lambda t: f"{tuple(t.shape)}-{t.dtype}")
def test_a_hash_is_of_the_values(t: torch.Tensor) -> None:
    got = fingerprint(t)
    assert got is not None
    assert torch.equal(got, fingerprint(t.clone(memory_format=torch.contiguous_format)))  # wherever they lie
    other = t.clone(memory_format=torch.contiguous_format)
    other.view(-1)[-1] = ~other.view(-1)[-1] if t.dtype is torch.bool else other.view(-1)[-1] + 1
    assert not torch.equal(got, fingerprint(other))


@pytest.mark.parametrize(
    "change", [lambda t: t.flip(0), lambda t: -t, lambda t: t.roll(1), lambda t: t.nextafter(2 * t)]
)
def test_a_hash_sees_order_signs_and_the_last_bit(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    t = torch.randn(1000)
    assert not torch.equal(fingerprint(t), fingerprint(change(t)))


def test_a_hash_tells_zeros_and_nans_apart_by_their_bits() -> None:
    nan = torch.tensor([float("nan")])
    assert torch.equal(fingerprint(nan), fingerprint(nan.clone()))
    assert not torch.equal(fingerprint(torch.zeros(3)), fingerprint(-torch.zeros(3)))


@pytest.mark.parametrize("count", [1, 255, 257, 1000, 20_000])
def test_a_hash_is_the_weighted_sum_of_chunks(count: int) -> None:
    """The same sum by plain integers modulo 2^64."""
    golden, modulus, size = 0x9E3779B97F4A7C15, 1 << 64, max(256, count // 64)
    expected = 0
    for start in range(0, count, size):
        part = 0
        for k in range(min(size, count - start)):
            mixed = ((k + 1) * golden + modulus // 2) % modulus - modulus // 2  # signed, as the shift is
            part += (start + k) * ((mixed ^ (mixed >> 29)) * golden | 1)
        expected = (expected * golden + part) % modulus
    got = fingerprint(torch.arange(count))
    assert got is not None
    assert got.item() % modulus == expected


def test_an_empty_tensor_has_a_hash() -> None:
    assert torch.equal(fingerprint(torch.empty(0, 3)), fingerprint(torch.empty(3, 0)))


# ---- what autograd would check ---------------------------------------------------------------------------------------


class ChangesWhatItSaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Sequential(nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).exp()
        y.mul_(0.5)
        return self.inner(y.sin())


class Changing(nn.Module):
    """Plain training refuses this; so must a replay, whose slots autograd does not look into."""

    def __init__(self, *, traced: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChangesWhatItSaved() for _ in range(4))
        self.traced = traced

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.traced:
                torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:`Changing` cannot be traced")
@pytest.mark.parametrize(
    ("traced", "message"),
    [
        (True, "modified by an inplace operation"),
        (False, r"`layers\.3` needs .* changed it in\s+place after it was saved"),
    ],
)
def test_a_saved_tensor_changed_in_place_is_an_error(traced: bool, message: str) -> None:
    model = Changing(traced=traced)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square_loss(copy.deepcopy(model)).backward()
    tbp.hcb(model, activation_budget="1MiB")
    with pytest.raises(RuntimeError, match=message):
        square_loss(model).backward()


def rows_loss(model: nn.Module) -> torch.Tensor:
    return model(X.repeat(32, 1)).square().mean()


class Noisy(nn.Module):
    """`rrelu` saves its noise before it draws it: a replay that stops there would use memory nobody has written."""

    def __init__(self, *, traced: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.RReLU())) for _ in range(12)
        )
        self.traced = traced

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.traced:
                torch._dynamo.graph_break()
            x = layer(x)
        return F.rrelu(x, training=True)


@pytest.mark.filterwarnings("ignore:`Noisy` cannot be traced")
@pytest.mark.parametrize("traced", [True, False])
def test_noise_that_is_drawn_after_it_was_saved(traced: bool) -> None:
    torch.manual_seed(0)
    plain = Noisy(traced=traced)
    want = train(copy.deepcopy(plain), rows_loss)
    assert_all_same(train(tbp.hcb(plain, activation_budget="90%"), rows_loss), want)
