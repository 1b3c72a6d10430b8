"""Choose what a compiled block saves: the ops that a closure selects, instead of torch's own partitioner.

AOTAutograd lets a partitioner divide the joint graph of forward and backward. Ours takes a corner of
`saved_ops_frontier` and tags every op that backward needs as saved or recomputed; torch's partitioner obeys the tags.
Random ops are never repeated: their results are saved.

Private API: `torch._functorch.partitioners`, `torch._inductor.custom_graph_pass` (torch 2.11 to 2.14).
"""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# AOTAutograd's partitioners are private and barely annotated; they are reached from here only.

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners as aot
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy

from tinybp_lightning.capture.torch.record import flops_of
from tinybp_lightning.schedule import saved_ops
from tinybp_lightning.schedule.saved_ops import BlockOps, saved_ops_frontier

__all__ = ["ClosurePartitioner", "repeated_share", "value_bytes"]

# Estimated seconds only rank ops against each other: a compiled option is measured. So only the ratio matters, of
# operations that a device does in the time in which it moves a byte.
_FLOPS_PER_BYTE = {"cuda": 200.0, "cpu": 10.0}
_BYTES_PER_S = 1e12


class ClosurePartitioner(CustomPartitionerFn):
    """Saves at most `share` of the bytes that a block saves if it repeats only views.

    **Arguments:** `parameters`: positions of inputs that are parameters: what depends on them alone is never saved.
    """

    def __init__(self, share: float, parameters: frozenset[int]) -> None:
        self._share = share
        self._parameters = parameters

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Tag the joint graph's ops and have torch divide it."""
        gm.graph.eliminate_dead_code()
        nodes, ops = _block_ops(gm, self._parameters, kwargs["num_fwd_outputs"])
        if any(ops.is_read):
            frontier = saved_ops_frontier(ops)
            limit_bytes = self._share * frontier[0].saved_bytes
            chosen = next((corner for corner in frontier if corner.saved_bytes <= limit_bytes), frontier[-1])
            for v, node in enumerate(nodes):
                if v in chosen.saved:
                    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
                elif v in chosen.repeated:
                    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return aot.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """Return everything that the partition depends on: torch caches compiled code under it."""
        assert saved_ops.__file__ is not None
        source = get_hash_for_files((__file__, saved_ops.__file__))
        return source, self._share, tuple(sorted(self._parameters))


def _block_ops(gm: fx.GraphModule, parameters: frozenset[int], num_outputs: int) -> tuple[list[fx.Node], BlockOps]:
    """Return the ops of a joint graph that do not depend on gradients, and their description."""
    info: Any = aot.classify_nodes(gm, [], num_outputs)
    views = aot.get_default_op_list()
    returned: Any = gm.graph.output_node().args[0]
    results = set(returned[:num_outputs])
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n not in info.required_bw_nodes]
    index = {n: v for v, n in enumerate(nodes)}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fixed: set[fx.Node] = {placeholders[i] for i in parameters}
    random: set[fx.Node] = set()
    sizes: list[int] = []
    can_save: list[bool] = []
    seconds: list[float] = []
    for n in nodes:
        value = n.meta.get("val")
        if n.all_input_nodes and all(i in fixed for i in n.all_input_nodes):
            fixed.add(n)
        is_random = torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        if is_random or (_is_item(n) and n.args[0] in random):
            random.add(n)
        is_view = views.is_view(n)
        in_forward = info.is_required_fw(n)
        is_tensor = isinstance(value, torch.Tensor)
        # A random op's results must be saved, even if only backward reads them (the normalisers of attention).
        can_save.append(is_tensor and not is_view and n not in fixed and (in_forward or n in random))
        # The block's results are alive anyway, and what only backward computes costs it nothing more.
        sizes.append(value_bytes(value) if can_save[-1] and n not in results else 0)
        seconds.append(0.0 if is_view or _is_item(n) or not in_forward else _seconds(n))
    ops = BlockOps(
        inputs=tuple(tuple(index[i] for i in n.all_input_nodes if i in index) for n in nodes),
        seconds=tuple(seconds),
        size_bytes=tuple(sizes),
        is_read=tuple(any(u in info.required_bw_nodes for u in n.users) for n in nodes),
        can_save=tuple(can_save),
        can_repeat=tuple(n not in random for n in nodes),
    )
    return nodes, ops


def _is_item(n: fx.Node) -> bool:
    return getattr(n.target, "__name__", "") == "getitem"


def repeated_share(forward: fx.GraphModule, backward: fx.GraphModule) -> float:
    """Return the share of a divided block's forward that its backward repeats, in estimated seconds."""
    views = aot.get_default_op_list()
    ops = (n for n in forward.graph.nodes if n.op == "call_function" and not views.is_view(n) and not _is_item(n))
    seconds = {n.name: _seconds(n) for n in ops}
    repeated_s = sum(seconds.get(n.name, 0.0) for n in backward.graph.nodes)
    return repeated_s / max(sum(seconds.values()), 1e-30)


def value_bytes(value: Any) -> int:
    """Return the bytes of the tensors in `value`."""
    return sum(int(t.numel()) * t.element_size() for t in tree_leaves(value) if isinstance(t, torch.Tensor))


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _seconds(n: fx.Node) -> float:
    """Estimate an op's time by a roofline: its operations, or the bytes it reads and writes."""
    args, kwargs = tree_map(_value, (n.args, dict(n.kwargs)))
    value = n.meta.get("val")
    tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    device_type = tensors[0].device.type if tensors else "cpu"
    flops = flops_of(getattr(n.target, "overloadpacket", n.target), args, kwargs, value)
    moved_bytes = value_bytes(value) + value_bytes(args)
    return max(flops / _FLOPS_PER_BYTE.get(device_type, 100.0), moved_bytes) / _BYTES_PER_S
