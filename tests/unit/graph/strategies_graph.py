"""Random graphs that `verify_graph` accepts: views, in-place writes, values that are no tensors, several outputs."""

from hypothesis import strategies as st

from tests.unit.graph.graphs_by_hand import GraphBuilder
from tinybp_lightning.graph import Graph, StorageKind, ValueId


@st.composite
def graphs(draw: st.DrawFn, *, max_nodes: int = 14) -> Graph:
    """Draw a graph of 1 to `max_nodes` nodes over every kind of storage."""
    build = GraphBuilder("random")
    tensors: list[ValueId] = [
        build.input(draw(st.integers(0, 9)), kind)
        for kind in (StorageKind.INPUT, StorageKind.PARAMETER, StorageKind.BUFFER)
    ]
    flags = [build.flag_input()]
    for _ in range(draw(st.integers(1, max_nodes))):
        readable = draw(st.lists(st.sampled_from([*tensors, *flags]), max_size=3))
        match draw(st.sampled_from(["op", "op", "op", "op", "split", "view", "write", "flag"])):
            case "op":
                save_output = draw(st.booleans())
                module = draw(st.sampled_from(["", "stack.0", "stack.1.part", "head"]))
                tensors.append(
                    build.op("op", readable, draw(st.integers(0, 9)), module=module, save_output=save_output)
                )
            case "split":
                made = [
                    build.value(size, build.storage(size)) for size in draw(st.lists(st.integers(0, 9), max_size=3))
                ]
                build.node("split", readable, made)
                tensors.extend(made)
            case "view":
                tensors.append(build.view("view", draw(st.sampled_from(tensors)), draw(st.integers(0, 9))))
            case "write":
                tensors.append(build.write("write", draw(st.sampled_from(tensors))))
            case _:
                flags.append(build.flag("flag", readable))
    outputs = draw(st.lists(st.sampled_from(tensors), max_size=3))
    return build.build(*outputs)
