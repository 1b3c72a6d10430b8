"""What does a forward compute, alias, change and save? Its FX graph, run once on fake tensors (shapes without memory).

For each call autograd shows the storages that it saves (`saved_tensors_hooks`) and those that it changes in place
(version counters, and a short list of ops that change buffers without raising the counter); the kernels show whether
it draws random numbers (`Tag.nondeterministic_seeded`), and its floating-point operations.
"""

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tinybp_lightning.capture.torch.dynamo import CannotTraceError, Tracer
from tinybp_lightning.capture.torch.private import set_grad_enabled_op, storage_key, untransformed
from tinybp_lightning.capture.torch.regions import RegionInterpreter, region_of
from tinybp_lightning.errors import CaptureError, UnsupportedModuleError
from tinybp_lightning.graph.ids import NodeId, StorageId, ValueId
from tinybp_lightning.graph.ir import Graph, Node, Storage, StorageKind, Value
from tinybp_lightning.graph.verify import verify_graph

__all__ = ["capture_graph", "enters_transform", "flops_of", "is_op", "module_path", "record_graph"]

_COLLECTIVE_NAMESPACES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
# Dynamo spells a module's place as `L['self']._modules['layers'][0]` or `L['fn'].__self__.layers.0`, by version.
_NOISE = frozenset({"", "L", "__dict__", "_modules", "__self__"})
# Norms change these without raising the version counter (seen on torch 2.13, CPU and fake).
_SILENT_WRITES = ("running_mean", "running_var")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


class _CapturedError(Exception):
    """Ends the traced call once its graph is recorded, before any op of it runs."""


def capture_graph(module: nn.Module, *inputs: Any, **named_inputs: Any) -> Graph:
    """Return the graph of `module(*inputs, **named_inputs)` as it would be trained.

    Only shapes are computed: no kernel runs and the module, which may be on the `meta` device, does not change.

    **Arguments:** `module`: in the intended mode (training or not), and not under `tbp.hcb`.

    **Raises:** `UnsupportedModuleError` for anything but a module; `CaptureError` if the forward cannot be traced as
    one graph.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModuleError(f"`{type(module).__name__}` is not a torch.nn.Module: pass the model itself.")
    found: list[Graph] = []

    def on_graph(traced: fx.GraphModule) -> Any:
        def record(*values: Any) -> Any:
            found.append(record_graph(traced, values, name=type(module).__name__))
            raise _CapturedError

        return record

    with torch.enable_grad(), contextlib.suppress(_CapturedError):
        try:
            Tracer(module.forward, on_graph)(*inputs, **named_inputs)
        except CannotTraceError as error:
            raise CaptureError(
                f"`{type(module).__name__}` cannot be captured as one graph ({error}). If it is under "
                "`tbp.hcb`, call `tbp.restore` first; else train it for a step and ask `tbp.explain(module)`."
            ) from error
    return found[0]


def record_graph(module: fx.GraphModule, inputs: Sequence[Any], *, name: str) -> Graph:
    """Return the `Graph`, checked, of a Dynamo graph module called with `inputs`; `nodes[i]` is its i-th call.

    **Arguments:** `inputs`: one value for each placeholder (parameters and buffers included); only metadata is used.

    **Raises:** `CaptureError` if a call cannot be interpreted on fake tensors.
    """
    graph = _Recorder(module, name).record(inputs)
    verify_graph(graph)
    return graph


def is_op(node: fx.Node) -> bool:
    """Return whether an FX node is a call, as opposed to an input, a constant or the output."""
    return node.op in ("call_function", "call_method", "call_module")


def enters_transform(op: str) -> bool:
    """Return whether the op of this name enters a `torch.func` transform, which a `*_decrement_nesting` op leaves."""
    return op.endswith("_increment_nesting")


def module_path(n: fx.Node) -> str:
    """Return the dotted path of a node's innermost module, from Dynamo's `nn_module_stack` (`L['self'].layers.0`)."""
    stack = n.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    parts = [part for part in re.split(r"[\.\[\]'\"]+", path) if part not in _NOISE]
    return ".".join(parts[1:])  # the first part names the traced callable itself


def flops_of(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the floating-point operations of a call as torch counts them, 0 where it has no formula.

    Attention is counted here. The formula of torch 2.11 raises where keys and values have fewer heads than queries
    (grouped-query attention), which CUDA's kernels for half precision accept; the formula of 2.13 does not.
    """
    if packet in _ATTENTION:
        query, key, value = args[:3]  # (batch, heads, length, width)
        batch, heads, length, width = query.shape
        return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class _OpFacts(TorchDispatchMode):
    """What the kernels under one call show: random draws, collectives, silent writes, copies, flops."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.is_random = False
        self.is_collective = False
        self.flops = 0
        self.written: list[torch.Tensor] = []
        self.copied: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        self.is_random |= torch.Tag.nondeterministic_seeded in func.tags
        self.is_collective |= func.namespace in _COLLECTIVE_NAMESPACES
        self.flops += flops_of(func._overloadpacket, args, kwargs, out)
        if func in _COPIES:
            self.copied.append((out, args[0]))
        self._note_silent_writes(func, args, kwargs)
        return out

    def _note_silent_writes(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        if _SILENT_WRITES[0] in names and bound.get("training", bound.get("use_input_stats", True)):
            self.written += [t for t in map(bound.get, _SILENT_WRITES) if isinstance(t, torch.Tensor)]


class _Recorder(RegionInterpreter):
    """Interprets the graph on fake tensors and collects the `Graph` on the way."""

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        super().__init__(module, garbage_collect_values=False)  # no storage may be freed: its address is its identity
        self._name = name
        self._graph_module = module
        self._facts = _OpFacts()
        self._storages: list[Storage] = []
        self._storage_of: dict[int, StorageId] = {}
        # What each copy is a copy of, by its storage. Kept over all calls: autocast reuses the copy of a weight.
        self._source_of: dict[int, torch.Tensor] = {}
        self._values: list[Value] = []
        self._value_of: dict[fx.Node, ValueId] = {}
        self._nodes: list[Node] = []
        self._inputs: list[ValueId] = []
        self._alive: list[torch.Tensor] = []
        self._grad_region: ValueId | None = None
        self._transforms: list[ValueId] = []
        self._input_of: dict[int, fx.Node] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def record(self, inputs: Sequence[Any]) -> Graph:
        fakes = [self._fake.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in inputs]
        grad_mode = torch.is_grad_enabled()
        try:
            with self._fake, self._facts, torch.enable_grad():
                self.run(*fakes)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            shown = f"`{self._name}` cannot be captured: a call failed on fake tensors ({error})"
            raise CaptureError(f"{shown}. Exclude that part, or use module steps.") from error
        finally:
            torch.set_grad_enabled(grad_mode)
        ends: list[fx.Node] = self._graph_module.graph.output_node().all_input_nodes
        return Graph(
            name=self._name,
            nodes=tuple(self._nodes),
            values=tuple(self._values),
            storages=tuple(self._storages),
            inputs=tuple(self._inputs),
            outputs=tuple(self._value_of[n] for n in ends),
        )

    def run_node(self, n: fx.Node) -> Any:
        if is_op(n):
            return self._run_call(n)
        result = super().run_node(n)
        if n.op != "output":
            self._alive += _tensors(result)
            self._inputs.append(self._value(n, result, _input_kind(n, result)))
            self._input_of.setdefault(id(result), n)
        return result

    def _run_call(self, n: fx.Node) -> Any:
        arguments = _tensors(self.fetch_args_kwargs_from_env(n))
        versions = [t._version for t in arguments]
        saved: list[torch.Tensor] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            saved.append(t.detach())
            return t.detach()

        facts = self._facts
        facts.reset()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = super().run_node(n)
        written = [t for t, v in zip(arguments, versions, strict=True) if t._version != v] + facts.written
        for copy, source in facts.copied:
            self._source_of[storage_key(copy)] = source
            self._alive.append(copy)
        self._alive += [*saved, *_tensors(result)]
        made = self._value(n, result, StorageKind.ACTIVATION)
        reads = [self._value_of[i] for i in n.all_input_nodes]
        reads += [*self._close_grad_region(n, made), *self._close_transform(n, made)]
        read = {self._values[v].storage for v in reads}
        self._nodes.append(
            Node(
                id=NodeId(len(self._nodes)),
                name=n.name,
                op=_op_name(n),
                module=module_path(n),
                reads=tuple(reads),
                makes=(made,),
                writes=self._activations(written),
                saved=self._activations(saved),
                flops=facts.flops,
                is_random=facts.is_random,
                is_collective=facts.is_collective,
                copies=self._copies(saved, read, self._values[made].storage),
                settings=repr(region) if (region := region_of(n)) else "",
            )
        )
        self._read_input_itself(n, result)
        return result

    def _copies(
        self, saved: Sequence[torch.Tensor], read: Collection[StorageId | None], made: StorageId | None
    ) -> tuple[tuple[StorageId, StorageId], ...]:
        """Return the saved storages that are copies of what the op reads, and what they are copies of."""
        copies: set[tuple[StorageId, StorageId]] = set()
        for t in saved:
            key, copy = storage_key(untransformed(t)), self._storage(t, StorageKind.ACTIVATION)
            while key in self._source_of and self._storage_of.get(key) not in read:
                key = storage_key(self._source_of[key])
            source = self._storage_of.get(key)
            if source is not None and source in read and copy not in {*read, made}:
                copies.add((copy, source))
        return tuple(sorted(copies))

    def _read_input_itself(self, n: fx.Node, result: Any) -> None:
        """Let the readers of an in-place op's result on an input (`out=buffer`) read the input: it is the same tensor.

        A result with a gradient of its own is a different tensor for a replay, and stays.
        """
        source = self._input_of.get(id(result))
        if source is not None and isinstance(result, torch.Tensor) and not result.requires_grad:
            n.replace_all_uses_with(source)

    def _close_grad_region(self, n: fx.Node, made: ValueId) -> list[ValueId]:
        """Tie the ends of a `no_grad` region together by a value that is not a tensor: no cut may fall between."""
        if n.target is not set_grad_enabled_op:
            return []
        opened = self._grad_region
        if opened is None or n.args[0]:
            self._grad_region = made if opened is None else None
        return [] if opened is None else [opened]

    def _close_transform(self, n: fx.Node, made: ValueId) -> list[ValueId]:
        """Tie the two ends of a `torch.func` transform together: its tensors exist only between them."""
        op = _op_name(n)
        if enters_transform(op):
            self._transforms.append(made)
        return [self._transforms.pop()] if op.endswith("_decrement_nesting") and self._transforms else []

    def _activations(self, tensors: Iterable[torch.Tensor]) -> tuple[StorageId, ...]:
        return tuple(sorted({self._storage(t, StorageKind.ACTIVATION) for t in tensors}))

    def _storage(self, tensor: torch.Tensor, kind: StorageKind) -> StorageId:
        t = untransformed(tensor)
        key = storage_key(t)
        if key not in self._storage_of:
            self._storage_of[key] = StorageId(len(self._storages))
            self._storages.append(Storage(self._storage_of[key], t.untyped_storage().nbytes(), kind))
        return self._storage_of[key]

    def _value(self, n: fx.Node, result: Any, kind: StorageKind) -> ValueId:
        tensor = result if isinstance(result, torch.Tensor) else None
        value = Value(
            id=ValueId(len(self._values)),
            name=n.name,
            storage=None if tensor is None else self._storage(tensor, kind),
            shape=() if tensor is None else tuple(tensor.shape),
            dtype=type(result).__name__ if tensor is None else str(tensor.dtype).removeprefix("torch."),
            requires_grad=tensor is not None and tensor.requires_grad,
        )
        self._values.append(value)
        self._value_of[n] = value.id
        return value.id


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _input_kind(n: fx.Node, result: Any) -> StorageKind:
    if isinstance(result, torch.Tensor) and (isinstance(result, torch.nn.Parameter) or "_parameters_" in n.name):
        return StorageKind.PARAMETER
    return StorageKind.BUFFER if n.op == "get_attr" or "_buffers_" in n.name else StorageKind.INPUT


def _op_name(n: fx.Node) -> str:
    return n.target if isinstance(n.target, str) else str(getattr(n.target, "__name__", n.target))
