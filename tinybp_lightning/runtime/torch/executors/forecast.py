"""What would an option of a compiled block save and repeat? Read off its partition, without compiling it.

One trace gives the block's joint graph, and dividing it takes little beside generating code. What is saved is the
partition's to the byte. What is repeated is estimated against the same block's option 0, which is compiled and
measured; an option that a plan takes is compiled and measured itself.

Private API: `torch._functorch.partitioners`, `torch._inductor.compile_fx.compile_fx` (torch 2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# AOTAutograd's partitioners are private and barely annotated.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch import partitioners as aot
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from tinybp_lightning.runtime.torch.executors.partitioner import ClosurePartitioner, repeated_share, value_bytes

__all__ = ["Forecast", "forecast_options"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """One option of a block that is not compiled.

    `saved_bytes`: what it saves beside what the block takes and returns. `saved_arguments`, `saved_results`: positions
    of those that are saved too. `repeated_share`: of the forward's time, what backward repeats beyond option 0.
    """

    saved_bytes: int
    saved_arguments: tuple[int, ...]
    saved_results: tuple[int, ...]
    repeated_share: float


def forecast_options(
    module: fx.GraphModule, arguments: Sequence[Any], *, shares: Sequence[float], parameters: frozenset[int]
) -> tuple[Forecast, ...] | None:
    """Return one forecast for each of `shares`, or `None` for a block whose partition does not show them.

    That is a block without backward, one that changes what it is given, and one that the compiler gives more arguments
    than it has.

    **Arguments:** `module`: takes `arguments` and returns a tuple; `parameters`: see `ClosurePartitioner`.
    """
    tracer = _Tracer()
    compile_graph: Any = compile_fx  # its annotation has cases that a graph in memory never makes
    with inductor_config.patch(custom_partitioner_fn=tracer), functorch_config.patch(enable_autograd_cache=False):
        compile_graph(module, list(arguments), inner_compile=_uncompiled)
    if len(tracer.found) != 1:
        return None
    ((joint, options),) = tracer.found
    returned: Any = module.graph.output_node().args[0]
    if options["num_fwd_outputs"] != len(returned):
        return None
    plain_forward, plain_backward = aot.min_cut_rematerialization_partition(_copy(joint), (), **options)
    if len(plain_forward.graph.find_nodes(op="placeholder")) != len(arguments):
        return None
    repeated_anyway = repeated_share(plain_forward, plain_backward)
    forecasts: list[Forecast] = []
    for share in shares:
        forward, backward = ClosurePartitioner(share, parameters)(_copy(joint), (), **options)
        repeats = max(0.0, repeated_share(forward, backward) - repeated_anyway)
        forecasts.append(Forecast(*_saved(forward, len(returned)), repeats))
    return tuple(forecasts)


class _Tracer(CustomPartitionerFn):
    """Keeps copies of the joint graphs that it is given to divide."""

    def __init__(self) -> None:
        self.found: list[tuple[fx.GraphModule, dict[str, Any]]] = []

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.found.append((_copy(gm), kwargs))
        return aot.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """Nothing of it is cached: what is wanted is the graph."""
        return None


def _uncompiled(module: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
    return module


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    result: Any = graph.graph_copy(module.graph, {}, return_output_node=True)
    returned, output = result
    graph.output(returned).meta = dict(output.meta)
    return fx.GraphModule(module, graph)


def _saved(forward: fx.GraphModule, num_results: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the bytes that are saved on storages of their own, and which arguments and results are saved."""
    returned: Any = forward.graph.output_node().args[0]
    saved = {_storage(n) for n in returned[num_results:] if isinstance(n, fx.Node)}
    arguments = {n: k for k, n in enumerate(forward.graph.find_nodes(op="placeholder"))}
    results = [_storage(n) if isinstance(n, fx.Node) else None for n in returned[:num_results]]
    return (
        sum(value_bytes(n.meta.get("val")) for n in saved if n not in arguments and n not in results),
        tuple(sorted(arguments[n] for n in saved if n in arguments)),
        tuple(k for k, n in enumerate(results) if n in saved),
    )


def _storage(node: fx.Node) -> fx.Node:
    """Return the op or argument whose storage `node` is a view of."""
    views = aot.get_default_op_list()
    while views.is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
