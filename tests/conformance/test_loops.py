"""The same training in every loop that users write: what happens between forward, backward and step."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conformance.lockstep import Step, assert_same_training
from tests.conformance.nets import DEVICE, LENGTH, NETS, ROWS, WIDTH, batch


def loss_of(module: nn.Module, step: int, rows: int = ROWS) -> Tensor:
    return module(batch(step, rows)).square().mean()


def plain(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    loss.backward()
    return [loss]


def zero_grad_in_between(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    module.zero_grad()
    loss.backward()
    return [loss]


def accumulation(module: nn.Module, step: int) -> Sequence[Tensor]:
    return [plain(module, 10 * step + i)[0] for i in range(3)]


def two_calls_before_backward(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step) + loss_of(module, step + 50)
    loss.backward()
    return [loss]


def two_sizes(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step, ROWS if step % 2 else 2 * ROWS)
    loss.backward()
    return [loss]


def retain_graph_for_each_task(module: nn.Module, step: int) -> Sequence[Tensor]:
    out = module(batch(step))
    losses = [out.square().mean(), out.abs().mean()]
    for loss in losses:
        loss.backward(retain_graph=True)
    return losses


def one_gradient_asked_for_first(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    weight = module.get_parameter("layers.1.up.weight")
    (asked,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.backward()
    return [loss, asked]


def eval_pass_in_between(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    module.eval()
    with torch.no_grad():
        validation = loss_of(module, step + 70)
    loss.backward()
    module.train()
    return [loss, validation]


def trained_in_eval_mode(module: nn.Module, step: int) -> Sequence[Tensor]:
    module.eval()
    loss = loss_of(module, step)
    loss.backward()
    module.train()
    return [loss]


def hooks_taken_off(module: nn.Module, step: int) -> Sequence[Tensor]:
    def steer(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out * 1.5 + 0.1

    handles = [module.get_submodule(f"layers.{i}.up").register_forward_hook(steer) for i in range(4)]
    loss = loss_of(module, step)
    for handle in handles:
        handle.remove()
    loss.backward()
    return [loss]


def hooks_put_on(module: nn.Module, step: int) -> Sequence[Tensor]:
    loss = loss_of(module, step)
    layers = [module.get_submodule(f"layers.{i}.up") for i in range(4)]
    handles = [layer.register_forward_hook(lambda _, __, out: out * 2) for layer in layers]
    loss.backward()
    for handle in handles:
        handle.remove()
    return [loss]


def hooks_that_look(module: nn.Module, step: int) -> Sequence[Tensor]:
    seen: list[Tensor] = []
    layers = [module.get_submodule(f"layers.{i}.up") for i in range(4)]
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out.detach().sum())) for layer in layers]
    loss = loss_of(module, step)
    loss.backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == 4, "a hook fired in a replay"
    return [loss, *seen]


def other_weights(module: nn.Module, step: int) -> Sequence[Tensor]:
    weights = {name: p * 1.01 for name, p in module.named_parameters()}
    loss = functional_call(module, weights, (batch(step),)).square().mean()
    loss.backward()
    return [loss]


def changed_batch(module: nn.Module, step: int) -> Sequence[Tensor]:
    """The batch's buffer is filled anew before backward; plain training saves a copy of nothing of it."""
    x = batch(step)
    loss = module(x + 0).square().mean()
    x.zero_()
    loss.backward()
    return [loss]


def siamese(module: nn.Module, step: int) -> Sequence[Tensor]:
    """Two inputs, one model, one backward: both calls' blocks are replayed in it."""
    anchor, other = module(batch(step)), module(batch(step + 50))
    distance = (anchor - other).square().mean(dim=(1, 2))
    loss = torch.where(torch.arange(ROWS, device=distance.device) % 2 == 0, distance, (1 - distance).relu()).mean()
    loss.backward()
    return [loss]


def crops_one_by_one(module: nn.Module, step: int) -> Sequence[Tensor]:
    """Two large crops and three small ones, a call each; the small ones learn what the large ones say."""
    outs = [module(batch(10 * step + i, rows)) for i, rows in enumerate((2 * ROWS, 2 * ROWS, ROWS, ROWS, ROWS))]
    target = outs[0].detach().mean(dim=0)
    loss = torch.stack([(out.mean(dim=0) - target).square().mean() + out.square().mean() for out in outs]).sum()
    loss.backward()
    return [loss]


def maml(module: nn.Module, step: int) -> Sequence[Tensor]:
    return _adapted(module, step, create_graph=True)


def maml_of_first_order(module: nn.Module, step: int) -> Sequence[Tensor]:
    return _adapted(module, step, create_graph=False)


def _adapted(module: nn.Module, step: int, *, create_graph: bool) -> Sequence[Tensor]:
    """One inner step; with `create_graph`, the outer loss is differentiated through its gradients."""
    weights = dict(module.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        inner = functional_call(module, weights, (batch(step),)).square().mean()
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=create_graph)
        fast = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
        outer = functional_call(module, fast, (batch(step + 50),)).square().mean()
        outer.backward()
    return [inner, outer, *gradients]


def gradient_penalty(module: nn.Module, step: int) -> Sequence[Tensor]:
    x = batch(step).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        out = module(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = out.square().mean() + (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss.backward()
    return [loss, slope]


def lbfgs(module: nn.Module, step: int) -> Sequence[Tensor]:
    """`LBFGS.step` calls the closure again and again: each call is a training step for the plan."""
    losses: list[Tensor] = []
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.05, max_iter=3, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        losses.extend(plain(module, step))
        return losses[-1].item()

    optimizer.step(closure)
    return losses


def inside_a_reentrant_checkpoint(module: nn.Module, step: int) -> Sequence[Tensor]:
    """It runs the forward without gradients first, and again inside backward: only that one is planned."""
    x = batch(step).requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=True).square().mean()
    loss.backward()
    assert x.grad is not None
    return [loss, x.grad]


LOOPS: dict[str, Step] = {
    f.__name__: f
    for f in (
        plain,
        zero_grad_in_between,
        accumulation,
        two_calls_before_backward,
        two_sizes,
        retain_graph_for_each_task,
        one_gradient_asked_for_first,
        eval_pass_in_between,
        trained_in_eval_mode,
        hooks_taken_off,
        hooks_put_on,
        hooks_that_look,
        other_weights,
        changed_batch,
        siamese,
        crops_one_by_one,
        maml,
        maml_of_first_order,
        gradient_penalty,
        lbfgs,
        inside_a_reentrant_checkpoint,
    )
}
KEPT = {"trained_in_eval_mode": r"it is in `eval\(\)` mode"}
# The graph of the gradients, which no plan changes, is larger than all that a share is a share of.
SECOND_ORDER = ("maml", "gradient_penalty")


@pytest.mark.filterwarnings("ignore:`Broken` cannot be traced")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("net", NETS)
def test_same_training(net: str, loop: str) -> None:
    assert_same_training(NETS[net], LOOPS[loop], kept=KEPT.get(loop), at_named_size=loop in SECOND_ORDER)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part")  # of a copied LSTM on CUDA
@pytest.mark.parametrize("chunks", ["detached", "one backward at the end", "a backward each, through all before"])
@pytest.mark.parametrize("net", NETS)
def test_a_state_goes_from_chunk_to_chunk(net: str, chunks: str) -> None:
    class Recurrent(NETS[net]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(1, WIDTH, batch_first=True)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            return self.memory(super().forward(x), state)

    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        state = (torch.zeros(1, ROWS, WIDTH, device=DEVICE), torch.zeros(1, ROWS, WIDTH, device=DEVICE))
        losses: list[Tensor] = []
        for k in range(3):
            out, state = module(batch(10 * i + k), state)
            losses.append(out.square().mean())
            if chunks == "detached":
                losses[-1].backward()
                state = (state[0].detach(), state[1].detach())
            elif chunks != "one backward at the end":
                losses[-1].backward(retain_graph=True)
        if chunks == "one backward at the end":
            torch.stack(losses).sum().backward()
        return losses

    assert_same_training(Recurrent, step, steps=3, at_named_size=chunks != "detached")


@pytest.mark.parametrize("net", NETS)
def test_a_forward_takes_a_list_of_crops(net: str) -> None:
    class Crops(NETS[net]):  # type: ignore[misc]
        def forward(self, crops: list[Tensor]) -> list[Tensor]:
            large, small = torch.cat(crops[:2]), torch.cat(crops[2:])
            return [super(Crops, self).forward(x).mean(dim=(1, 2)) for x in (large, small)]

    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        crops = [batch(10 * i + k, rows) for k, rows in enumerate((ROWS, ROWS, 1, 1, 1))]
        large, small = module(crops)
        loss = (small - large.detach().mean()).square().mean() + large.square().mean()
        loss.backward()
        return [loss]

    assert_same_training(Crops, step)


@pytest.mark.parametrize("queue", ["rolled", "written at a pointer"])
@pytest.mark.parametrize("net", NETS)
def test_contrast_with_a_memory_bank(net: str, queue: str) -> None:
    """As in MoCo: the forward moves the keys' encoder, and puts the keys into a buffer that it has read from."""

    class Contrast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = NETS[net](), NETS[net]()
            self.keys.load_state_dict(self.queries.state_dict())
            self.keys.requires_grad_(False)
            self.bank: Tensor
            self.pointer: Tensor
            self.register_buffer("bank", torch.randn(4 * ROWS, LENGTH))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            query = F.normalize(self.queries(x).squeeze(-1), dim=1)
            with torch.no_grad():
                for mine, theirs in zip(self.keys.parameters(), self.queries.parameters(), strict=True):
                    mine.lerp_(theirs, 0.01)
                key = F.normalize(self.keys(other).squeeze(-1), dim=1)
            logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ self.bank.clone().T], dim=1)
            with torch.no_grad():
                if queue == "rolled":
                    self.bank.copy_(torch.cat([key, self.bank[:-ROWS]]))
                else:
                    start = int(self.pointer)
                    self.bank[start : start + ROWS] = key
                    self.pointer.fill_((start + ROWS) % len(self.bank))
            return logits / 0.2

    def step(module: nn.Module, i: int) -> Sequence[Tensor]:
        logits = module(batch(i), batch(i + 50))
        loss = F.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.long, device=logits.device))
        loss.backward()
        return [loss]

    assert_same_training(Contrast, step)


@pytest.mark.parametrize("net", NETS)
def test_a_gan_with_a_gradient_penalty(net: str) -> None:
    """Both networks have a budget, and the critic's loss holds a gradient of the critic."""

    def step(pair: nn.Module, i: int) -> Sequence[Tensor]:
        generator, critic = pair.get_submodule("generator"), pair.get_submodule("critic")
        real = batch(i)
        with sdpa_kernel(SDPBackend.MATH):
            between = (real + generator(batch(i + 50)).detach()).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            for_critic = critic(between.detach()).mean() - critic(real).mean() + (slope.norm() - 1).square()
            for_critic.backward()
            critic.requires_grad_(False)
            for_generator = -critic(real + generator(batch(i + 70))).mean()
            for_generator.backward()
            critic.requires_grad_(True)
        return [for_critic, for_generator, slope]

    def make() -> nn.Module:
        return nn.ModuleDict({"generator": NETS[net](), "critic": NETS[net]()})

    assert_same_training(make, step, steps=3, parts=("generator", "critic"), at_named_size=True)


@pytest.mark.parametrize("net", NETS)
def test_an_averaged_teacher_with_a_budget_of_its_own(net: str) -> None:
    """The teacher runs without gradients: nothing is replayed, and its statistics and weights move all the same."""

    def step(pair: nn.Module, i: int) -> Sequence[Tensor]:
        student, teacher = pair.get_submodule("student"), pair.get_submodule("teacher")
        with torch.no_grad():
            target = teacher(batch(i + 50))
        loss = (student(batch(i)) - target).square().mean()
        loss.backward()
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        return [loss]

    def make() -> nn.Module:
        return nn.ModuleDict({"student": NETS[net](), "teacher": NETS[net]()})

    assert_same_training(make, step, parts=("student", "teacher"))


def around(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Step:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        with context():
            return plain(module, step)

    return step


@pytest.mark.parametrize("net", NETS)
def test_inside_a_checkpoint_it_is_plain_and_says_so(net: str) -> None:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        out = torch.utils.checkpoint.checkpoint(module, batch(step), use_reentrant=False)
        loss = out.square().mean()
        loss.backward()
        return [loss]

    assert_same_training(NETS[net], step, kept="`torch.utils.checkpoint` surrounds the call", replays=False)


@pytest.mark.parametrize("net", ["traced"])  # a value cannot be looked at inside vmap
def test_inside_a_transform_it_is_plain_and_says_so(net: str) -> None:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        module.eval()  # statistics cannot be changed inside a transform
        weights = {name: p.detach() for name, p in module.named_parameters()}
        loss_and_gradients = torch.func.grad_and_value(
            lambda w: functional_call(module, w, (batch(step),)).square().mean()
        )
        gradients, loss = loss_and_gradients(weights)
        for name, p in module.named_parameters():
            p.grad = gradients[name]
        module.train()
        return [loss]

    assert_same_training(NETS[net], step, kept="`torch.func` transform", replays=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_is_plain_and_says_so() -> None:
    def step(module: nn.Module, step: int) -> Sequence[Tensor]:
        with torch.autograd.forward_ad.dual_level():
            x = batch(step)
            out = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            primal, tangent = torch.autograd.forward_ad.unpack_dual(out)
            loss = primal.square().mean() + tangent.square().mean()
        loss.backward()
        return [loss]

    def without_attention() -> nn.Module:
        return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())))

    assert_same_training(without_attention, step, kept="forward-mode AD", replays=False)
