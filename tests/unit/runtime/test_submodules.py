"""A forward that is no single graph is trained by its submodules' calls: exactly, in less memory, and not silently."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from tests.unit.runtime.training import (
    LossOf,
    Recorder,
    Residual,
    assert_all_same,
    peak_bytes,
    residual_net,
    train,
)
from tinybp_lightning.errors import HCBWarning, ReplayError
from tinybp_lightning.runtime.torch.submodules import step_modules

WIDTH, ROWS = 32, 128


BATCH = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def square_loss(model: nn.Module) -> torch.Tensor:
    return model(BATCH).square().mean()


def loss_of_rows(rows: int) -> LossOf:
    return lambda model: model(BATCH[:rows]).square().mean()


class Broken(nn.Module):
    """Blocks with something between them that no tracer follows."""

    def __init__(self, depth: int = 6, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(residual_net(depth, width=WIDTH, **options))
        self.head = nn.Linear(WIDTH, 1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.between(block(x))
        return self.head(x)


class Nearest(nn.Module):
    """Looks up the nearest of some vectors: the graph of the distances is gone before the call ends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(WIDTH)
        self.register_buffer("vectors", torch.randn(64, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        nearest = torch.cdist(x, self.vectors).argmin(-1)
        return x + (self.vectors[nearest] - x).detach()


class BrokenNearest(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nearest() for _ in range(4))


class Branches(Broken):
    """Takes another path for other data, so that the calls change from step to step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if i % 2 == 0 or x.mean() > 0:
                x = block(x)
        return self.head(x)


class Norms(nn.Module):
    """`momentum=None` divides by a count that is a tensor: no tracer follows that."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None), nn.ReLU(), nn.Dropout(0.2))
            for _ in range(5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class BrokenNorms(Broken):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh()) for _ in range(5)
        )


class Keeps(Residual):
    """Keeps a running average in a buffer, by assignment."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return super().forward(x - self.average)


class OwnBuffers(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Keeps() for _ in range(4))


class Two(NamedTuple):
    value: torch.Tensor
    extra: dict[str, Any]


class Structured(nn.Module):
    """A block that takes keywords and returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(WIDTH)

    def forward(self, x: torch.Tensor, *, scale: float, mask: tuple[torch.Tensor, ...] | None = None) -> Two:
        y = self.inner(x) * scale
        return Two(y if mask is None else y * mask[0], {"seen": x.mean(), "name": "block"})


class StructuredNet(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Structured() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros(())
        for block in self.blocks:
            out = block(self.between(x), scale=0.5, mask=(torch.ones(WIDTH),))
            x, seen = out.value, seen + out.extra["seen"]
        return self.head(x) + seen


class SharedBlock(Broken):
    """One block in two lists, called through both."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([self.blocks[0], self.blocks[1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.more]:
            x = self.between(block(x))
        return self.head(x)


class BuiltOfSequentials(Broken):
    """Blocks whose parts are `nn.Sequential`s, as in many models: the block is the unit, not its layers."""

    def __init__(self) -> None:
        super().__init__()

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mlp = nn.Sequential(
                    nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
                )

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.mlp(x)

        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def autocast_loss(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(BATCH).float().square().mean()


def alternating_loss() -> LossOf:
    shifts = iter([1.0, -1.0] * 4)
    return lambda model: model(BATCH + next(shifts)).square().mean()


KINDS: list[Callable[[], nn.Module]] = [
    Broken, BrokenNorms, Norms, OwnBuffers, StructuredNet, SharedBlock, BuiltOfSequentials
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_same_training(kind: Callable[[], nn.Module]) -> None:
    want = train(made(kind), square_loss, steps=5)
    recorder = Recorder()
    model = tbp.hcb(made(kind), activation_budget="80%", observers=[recorder])
    with pytest.warns(HCBWarning, match="module steps"):
        got = train(model, square_loss, steps=5)
    assert_all_same(got, want)
    assert recorder.profiles[0].replayed_blocks > 0


@pytest.mark.parametrize("loss_of", [autocast_loss], ids=["autocast"])
def test_same_training_under(loss_of: LossOf) -> None:
    want = train(made(Broken), loss_of, steps=4)
    with pytest.warns(HCBWarning, match="module steps"):
        assert_all_same(train(tbp.hcb(made(Broken), activation_budget="90%"), loss_of, steps=4), want)


def test_a_branch_on_data() -> None:
    want = train(made(Branches), alternating_loss(), steps=6, lr=0.01)
    model = tbp.hcb(made(Branches), activation_budget="80%")
    with pytest.warns(HCBWarning, match="`Branches`"):
        got = train(model, alternating_loss(), steps=6, lr=0.01)
    assert_all_same(got, want)


def test_it_says_so_once_and_names_the_module() -> None:
    model = tbp.hcb(made(Broken), activation_budget="80%")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, square_loss, steps=4)
    mine = [str(w.message) for w in caught if issubclass(w.category, HCBWarning)]
    assert len(mine) == 1
    assert "`Broken` cannot be traced as one graph" in mine[0]
    assert "module steps" in mine[0]


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.parametrize("kind", [Broken, Branches, BuiltOfSequentials])
@pytest.mark.parametrize("share", [0.45, 0.7])
def test_memory_is_saved_and_the_budget_is_kept(kind: Callable[[], nn.Module], share: float) -> None:
    plain_bytes = peak_bytes(made(kind), square_loss)
    budget_bytes = int(share * plain_bytes)
    recorder = Recorder()
    model = tbp.hcb(made(kind), activation_budget=budget_bytes, observers=[recorder])
    train(model, square_loss, steps=5)
    measured_bytes = peak_bytes(model, square_loss)
    assert measured_bytes <= budget_bytes
    predicted_bytes = recorder.profiles[-1].predicted_peak_bytes
    assert abs(predicted_bytes - measured_bytes) <= 0.05 * measured_bytes


class Dropping(Broken):
    """Leaves out blocks as it is told, step by step: stochastic depth."""

    def __init__(self, dropped: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(depth=8)
        self.dropped, self.step = dropped, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left_out = self.dropped[self.step % len(self.dropped)]
        self.step += 1
        for i, block in enumerate(self.blocks):
            x = x if i in left_out else self.between(block(x))
        return self.head(x)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.parametrize("share", [0.35, 0.6])
@pytest.mark.parametrize(
    "dropped",
    [((1, 2, 3, 5), (0, 4), ()), ((), (2, 6), (0, 1, 7)), ((0, 1, 2, 3), (4, 5, 6, 7), (), (3,), (4,))],
)
def test_a_step_of_more_blocks_than_the_first_keeps_the_budget(
    dropped: tuple[tuple[int, ...], ...], share: float
) -> None:
    budget_bytes = int(share * peak_bytes(made(lambda: Dropping(((),))), square_loss))
    recorder = Recorder()
    plain = made(lambda: Dropping(dropped))
    ours = tbp.hcb(copy.deepcopy(plain), activation_budget=budget_bytes, observers=[recorder])
    num_steps = 4 * len(dropped)
    assert_all_same(train(ours, square_loss, steps=num_steps), train(plain, square_loss, steps=num_steps))
    for kind in dropped:
        ours.dropped = (kind,)
        assert peak_bytes(ours, square_loss) <= budget_bytes
    ours.dropped = ((),)
    assert peak_bytes(ours, square_loss) >= 0.8 * budget_bytes


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_a_larger_batch_than_the_first_keeps_the_budget() -> None:
    budget_bytes = int(0.5 * peak_bytes(made(Broken), loss_of_rows(ROWS)))
    model = tbp.hcb(made(Broken), activation_budget=budget_bytes)
    train(model, loss_of_rows(ROWS // 4), steps=4)
    train(model, loss_of_rows(ROWS), steps=1)
    for _ in range(4):
        assert peak_bytes(model, loss_of_rows(ROWS)) <= budget_bytes
    assert peak_bytes(model, loss_of_rows(ROWS // 4)) <= budget_bytes


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_a_large_batch_that_comes_rarely_keeps_the_budget() -> None:
    budget_bytes = int(0.8 * peak_bytes(made(Broken), loss_of_rows(ROWS)))
    model = tbp.hcb(made(Broken), activation_budget=budget_bytes)
    for rows in [ROWS // 8] * 3 + [ROWS] + [ROWS // 8] * 8:
        train(model, loss_of_rows(rows), steps=1)
    assert peak_bytes(model, loss_of_rows(ROWS)) <= budget_bytes


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_after_a_step_that_no_plan_fits_smaller_ones_go_on() -> None:
    budget_bytes = int(0.9 * peak_bytes(made(Broken), loss_of_rows(ROWS // 8)))
    model, plain = tbp.hcb(made(Broken), activation_budget=budget_bytes), made(Broken)
    train(model, loss_of_rows(ROWS // 8), steps=3, lr=0.0)
    with pytest.raises(tbp.BudgetTooSmallError):
        train(model, loss_of_rows(ROWS), steps=4, lr=0.0)
    want = train(plain, loss_of_rows(ROWS // 8), steps=3)
    assert_all_same(train(model, loss_of_rows(ROWS // 8), steps=3), want)
    assert peak_bytes(model, loss_of_rows(ROWS // 8)) <= budget_bytes


class Graphs(Broken):
    """Blocks that take a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Spreading() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        edges = torch.eye(len(x)).to_sparse()
        for block in self.blocks:
            x = self.between(block(edges, x))
        return self.head(x)


class Spreading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, edges: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(torch.sparse.mm(edges, x))


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_blocks_may_take_sparse_tensors() -> None:
    want = train(made(Graphs), square_loss, steps=4)
    assert_all_same(train(tbp.hcb(made(Graphs), activation_budget="90%"), square_loss, steps=4), want)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_a_norm_that_starts_to_learn_later() -> None:
    """Statistics are frozen in the first steps, so nothing changes then: they must not be counted twice later."""

    def freeze_then_learn(model: nn.Module) -> list[Any]:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        for norm in norms:
            norm.eval()
        outcomes = train(model, square_loss, steps=2)
        for norm in norms:
            norm.train()
        return outcomes + train(model, square_loss, steps=2)

    want = freeze_then_learn(made(BrokenNorms))
    assert_all_same(freeze_then_learn(tbp.hcb(made(BrokenNorms), activation_budget="90%")), want)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_restore_takes_everything_out() -> None:
    model = tbp.hcb(made(Broken), activation_budget="80%")
    train(model, square_loss)
    tbp.restore(model)
    assert all(m._compiled_call_impl is None for m in model.modules())


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`Residual` inside `Broken` is compiled")
def test_a_compiled_part_stays_compiled_after_restore() -> None:
    model = made(Broken)
    block = model.get_submodule("blocks.1")
    block.compile(backend="eager")
    compiled = block._compiled_call_impl
    tbp.hcb(model, activation_budget="80%")
    train(model, square_loss)
    tbp.restore(model)
    assert block._compiled_call_impl is compiled


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_hcb_again_does_not_nest() -> None:
    want = train(made(Broken), square_loss)
    model = made(Broken)
    for _ in range(3):
        tbp.hcb(model, activation_budget="80%")
        train(model, square_loss, steps=1, lr=0.0)
    recorder = Recorder()
    tbp.hcb(model, activation_budget="80%", observers=[recorder])
    assert_all_same(train(model, square_loss), want)
    assert recorder.profiles[0].replayed_blocks <= 7


class Cache:
    """Something a block may change: running the block again would change it again."""

    def __init__(self) -> None:
        self.calls = 0


class TakesCache(Broken):
    def __init__(self) -> None:
        super().__init__()

        class Block(Residual):
            def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
                cache.calls += 1
                return super().forward(x)

        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.cache = Cache()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.between(block(x, self.cache))
        return self.head(x)


@pytest.mark.filterwarnings("ignore:`TakesCache` cannot be traced")
def test_an_object_that_a_block_changes_is_changed_once() -> None:
    want = train(made(TakesCache), square_loss)
    model = made(TakesCache)
    tbp.hcb(model, activation_budget="1MiB")
    assert_all_same(train(model, square_loss), want)
    assert isinstance(model, TakesCache)
    assert model.cache.calls == 9


class TakesIterator(Broken):
    def __init__(self) -> None:
        super().__init__()

        class Block(Residual):
            def forward(self, x: torch.Tensor, factors: Iterator[float]) -> torch.Tensor:  # type: ignore[override]
                return super().forward(x) * next(factors)

        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = iter([1.0, 2.0, 3.0])
        for block in self.blocks:
            x = self.between(block(x, factors))
        return self.head(x)


def test_a_block_that_takes_an_unknown_object_is_not_replayed() -> None:
    want = train(made(TakesIterator), square_loss)
    model = tbp.hcb(made(TakesIterator), activation_budget="1MiB")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train(model, square_loss)
    assert_all_same(got, want)
    named = [str(w.message) for w in caught if "is not replayed" in str(w.message)]
    assert [name.partition(" ")[0] for name in named] == [f"`TakesIterator.blocks.{i}`" for i in range(3)]
    assert all("gets a `list_iterator`" in text for text in named)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_an_argument_changed_in_place_after_the_call_is_an_error() -> None:
    class Changes(Broken):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.blocks[0](x)
            z = self.blocks[1](y)
            with torch.no_grad():
                y.add_(1.0)
            return self.head(self.between(z))

    model = tbp.hcb(made(Changes), activation_budget="1MiB")
    loss = square_loss(model)
    with pytest.raises(ReplayError, match="changed in place"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
def test_an_exception_between_the_blocks_leaves_the_model_usable() -> None:
    class Fails(Broken):
        fail = False

        def between(self, x: torch.Tensor) -> torch.Tensor:
            if self.fail:
                raise KeyError("mine")
            return super().between(x)

    want = train(made(Fails), square_loss)
    model = made(Fails)
    assert isinstance(model, Fails)
    tbp.hcb(model, activation_budget="80%")
    train(model, square_loss, lr=0.0)
    model.fail = True
    with pytest.raises(KeyError, match="mine"):
        square_loss(model)
    model.fail = False
    assert_all_same(train(model, square_loss), want)


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.parametrize("copied", [copy.deepcopy])
def test_a_copy_trains_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = tbp.hcb(made(Broken), activation_budget="80%")
    train(model, square_loss, lr=0.0)
    other = copied(model)
    before = copy.deepcopy(model.state_dict())
    assert_all_same(train(other, square_loss), train(made(Broken), square_loss))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- which calls are blocks ------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH)
        self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(2))
        self.head = nn.ModuleDict({"a": nn.Linear(WIDTH, 1), "b": nn.Linear(WIDTH, 1)})
        self.act = nn.ReLU()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.stages = nn.Sequential(residual_net(2), residual_net(2))


def test_step_modules() -> None:
    assert list(step_modules(Nested())) == [
        "encoder.embed",
        "encoder.stem",
        "encoder.layers.0",
        "encoder.layers.1",
        "encoder.head.a",
        "encoder.head.b",
        "stages.0.0",
        "stages.0.1",
        "stages.1.0",
        "stages.1.1",
    ]


def test_blocks_of_sequentials_are_units() -> None:
    names = list(step_modules(made(BuiltOfSequentials)))
    assert names == [*(f"blocks.{i}" for i in range(6)), "head"]


def test_a_module_in_two_places_is_one_unit() -> None:
    units = list(step_modules(made(SharedBlock)).values())
    assert len(units) == len({id(unit) for unit in units})


@pytest.mark.filterwarnings("ignore:`\\w+` cannot be traced")
@pytest.mark.parametrize("kind", [Broken, BrokenNorms, BuiltOfSequentials, SharedBlock, BrokenNearest])
def test_a_share_is_of_what_plain_training_needs(kind: Callable[[], nn.Module]) -> None:
    recorder = Recorder()
    train(tbp.hcb(made(kind), activation_budget="1GiB", observers=[recorder]), square_loss, lr=0.0)
    plain_bytes = peak_bytes(made(kind), square_loss)
    assert abs(recorder.plans[-1].plain_peak_bytes - plain_bytes) <= 0.1 * plain_bytes


def test_only_blocks_that_draw_keep_the_generator() -> None:
    """Its state is 5 kB on a CPU: for small blocks that is much."""

    def loss_of(model: nn.Module) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HCBWarning)
            return square_loss(model)

    def smallest_bytes(dropout: float) -> int:
        model = tbp.hcb(made(lambda: Broken(dropout=dropout)), activation_budget=1)
        loss_of(model).backward()
        with pytest.raises(tbp.BudgetTooSmallError) as caught:
            loss_of(model)
        return caught.value.smallest_bytes

    assert smallest_bytes(0.1) - smallest_bytes(0.0) > 6 * 5000
