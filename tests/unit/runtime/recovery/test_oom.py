"""A step that runs out of memory is run again under a tighter plan, and nothing is lost: `torch.equal`, throughout."""

import copy
import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tinybp_lightning as tbp
from benchmarks.faults import Faults, Place
from tests.unit.runtime.training import Recorder, peak_bytes, residual_net
from tinybp_lightning.capture.torch.private import is_profiling
from tinybp_lightning.errors import ConfigError, HCBWarning
from tinybp_lightning.runtime.torch import targets
from tinybp_lightning.runtime.torch.measure.allocator import can_trace
from tinybp_lightning.runtime.torch.measure.block_profiler import BlockProfiler
from tinybp_lightning.runtime.torch.measure.step_monitor import settle_pending
from tinybp_lightning.runtime.torch.replay.engine import Run

WIDTH = 16
X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
ANSWERED = "ignore:`.*` ran out of device memory:tinybp_lightning.errors.HCBWarning"
ALONE = "ignore:`.*` cannot be traced:tinybp_lightning.errors.HCBWarning"
pytestmark = [pytest.mark.filterwarnings(ANSWERED), pytest.mark.filterwarnings(ALONE)]


class Net(nn.Module):
    """Draws (dropout), learns statistics (BatchNorm), and counts in a buffer of its own."""

    seen: torch.Tensor
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_net(5)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.norm(self.body(x))


class Broken(Net):
    """Is trained by module steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.body:
            torch._dynamo.graph_break()
            x = block(x)
        return self.norm(x)


def square_loss(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002 - the global generator is the point
    return scale * model(x).square().mean()


def plain_step(model: nn.Module) -> torch.Tensor:
    loss = square_loss(model)
    loss.backward()
    return loss.detach()


def retried_step(model: nn.Module) -> torch.Tensor:
    return tbp.run_step(model, square_loss, model)


@pytest.fixture
def faults() -> Iterator[Faults]:
    with Faults() as entered:
        yield entered


def train(
    model: nn.Module,
    step: Callable[[nn.Module], torch.Tensor],
    *,
    steps: int,
    accumulate: int = 1,
    before: Callable[[int], None] = lambda _: None,
) -> list[Any]:
    """Return losses, gradients, parameters, buffers, optimizer state and generators after `steps` micro-batches."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for index in range(steps):
        if index % accumulate == 0:
            optimizer.zero_grad()
        before(index)
        losses.append(step(model))
        if (index + 1) % accumulate == 0:
            optimizer.step()
    state = [v for p in model.parameters() for v in optimizer.state[p].values()]
    gradients = [p.grad for p in model.parameters()]
    drawn = [torch.rand(4), torch.tensor(random.random()), torch.tensor(np.random.rand())]  # noqa: NPY002
    return [*losses, *gradients, *model.state_dict().values(), *state, *drawn]


def assert_equal(got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    assert [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("place", [Place.FORWARD, Place.REPLAY, Place.BACKWARD])
@pytest.mark.parametrize("make", [Net, Broken])
def test_every_third_step_runs_out_of_memory(
    make: Callable[[], nn.Module], place: Place, accumulate: int, faults: Faults
) -> None:
    torch.manual_seed(3)
    plain = make()
    model = copy.deepcopy(plain)
    want = train(plain, plain_step, steps=12, accumulate=accumulate)
    tbp.hcb(model, activation_budget="80%")
    middle = model.get_parameter("body.2.up.weight")  # some gradients are finished by then, and some are not
    middle.register_hook(faults.hook)

    def before(index: int) -> None:
        faults.disarm()
        if index % 3 == 2:
            faults.arm(place, after=1 if place is not Place.BACKWARD else 0)

    got = train(model, retried_step, steps=12, accumulate=accumulate, before=before)
    assert_equal(got, want)
    assert faults.num_raised == 4


def test_the_plan_is_tighter_and_stays_so(faults: Faults) -> None:
    model, recorder = residual_net(6), Recorder()
    tbp.hcb(model, activation_budget="90%", observers=[recorder])
    for _ in range(5):
        tbp.run_step(model, square_loss, model)
    before = targets(model)[0].active_plan
    assert before is not None
    faults.arm(Place.FORWARD, after=2)
    with pytest.warns(HCBWarning, match="`Sequential` ran out of device memory. The step is run again"):
        tbp.run_step(model, square_loss, model)
    for _ in range(3):
        tbp.run_step(model, square_loss, model)
    tightened = [p for p in recorder.plans if p.reason == "out of memory"]
    after = targets(model)[0].active_plan
    assert after is not None
    assert tightened
    assert all(p.predicted_peak_bytes < before.predicted_peak_bytes for p in tightened)
    assert after.predicted_peak_bytes < before.predicted_peak_bytes


def test_a_step_goes_down_to_the_smallest_plan_and_then_raises_the_first_error(faults: Faults) -> None:
    model, recorder = residual_net(6), Recorder()
    tbp.hcb(model, activation_budget="90%", observers=[recorder])
    for _ in range(5):
        tbp.run_step(model, square_loss, model)
    errors: list[torch.OutOfMemoryError] = []

    def never_fits(model: nn.Module) -> torch.Tensor:
        errors.append(torch.OutOfMemoryError(f"CUDA out of memory. Run {len(errors)}."))
        raise errors[-1]

    with pytest.raises(torch.OutOfMemoryError) as caught:
        tbp.run_step(model, never_fits, model)
    assert caught.value is errors[0]
    assert caught.value.args == ("CUDA out of memory. Run 0.",)  # as Lightning's batch-size finder reads it
    (target,) = targets(model)
    assert target.active_plan is not None
    assert target.active_plan.predicted_peak_bytes == target.smallest_bytes
    (note,) = caught.value.__notes__
    assert f"it was run {len(errors)} times, the last time under the smallest plan" in note
    assert "`Sequential` ran the plan `out of memory`" in note
    # The next step is an ordinary one.
    want = plain_step(tbp.restore(copy.deepcopy(model)))
    assert want.shape == retried_step(model).shape


@pytest.mark.parametrize("place", [Place.FORWARD, Place.REPLAY])
def test_an_error_in_the_first_step_is_tried_once_more(place: Place, faults: Faults) -> None:
    """The first step runs the smallest plan already; the failed run has left the allocator whole segments."""
    plain = Net()
    model = tbp.hcb(copy.deepcopy(plain), activation_budget="90%")
    got = train(model, retried_step, steps=1, before=lambda _: faults.arm(place, after=1))
    assert_equal(got, train(plain, plain_step, steps=1))
    assert faults.num_raised == 1


def test_a_first_step_that_never_fits_says_so(faults: Faults) -> None:
    model = tbp.hcb(residual_net(4), activation_budget="90%")

    def before_each_run(model: nn.Module) -> torch.Tensor:
        faults.arm(Place.FORWARD)
        return square_loss(model)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        tbp.run_step(model, before_each_run, model)
    assert faults.num_raised == 2
    assert "it was run 2 times, the last time under the smallest plan" in caught.value.__notes__[0]
    assert "`Sequential` ran the plan `calibration`" in caught.value.__notes__[0]


@pytest.mark.parametrize("place", list(Place))
def test_nothing_of_the_failed_run_is_alive_in_the_second(
    place: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, the second run would need twice the memory."""
    model = tbp.hcb(residual_net(5), activation_budget="80%")
    for _ in range(4):
        retried_step(model)
    runs: list[weakref.ref[Run]] = []
    alive_at_begin: list[int] = []
    original = Run.begin

    def begin(self: Run, root: list[object]) -> None:
        alive_at_begin.append(sum(r() is not None for r in runs))
        runs.append(weakref.ref(self))
        original(self, root)

    monkeypatch.setattr(Run, "begin", begin)
    model[2].up.weight.register_hook(faults.hook)
    faults.arm(place, after=0)
    retried_step(model)
    assert faults.num_raised == 1
    assert alive_at_begin == [0, 0]


class Popped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = residual_net(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_batch_that_is_taken_apart_is_whole_again(faults: Faults) -> None:
    model = tbp.hcb(Popped(), activation_budget="90%")

    def compute_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch.pop("x")) - batch.pop("y")).square().mean()

    faults.arm(Place.FORWARD)
    tbp.run_step(model, compute_loss, {"x": X, "y": torch.zeros_like(X)})
    assert faults.num_raised == 1


def test_a_backward_of_the_users_own(faults: Faults) -> None:
    plain = residual_net(4)
    model = tbp.hcb(copy.deepcopy(plain), activation_budget="90%")
    torch.manual_seed(0)
    (8 * plain(X).square().mean()).backward()
    torch.manual_seed(0)
    faults.arm(Place.REPLAY, after=1)
    tbp.run_step(model, lambda: model(X).square().mean(), backward=lambda loss: (8 * loss).backward())
    assert faults.num_raised == 1
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_raise_lets_the_error_pass_with_a_note(faults: Faults) -> None:
    model = tbp.hcb(residual_net(4), config=tbp.HCBConfig(activation_budget="90%", on_oom="raise"))
    retried_step(model)
    faults.arm(Place.FORWARD)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        retried_step(model)
    assert '`on_oom="raise"` was asked for' in caught.value.__notes__[0]
    assert "`Sequential` ran the plan" in caught.value.__notes__[0]
    assert faults.num_raised == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt()])
def test_an_error_while_a_block_is_measured_leaves_no_trace_on(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the profiler left on, or its lock held, every later step would run unplanned."""
    budget_bytes = int(0.7 * peak_bytes(residual_net(5), square_loss))
    model, recorder = residual_net(5), Recorder()
    tbp.hcb(model, activation_budget=budget_bytes, observers=[recorder])
    original, left = BlockProfiler._replay, [error]

    def replay(self: BlockProfiler, *args: Any) -> Any:
        if left:
            assert is_profiling(), "the error would come outside of a trace: the test shows nothing"
            raise left.pop()
        return original(self, *args)

    monkeypatch.setattr(BlockProfiler, "_replay", replay)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            retried_step(model)
        assert not is_profiling()
        assert others_can_trace()
    retried_step(model)  # planned, or `HCBWarning` says that it is not
    assert left == []
    settle_pending()
    assert not is_profiling()
    assert others_can_trace()
    for _ in range(3):
        retried_step(model)
    assert recorder.plans
    assert peak_bytes(model, square_loss) <= budget_bytes


def others_can_trace() -> bool:
    """Whether the tracing lock is free, as another thread sees it."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(can_trace(X.device)))
    thread.start()
    thread.join()
    return seen[0]


# ---- what cannot be run again ----------------------------------------------------------------------------------------


def in_place_on_the_batch(model: nn.Module, x: torch.Tensor) -> None:
    x.mul_(2)


def a_parameter(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.0)


def a_backward_of_its_own(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()


def another_module(model: nn.Module, x: torch.Tensor) -> None:
    model.add_module("late", nn.Identity())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_place_on_the_batch, "the step changed its batch in place"),
        (a_parameter, "parameter `net.0.norm.weight` was changed before the step had ended"),
        (a_backward_of_its_own, "the gradient of `net.0.norm.weight` was changed in the forward"),
        (another_module, "a part of the model was added or taken away during the step"),
    ],
)
def test_a_step_that_cannot_be_run_again_says_why(change: Callable[..., None], reason: str) -> None:
    model = tbp.hcb(Popped(), activation_budget="90%")
    num_runs = 0

    def compute_loss(x: torch.Tensor) -> torch.Tensor:
        nonlocal num_runs
        num_runs += 1
        change(model, x)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        tbp.run_step(model, compute_loss, X.clone())
    assert f"the step cannot be saved: {reason}." in caught.value.__notes__[0]
    assert num_runs == 1


def test_a_buffer_that_changes_for_the_first_time() -> None:
    """Later steps copy only the buffers that the first ones changed."""
    model = tbp.hcb(Net(), activation_budget="90%")
    for _ in range(3):
        retried_step(model)

    def compute_loss() -> torch.Tensor:
        model.mean.add_(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        tbp.run_step(model, compute_loss)
    assert "buffer `mean` changed for the first time, and there is no copy of it" in caught.value.__notes__[0]


def test_a_hook_after_accumulation_may_have_done_anything(faults: Faults) -> None:
    model = tbp.hcb(residual_net(4), activation_budget="90%")
    retried_step(model)
    model[3].up.weight.register_post_accumulate_grad_hook(lambda p: None)
    model[1].up.weight.register_hook(faults.hook)
    faults.arm(Place.BACKWARD)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        retried_step(model)
    assert "`3.up.weight` has a hook that runs after its gradient's accumulation" in caught.value.__notes__[0]


def test_a_step_that_draws_its_batch_itself() -> None:
    model = tbp.hcb(residual_net(4), activation_budget="90%")

    def compute_loss(batches: Iterator[torch.Tensor]) -> torch.Tensor:
        next(batches)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        tbp.run_step(model, compute_loss, iter([X, X]))
    assert "draws its batch itself" in caught.value.__notes__[0]


@pytest.mark.parametrize("returned", [None, 1.0, torch.zeros(())])
def test_a_loss_is_expected(returned: Any) -> None:
    model = tbp.hcb(residual_net(4), activation_budget="90%")
    with pytest.raises(ConfigError, match="`compute_loss` returned"):
        tbp.run_step(model, lambda: returned)


def test_a_model_that_is_not_under_a_budget_is_named() -> None:
    model = residual_net(4)
    with pytest.raises(ConfigError, match="`Sequential` is not under height-compressed backpropagation"):
        tbp.run_step(model, square_loss, model)


# ---- other exceptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("place", list(Place))
def test_other_exceptions_pass_and_leave_the_model_usable(error: type[BaseException], place: Place) -> None:
    plain = Net()
    model = tbp.hcb(copy.deepcopy(plain), activation_budget="80%")
    with Faults(error) as faults:
        handle = model.get_parameter("body.2.up.weight").register_hook(faults.hook)
        for _ in range(3):
            retried_step(model)
        faults.arm(place, after=0)
        with pytest.raises(error):
            retried_step(model)
        handle.remove()
    assert faults.num_raised == 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    plain.load_state_dict(model.state_dict())
    model.zero_grad()
    assert_equal(train(model, retried_step, steps=2), train(plain, plain_step, steps=2))


def test_an_interrupt_in_the_second_run_leaves_no_hooks(faults: Faults) -> None:
    """Finished gradients are put back by hooks of ours, which must not outlive the step."""
    model = tbp.hcb(residual_net(4), activation_budget="80%")
    retried_step(model)  # gradients stay: the next step adds to them
    retried_step(model)
    raises = iter([torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt()])

    def hook(_: torch.Tensor) -> None:
        raise next(raises)

    handle = model[1].up.weight.register_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        retried_step(model)
    handle.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    gc.collect()
    retried_step(model)
