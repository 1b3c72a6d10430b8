import pytest
import torch
from torch import Tensor, nn

from recipes.config import Precision
from recipes.data import Batch
from recipes.measure import cuda_events, measure, record_memory, tensors_sha256
from recipes.measurement import Measurement
from recipes.models import Workload
from recipes.timeline import account

ROWS, WIDTH = 64, 256
SQUARE_BYTES = WIDTH * WIDTH * 4
ROW_BYTES = ROWS * WIDTH * 4


class Square(nn.Module):
    """`sum(relu(x @ w))`: few enough allocations to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(x @ self.weight).sum()


def workload(model: nn.Module) -> Workload:
    return Workload(model, (), lambda network, batch: network(batch.inputs["x"]), Precision.fp32, "by hand")


def batches(number: int) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(Batch({"x": torch.randn(ROWS, WIDTH, generator=generator)}) for _ in range(number))


def measured(model: nn.Module, *, number: int = 4) -> Measurement:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return measure(workload(model), optimizer, batches(number), warmup_steps=1, seed=0)


def test_peaks_of_a_step_counted_by_hand() -> None:
    """The product dies with the expression that relu reads it in, so two rows are alive at once, twice over: product
    and relu in the forward; relu and its input's gradient in the backward, where the sum and its gradient (4 bytes
    each) are alive too. relu dies with its backward, before the weight's gradient is made beside one row. The gradient
    of relu's output is the sum's, expanded, which allocates nothing; `x` has none; the optimizer is not in the step.
    """
    found = measured(Square())
    scalars = 2 * 4
    assert found.activation_peak_bytes == 2 * ROW_BYTES + scalars
    assert found.peak_bytes == ROW_BYTES + scalars + SQUARE_BYTES
    assert found.residue_bytes == 0
    assert max(found.timeline.live_bytes) == found.activation_peak_bytes
    assert found.timeline.time_s[0] == 0.0
    assert found.timeline.time_s[-1] == pytest.approx(found.wall_s)


class Hoarder(Square):
    """Keeps each step's activation, so that it outlives the step."""

    def __init__(self) -> None:
        super().__init__()
        self.hoard: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hoard.append((x * 2.0).detach())
        return super().forward(x)


def test_what_outlives_the_step_beside_gradients_is_residue() -> None:
    found = measured(Hoarder())
    assert found.residue_bytes == ROW_BYTES
    assert found.activation_peak_bytes == 3 * ROW_BYTES + 8


def test_losses_and_digests_are_those_of_training_by_hand() -> None:
    found = measured(Square(), number=4)
    model, losses = Square(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        loss = model(batch.inputs["x"])
        loss.backward()
        losses.append(loss.item())
        if step < 3:
            optimizer.step()
    assert found.losses == tuple(losses)
    assert found.gradients_sha256 == tensors_sha256([("weight", model.weight.grad)])
    assert found.parameters_sha256 == tensors_sha256(model.named_parameters())
    assert found.buffers_sha256 == tensors_sha256(model.named_buffers())
    assert len(found.step_walls_s) == 2


def test_every_step_is_announced() -> None:
    model, steps = Square(), list[int]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    measure(workload(model), optimizer, batches(4), warmup_steps=0, seed=0, on_step=steps.append)
    assert steps == [0, 1, 2, 3]


def test_the_caching_allocators_trace_is_read_by_requests() -> None:
    trace = [
        ("segment_alloc", 7, 2048, 5),
        ("alloc", 7, 1024, 10),
        ("alloc", 8, 512, 1_000_010),
        ("free_requested", 7, 1024, 1_500_010),
        ("free_completed", 7, 1024, 1_500_011),
        ("snapshot", 0, 0, 1_600_000),
    ]
    entries = [dict(zip(("action", "addr", "size", "time_us"), entry, strict=True)) for entry in trace]
    events = cuda_events(entries)
    assert [(event.address, event.size_bytes) for event in events] == [(7, 1024), (8, 512), (7, -1024)]
    assert [event.time_s for event in events] == pytest.approx([0.0, 1.0, 1.5])
    memory = account(events, gradient_addresses=[8])
    assert (memory.peak_bytes, memory.activation_peak_bytes, memory.residue_bytes) == (1536, 1024, 0)


def test_a_digest_sees_one_bit_a_name_and_a_type() -> None:
    tensor = torch.zeros(3)
    nudged = torch.tensor([0.0, 0.0, -0.0])
    bfloat = torch.zeros(3, dtype=torch.bfloat16)
    digests = [tensors_sha256([pair]) for pair in (("a", tensor), ("a", nudged), ("b", tensor), ("a", bfloat))]
    assert len(set(digests)) == 4
    assert tensors_sha256([("a", tensor.clone())]) == digests[0]


def test_a_gradient_left_over_is_an_error() -> None:
    model = Square()
    model(torch.ones(1, WIDTH)).backward()
    with pytest.raises(ValueError, match=r"`weight` has a gradient before the step"):
        record_memory(lambda: None, model)


@pytest.mark.parametrize("warmup_steps", [-1, 3])
def test_at_least_one_step_is_timed(warmup_steps: int) -> None:
    model = Square()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=f"warmup_steps={warmup_steps}"):
        measure(workload(model), optimizer, batches(4), warmup_steps=warmup_steps, seed=0)
