"""Small graphs written op by op, in the shapes that models have: a builder, a transformer, a U-Net, a uniform chain."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tinybp_lightning.graph import Graph, Node, NodeId, Storage, StorageId, StorageKind, Value, ValueId


@dataclass(slots=True)
class GraphBuilder:
    """Records ops one after the other. `size` is a tensor's number of elements and, at one byte each, of bytes."""

    name: str = "graph"
    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    inputs: list[ValueId] = field(default_factory=list)

    def input(self, size: int, kind: StorageKind = StorageKind.INPUT, name: str = "x") -> ValueId:
        value = self.value(size, self.storage(size, kind), name)
        self.inputs.append(value)
        return value

    def parameter(self, size: int = 1) -> ValueId:
        return self.input(size, StorageKind.PARAMETER, "w")

    def flag_input(self) -> ValueId:
        """Add a graph input that is not a tensor."""
        self.inputs.append(self.value(1, None, "n"))
        return self.inputs[-1]

    def op(
        self,
        op: str,
        reads: Sequence[ValueId],
        size: int,
        *,
        module: str = "",
        saved: Sequence[StorageId] = (),
        save_output: bool = False,
        flops: int = 0,
    ) -> ValueId:
        """Make one new storage."""
        made = self.value(size, self.storage(size))
        kept = (*saved, self.storage_of(made)) if save_output else tuple(saved)
        self.node(op, reads, [made], module=module, saved=kept, flops=flops)
        return made

    def reading(self, op: str, *reads: ValueId, size: int = 10, flops: int = 0) -> ValueId:
        """Make one new storage by an op that saves what it reads."""
        return self.op(op, reads, size, saved=[self.storage_of(v) for v in reads], flops=flops)

    def copying(self, op: str, x: ValueId, *, size: int = 10, flops: int = 0) -> ValueId:
        """Make one new storage by an op that saves a copy of what it reads, as under autocast."""
        copy = self.storage(size)
        made = self.op(op, [x], size, saved=[copy], flops=flops)
        self.nodes[-1] = replace(self.nodes[-1], copies=((copy, self.storage_of(x)),))
        return made

    def view(self, op: str, of: ValueId, size: int, *, module: str = "") -> ValueId:
        """Make one more value on the storage of `of`."""
        made = self.value(size, self.values[of].storage)
        self.node(op, [of], [made], module=module)
        return made

    def write(self, op: str, target: ValueId, reads: Sequence[ValueId] = (), *, module: str = "") -> ValueId:
        """Change the storage of `target` in place; the result is a new value on it."""
        made = self.value(self.values[target].shape[0], self.values[target].storage)
        self.node(op, [target, *reads], [made], module=module, writes=[self.storage_of(target)])
        return made

    def flag(self, op: str, reads: Sequence[ValueId] = ()) -> ValueId:
        """Make a value that is not a tensor."""
        made = self.value(1, None)
        self.node(op, reads, [made])
        return made

    def build(self, *outputs: ValueId) -> Graph:
        return Graph(
            self.name, tuple(self.nodes), tuple(self.values), tuple(self.storages), tuple(self.inputs), outputs
        )

    def storage(self, size: int, kind: StorageKind = StorageKind.ACTIVATION) -> StorageId:
        self.storages.append(Storage(StorageId(len(self.storages)), size, kind))
        return self.storages[-1].id

    def value(self, size: int, storage: StorageId | None, name: str = "v") -> ValueId:
        index = len(self.values)
        self.values.append(Value(ValueId(index), f"{name}{index}", storage, (size,), "uint8", requires_grad=True))
        return self.values[-1].id

    def node(
        self,
        op: str,
        reads: Sequence[ValueId],
        makes: Sequence[ValueId],
        *,
        module: str = "",
        writes: Sequence[StorageId] = (),
        saved: Sequence[StorageId] = (),
        flops: int = 0,
    ) -> None:
        index = NodeId(len(self.nodes))
        self.nodes.append(
            Node(
                index,
                f"{op}_{index}",
                op,
                module,
                tuple(reads),
                tuple(makes),
                tuple(writes),
                tuple(saved),
                flops=flops,
                is_random=False,
                is_collective=False,
            )
        )

    def storage_of(self, value: ValueId) -> StorageId:
        storage = self.values[value].storage
        assert storage is not None
        return storage


def chain_graph(num_ops: int, *, size: int = 100) -> Graph:
    """Return `x -> op -> op -> ...`, every tensor of one size."""
    build = GraphBuilder("chain")
    x = build.input(size)
    for _ in range(num_ops):
        x = build.op("relu", [x], size, save_output=True)
    return build.build(x)


# Ops of one layer of `transformer_graph`.
LAYER_OPS = 11


def transformer_graph(num_layers: int, *, hidden: int = 1000, logits: int = 2000) -> Graph:
    """Return a decoder-only transformer: `2` ops of stem, `LAYER_OPS` a layer, then a norm, a head and a loss.

    A rotary table of 8 bytes crosses every layer; each attention reads it.
    """
    build = GraphBuilder("transformer")
    tokens = build.input(10, name="tokens")
    table = build.op("rotary", [], 8, module="model.rotary_emb")
    x = build.op("embedding", [tokens, build.parameter(5000)], hidden, module="model.embed_tokens")
    for layer in range(num_layers):
        x = _transformer_layer(build, x, table, f"model.layers.{layer}", hidden)
    normed = build.op("rms_norm", [x, build.parameter()], hidden, module="model.norm", saved=[build.storage_of(x)])
    scores = build.op("linear", [normed, build.parameter(7000)], logits, module="lm_head", save_output=True)
    return build.build(build.op("cross_entropy", [scores, tokens], 4))


def _transformer_layer(build: GraphBuilder, x: ValueId, table: ValueId, path: str, hidden: int) -> ValueId:
    attention, mlp = f"{path}.self_attn", f"{path}.mlp"
    normed = build.op("rms_norm", [x, build.parameter()], hidden, module=f"{path}.norm1", saved=[build.storage_of(x)])
    qkv = build.op("linear", [normed, build.parameter()], 3 * hidden, module=attention)
    heads = build.view("view", qkv, 3 * hidden, module=attention)
    rotated = build.op("rotate", [heads, table], 3 * hidden, module=attention, save_output=True)
    mixed = build.op("sdpa", [rotated], hidden, module=attention, save_output=True)
    out = build.op("linear", [mixed, build.parameter()], hidden, module=attention)
    x = build.op("add", [x, out], hidden, module=path)
    normed = build.op("rms_norm", [x, build.parameter()], hidden, module=f"{path}.norm2", saved=[build.storage_of(x)])
    wide = build.op("linear_silu", [normed, build.parameter()], 4 * hidden, module=mlp, save_output=True)
    out = build.op("linear", [wide, build.parameter()], hidden, module=mlp)
    return build.op("add", [x, out], hidden, module=path)


def unet_graph(depth: int, *, size: int = 4096) -> Graph:
    """Return a U-Net: `depth` halvings of two ops each, as many doublings that read the skip of their level.

    All skips cross the middle, whose own tensor is small.
    """
    build = GraphBuilder("unet")
    x = build.input(size)
    skips: list[ValueId] = []
    for level in range(depth):
        module = f"down.{level}"
        x = build.op("conv", [x, build.parameter()], size >> level, module=module, save_output=True)
        skips.append(x)
        x = build.op("pool", [x], size >> (level + 1), module=module)
    x = build.op("conv", [x, build.parameter()], size >> depth, module="mid", save_output=True)
    for level in reversed(range(depth)):
        module = f"up.{level}"
        x = build.op("upsample", [x], size >> level, module=module)
        x = build.op("cat_conv", [x, skips[level], build.parameter()], size >> level, module=module, save_output=True)
    return build.build(x)


def resnet_graph(*, blocks_per_stage: int = 3, num_stages: int = 4, size: int = 8000) -> Graph:
    """Return stages of in-place residual blocks, each stage with tensors half the size of the one before."""
    build = GraphBuilder("resnet")
    x = build.op("conv", [build.input(size), build.parameter()], size, module="stem")
    for stage in range(num_stages):
        width = size >> stage
        for index in range(blocks_per_stage):
            module = f"layer{stage + 1}.{index}"
            y = build.op("conv", [x, build.parameter()], width // 4, module=module, saved=[build.storage_of(x)])
            y = build.write("relu_", y, module=module)
            y = build.op("conv", [y, build.parameter()], width, module=module, saved=[build.storage_of(y)])
            if index == 0 and stage > 0:
                x = build.op("conv", [x, build.parameter()], width, module=module)
            y = build.write("add_", y, [x], module=module)
            x = build.write("relu_", y, module=module)
    return build.build(build.op("linear", [x, build.parameter()], 10, module="fc"))
