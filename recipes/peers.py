"""Prepare a model for training in each mode.

Each mode follows its documentation and is tuned as an expert would tune it: compiled blocks have static shapes, so that
equal blocks share one compilation, and a language model's loss is compiled apart. The compiler's settings are global:
a process may apply one mode only.
"""

# torch annotates its members in part only, so the rule would report it and not us.
# pyright: reportUnknownMemberType=false

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, assert_never, cast

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,  # pyright: ignore[reportUnknownVariableType]  # its function argument is not annotated
    create_selective_checkpoint_contexts,  # pyright: ignore[reportUnknownVariableType]  # likewise
)

from recipes.budget import budget_bytes, budget_share
from recipes.forecast import PlanRecorder, Prediction
from recipes.models import Workload
from recipes.modes import Mode

if TYPE_CHECKING:
    from tinybp_lightning.config import CostsChoice, ExecutorChoice
    from tinybp_lightning.runtime.profile import Observer

__all__ = ["apply_mode"]

# More than the distinct blocks of any recipe's model: beyond its default of 8, Dynamo would give up and run eagerly.
MAX_COMPILED_VARIANTS = 256

aten = torch.ops.aten
# Selective checkpointing keeps the outputs of these ops: they cost most to recompute for each byte.
KEPT_OPS: frozenset[Any] = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)


Forecast = Callable[[], Prediction | None]


def apply_mode(
    mode: Mode,
    workload: Workload,
    *,
    budget: str,
    naive_peak_bytes: int,
    observers: Sequence["Observer"] = (),
    costs: "CostsChoice" = "seconds",
) -> Forecast:
    """Change `workload.model`, in place, so that it trains in `mode`.

    **Arguments:** `budget`: for activations, `"30%"` or `"2GiB"`; `naive_peak_bytes`: the activation peak of plain
    training, which turns bytes into the share that torch's own budget needs (0 when it is not known); `observers`: are
    told of `hcb`'s plans and steps; `costs`: what `hcb`'s plans minimise.

    **Returns:** a function that returns, after training, what the mode predicted, or `None` if it does not predict.

    **Raises:** the mode's own errors for a model or a budget that it does not accept.
    """
    torch._dynamo.config.recompile_limit = MAX_COMPILED_VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = MAX_COMPILED_VARIANTS
    match mode:
        case Mode.naive:
            pass
        case Mode.checkpoint:
            _checkpoint_blocks(workload)
        case Mode.selective:
            _checkpoint_blocks(workload, context_fn=_keep_costly_ops)
        case Mode.compile:
            workload.model.compile(dynamic=False)
        case Mode.compile_layers:
            _compile_blocks(workload)
        case Mode.compile_layers_checkpoint:
            _compile_blocks(workload)
            _checkpoint_blocks(workload)
        case Mode.activation_memory_budget:
            _set_memory_budget(budget, naive_peak_bytes)
            workload.model.compile(dynamic=False)
        case Mode.compile_layers_memory_budget:
            _set_memory_budget(budget, naive_peak_bytes)
            _compile_blocks(workload)
        case Mode.hcb_eager:
            return _hcb(workload, budget, naive_peak_bytes, executor="eager", observers=observers, costs=costs)
        case Mode.hcb_inductor:
            return _hcb(workload, budget, naive_peak_bytes, executor="inductor", observers=observers, costs=costs)
        case _:
            assert_never(mode)
    return _no_forecast


def _no_forecast() -> Prediction | None:
    return None


def _checkpoint_blocks(workload: Workload, **options: Any) -> None:
    """Recompute each block's activations in its backward (non-reentrant, with the same random numbers)."""
    for block in workload.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def _keep_costly_ops() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _compile_blocks(workload: Workload) -> None:
    """Compile the forward of each block by itself, so that checkpointing can wrap it."""
    for block in workload.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    _compile_token_loss(workload.model)


def _compile_token_loss(model: nn.Module) -> None:
    """Compile a transformers language model's loss: in eager mode, its float32 logits determine the peak."""
    if hasattr(model, "lm_head") and hasattr(model, "loss_function"):
        cast(Any, model).loss_function = torch.compile(cast(Any, model).loss_function, dynamic=False)


def _set_memory_budget(budget: str, naive_peak_bytes: int) -> None:
    """Set torch's own budget: a share, from 0 to 1, of what the compiled graph would save."""
    torch._functorch.config.activation_memory_budget = budget_share(budget, naive_peak_bytes=naive_peak_bytes)


def _hcb(
    workload: Workload,
    budget: str,
    naive_peak_bytes: int,
    *,
    executor: "ExecutorChoice",
    observers: Sequence["Observer"],
    costs: "CostsChoice",
) -> Forecast:
    """Apply `hcb`, with a share turned into bytes of plain training's *measured* peak, by which the table judges."""
    from tinybp_lightning import hcb  # noqa: PLC0415  the other modes do not load it

    recorder = PlanRecorder()
    activation_budget = budget_bytes(budget, naive_peak_bytes=naive_peak_bytes) if naive_peak_bytes else budget
    hcb(
        workload.model,
        activation_budget=activation_budget,
        executor=executor,
        plan_cache=False,  # a plan from an earlier run must not change what this one measures
        costs=costs,
        observers=(recorder, *observers),
    )
    return recorder.prediction
