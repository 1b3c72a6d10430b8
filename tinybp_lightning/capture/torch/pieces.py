"""How is a traced forward run block by block? Each block of the graph becomes a callable, its *piece*.

A piece makes the user's own torch calls in the user's own order, so its kernels, and with them every bit of the
result, are those of plain execution. Pieces use the boxed calling convention (one list, which the callee empties), so
that an input that nobody else holds is freed at its last use inside the piece, as in plain execution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx
from torch.fx.graph import _BoxedCodeGen  # pyright: ignore[reportPrivateUsage] - torch 2.11 to 2.14
from torch.nn import functional

from tinybp_lightning.capture.torch.op_filter import call_through_filter
from tinybp_lightning.capture.torch.private import leaving_transforms
from tinybp_lightning.capture.torch.record import enters_transform, is_op
from tinybp_lightning.capture.torch.regions import has_regions, insert_switches
from tinybp_lightning.graph.cuts.narrow import BlockSpan, Granularity, choose_cuts, cut_blocks
from tinybp_lightning.graph.cuts.products import is_activation, worthwhile_skippable_ops
from tinybp_lightning.graph.ids import StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node, StorageKind

__all__ = ["EXTERNAL", "MADE", "STATE", "Piece", "Program", "Source", "cut_program", "fill_template", "reorder"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value comes from: position `index` in the state, in the graph's inputs, or in what the piece made."""

    origin: str
    index: int


STATE, EXTERNAL, MADE = "state", "external", "made"

_STATISTICS = ("running_mean", "running_var")
# The order in which `torch.nn.functional.batch_norm` takes its arguments.
_BATCH_NORM = ("input", *_STATISTICS, "weight", "bias", "training")


@dataclass(frozen=True, slots=True)
class Piece:
    """One block as a callable.

    `calls` has one entry for each option. Each takes one list (boxed), the values named by `reads` in that order, and
    returns the values that the piece makes. They differ in what they give autograd to save. `module` is the same code,
    without `SkippableOp`s.
    `state` says, for each tensor of the boundary after the block, whether it is carried over or made here.
    `volatile`, `written`, `write_only` are positions of graph inputs that the block reads: those that some block of the
    forward changes in place (running statistics), those that this block changes, and those on whose values none of its
    results depends.
    `is_out_of_place`: none of its ops changes an activation in place.
    `is_compiled`: `calls` are no longer the user's own kernels.
    `has_regions`: it opens and closes regions, of which a replay that stops early leaves some open.
    """

    calls: tuple[Callable[[list[Any]], Sequence[Any]], ...]
    module: fx.GraphModule
    reads: tuple[Source, ...]
    state: tuple[Source, ...]
    volatile: tuple[int, ...]
    written: tuple[int, ...]
    write_only: tuple[int, ...]
    is_random: bool
    is_out_of_place: bool
    span: BlockSpan
    is_compiled: bool = False
    has_regions: bool = False

    @property
    def guarded(self) -> tuple[int, ...]:
        """Positions of the inputs whose old values a replay must be given. Compiled code may read any of them."""
        return self.volatile if self.is_compiled else tuple(i for i in self.volatile if i not in self.write_only)


@dataclass(frozen=True, slots=True)
class Program:
    """A forward as pieces. `boundaries[i]` lists the values that make up the state before piece `i`.

    `outputs` says where each result of the original graph is found after the last piece; `template` is the original
    output structure, with positions into `outputs` in place of the values. `differentiated`: the results from which
    backward is presumed to start: a loss (a single number) alone where there is one, as the first measured step checks.
    `unsaved`: positions of the graph's inputs that only replays read after the forward, because autograd saves nothing
    of them. The caller may change such a tensor before backward, as plain training allows.
    """

    graph: Graph
    pieces: tuple[Piece, ...]
    boundaries: tuple[tuple[ValueId, ...], ...]
    outputs: tuple[Source, ...]
    template: Any
    differentiated: frozenset[ValueId]
    unsaved: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Slot:
    """Stands for one output value in `Program.template`."""

    index: int


def cut_program(module: fx.GraphModule, graph: Graph, *, granularity: Granularity) -> Program:
    """Cut a traced forward and its record into pieces that, run in order, compute exactly what `module` computes."""
    traced = _Traced(module, graph)
    spans = cut_blocks(graph, choose_cuts(graph, granularity=granularity))
    boundaries = ((), *(span.outputs for span in spans))
    value_of = {n: v for v, n in traced.node_of.items()}
    outputs: list[Source] = []

    def place(n: fx.Node) -> _Slot:
        outputs.append(traced.source(value_of[n], boundaries[-1]))
        return _Slot(len(outputs) - 1)

    template = fx.map_arg(module.graph.output_node().args[0], place)  # pyright: ignore[reportArgumentType]
    pieces = tuple(traced.piece(span) for span in spans)
    wanted = frozenset(v for v in graph.outputs if graph.values[v].requires_grad)
    numbers = frozenset(v for v in wanted if graph.values[v].shape == ())
    return Program(graph, pieces, boundaries, tuple(outputs), template, numbers or wanted, _unsaved_inputs(graph))


def _unsaved_inputs(graph: Graph) -> tuple[int, ...]:
    kept = {s for node in graph.nodes for s in (*node.saved, *node.writes)}
    read = {v for node in graph.nodes for v in node.reads}
    found: list[int] = []
    for position, value_id in enumerate(graph.inputs):
        value = graph.values[value_id]
        is_batch = value.storage is not None and graph.storages[value.storage].kind is StorageKind.INPUT
        if is_batch and value_id in read and value.storage not in kept and not value.requires_grad:
            found.append(position)
    return tuple(found)


def reorder(module: fx.GraphModule, graph: Graph) -> Graph:
    """Bring the calls of `module` into the order of `graph`: its record, with the nodes in another legal order.

    **Returns:** `graph`.
    """
    calls = {n.name: n for n in module.graph.nodes if is_op(n)}
    for before, after in pairwise(calls[node.name] for node in graph.nodes):
        before.append(after)
    module.recompile()
    return graph


def fill_template(template: Any, values: Sequence[Any]) -> Any:
    """Return the original output structure with `values` in their places."""
    if isinstance(template, _Slot):
        return values[template.index]
    if isinstance(template, (list, tuple)):
        return tuple(fill_template(item, values) for item in template)  # pyright: ignore[reportUnknownVariableType]
    return template


def _statistics(call: fx.Node) -> list[Any]:
    """Return the running statistics among the arguments of a batch norm, if it is in training."""
    given = {**dict(zip(_BATCH_NORM, call.args, strict=False)), **call.kwargs}
    if given.get("training") is not True:
        return []
    # The batch norm uses a statistic that it also takes as another argument.
    return [s for s in (given.get(name) for name in _STATISTICS) if [*given.values()].count(s) == 1]


class _Traced:
    """A traced forward and its record, side by side. `node_of`: the FX node of each value."""

    def __init__(self, module: fx.GraphModule, graph: Graph) -> None:
        self._module, self._graph = module, graph
        self._input_at = {value: index for index, value in enumerate(graph.inputs)}
        calls, inputs = iter(graph.nodes), iter(graph.inputs)
        fx_nodes = [n for n in module.graph.nodes if n.op != "output"]
        self.node_of: dict[ValueId, fx.Node] = {next(calls).makes[0] if is_op(n) else next(inputs): n for n in fx_nodes}
        self._volatile = self._written_inputs(graph.nodes)

    def source(self, value: ValueId, state: Sequence[ValueId]) -> Source:
        """Return where a value that is not made here comes from."""
        at = self._input_at.get(value)
        return Source(STATE, state.index(value)) if at is None else Source(EXTERNAL, at)

    def piece(self, span: BlockSpan) -> Piece:
        graph, node_of = self._graph, self.node_of
        nodes = graph.nodes[span.start : span.stop]
        calls = [node_of[node.makes[0]] for node in nodes]
        made_here = {v for node in nodes for v in node.makes}
        # The end of a `no_grad` region reads the value of its beginning, which FX does not pass as an argument.
        used = {i for n in calls for i in n.all_input_nodes}
        read = dict.fromkeys(v for node in nodes for v in node.reads if v not in made_here)
        reads = [v for v in read if node_of[v] in used]
        made = [v for v in span.outputs if v in made_here]
        arguments, results = [node_of[v] for v in reads], [node_of[v] for v in made]
        body, _ = _code(self._module, arguments, calls, results)
        run = body
        skippable = worthwhile_skippable_ops(graph, span.start, span.stop)
        if skippable:
            run, copied = _code(self._module, arguments, calls, results)
            silent = {copied[node_of[graph.nodes[n].makes[0]]]: is_silent for n, is_silent in skippable.items()}
            call_through_filter(run, silent)
        inputs = {self._input_at[v] for v in reads if v in self._input_at}
        volatile = inputs & self._volatile
        return Piece(
            calls=(leaving_transforms(run.forward) if any(enters_transform(n.op) for n in nodes) else run.forward,),
            module=body,
            reads=tuple(self.source(v, span.inputs) for v in reads),
            state=tuple(
                Source(MADE, made.index(v)) if v in made_here else self.source(v, span.inputs) for v in span.outputs
            ),
            volatile=tuple(sorted(volatile)),
            written=tuple(sorted(inputs & self._written_inputs(nodes))),
            write_only=tuple(sorted(self._write_only(nodes, volatile))),
            is_random=any(node.is_random for node in nodes),
            is_out_of_place=not any(is_activation(graph, s) for node in nodes for s in node.writes),
            span=span,
            has_regions=has_regions(calls),
        )

    def _written_inputs(self, nodes: Sequence[Node]) -> set[int]:
        written = {s for node in nodes for s in node.writes}
        return {i for v, i in self._input_at.items() if self._graph.values[v].storage in written}

    def _write_only(self, nodes: Sequence[Node], candidates: set[int]) -> set[int]:
        """Return those of `candidates`, inputs of the graph, that `nodes` change but whose values no result depends on.

        In training a batch norm updates its running statistics and the count of batches, but does not use them.
        """
        if not candidates:
            return set()
        graph, node_of = self._graph, self.node_of
        used: set[StorageId | None] = set()
        read_ever = {v for node in graph.nodes for v in node.reads} | {*graph.outputs}
        for node in nodes:
            call = node_of[node.makes[0]]
            unused = _statistics(call) if call.target is functional.batch_norm else []
            if node.op == "add_" and read_ever.isdisjoint(node.makes) and len(node.reads) == 1:
                unused = list(call.all_input_nodes)
            used |= {graph.values[v].storage for v in node.reads if node_of[v] not in unused}
        return {i for i in candidates if graph.values[graph.inputs[i]].storage not in used}


def _code(
    module: fx.GraphModule, arguments: Sequence[fx.Node], calls: Sequence[fx.Node], results: Sequence[fx.Node]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Return boxed code for some nodes of `module`, and the copy of each of them."""
    graph = fx.Graph()
    graph.set_codegen(_BoxedCodeGen())
    copies = {n: graph.placeholder(f"x{k}") for k, n in enumerate(arguments)}
    for n in calls:
        copies[n] = graph.node_copy(n, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in results))
    insert_switches(graph)
    return fx.GraphModule(module, graph), copies
