"""A forward is traced as one graph, again where it must be, or not at all, and then nothing of it has run."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from tinybp_lightning.capture.torch.dynamo import CannotTraceError, Tracer
from tinybp_lightning.errors import CaptureError

WIDTH = 4


class Spy:
    """Counts graphs and runs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.runs = 0

    def __call__(self, module: fx.GraphModule) -> Callable[..., Any]:
        self.graphs.append(module)

        def run(*args: Any) -> Any:
            self.runs += 1
            return module(*args)

        return run


def spied(forward: Callable[..., Any]) -> tuple[Callable[..., Any], Spy]:
    spy = Spy()
    return Tracer(forward, spy), spy


def test_one_graph_for_each_shape() -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    call, spy = spied(linear.forward)
    for rows in (2, 3, 2, 3, 5):
        x = torch.randn(rows, WIDTH)
        assert torch.equal(call(x), linear(x))
    assert len(spy.graphs) == 3
    assert spy.runs == 5


def test_more_shapes_than_torch_allows_by_default() -> None:
    call, spy = spied(nn.Linear(WIDTH, WIDTH).forward)
    for rows in range(1, 24):
        call(torch.randn(rows, WIDTH))
    assert len(spy.graphs) == 23


def test_two_instances_of_one_class() -> None:
    one, two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    (call_one, spy_one), (call_two, spy_two) = spied(one.forward), spied(two.forward)
    x = torch.randn(2, WIDTH)
    for _ in range(2):
        assert torch.equal(call_one(x), one(x))
        assert torch.equal(call_two(x), two(x))
    assert (spy_one.runs, spy_two.runs) == (2, 2)


def test_a_log_line_breaks_nothing() -> None:
    logger = logging.getLogger("test")

    def forward(x: torch.Tensor) -> torch.Tensor:
        logger.warning("hello")
        return x.exp()

    call, spy = spied(forward)
    assert torch.equal(call(torch.ones(2)), torch.ones(2).exp())
    assert spy.runs == 1


def test_the_path_of_eager_execution_is_taken() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.exp() if torch.compiler.is_compiling() else x.sin()

    call, _ = spied(forward)
    assert torch.equal(call(torch.ones(2)), torch.ones(2).sin())
    # And only while it is traced for us.
    assert torch.equal(torch.compile(forward, backend="eager")(torch.ones(2)), torch.ones(2).exp())


def breaks_the_graph(x: torch.Tensor) -> torch.Tensor:
    ran.append("before")
    y = x.exp()
    torch._dynamo.graph_break()
    return y + 1


def branches_on_data(x: torch.Tensor) -> torch.Tensor:
    return x.exp() if x.sum() > 0 else x.sin()


ran: list[str] = []


@pytest.mark.parametrize("forward", [breaks_the_graph, branches_on_data])
def test_what_cannot_be_traced_is_an_error_and_has_not_run(forward: Callable[..., Any]) -> None:
    ran.clear()
    call, spy = spied(forward)
    with pytest.raises(CannotTraceError) as caught:
        call(torch.ones(2))
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CaptureError)
    assert spy.runs == 0
    assert ran == []


def test_an_error_of_the_user_reaches_the_user() -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    call, _ = spied(linear.forward)
    call(torch.randn(2, WIDTH))

    def failing(_: fx.GraphModule) -> Callable[..., Any]:
        def run(*_: Any) -> Any:
            raise KeyError("mine")

        return run

    with pytest.raises(KeyError, match="mine"):
        Tracer(linear.forward, failing)(torch.randn(2, WIDTH))


def test_settings_are_put_back() -> None:
    before = (torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp)
    call, _ = spied(lambda x: x.exp())
    call(torch.ones(2))
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp) == before
