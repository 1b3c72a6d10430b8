"""Report on a graph: one frozen record, as aligned text, Markdown or JSON.

Text and Markdown show at most `MAX_ROWS` rows of a list and say how many there are; JSON holds everything, with sorted
keys, so that two reports can be compared line by line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from tinybp_lightning.analysis.diagnosis import SKINNY_RATIO, Diagnosis, WidestOp, WidestPoint, diagnose
from tinybp_lightning.graph.cuts.narrow import BlockSpan, Granularity, choose_cuts, cut_blocks
from tinybp_lightning.graph.ir import Graph, StorageKind
from tinybp_lightning.graph.signature import graph_signature

__all__ = ["MAX_ROWS", "BlockGroup", "GraphReport", "format_bytes", "report_graph"]

MAX_ROWS = 12
_Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks of equal structure: how many, the first one's name, and the sizes they share.

    `input_bytes`: the frontier before the first of them; `made_bytes`: activation storages that each makes;
    `saved_bytes`: those of them that plain training keeps for its backward.
    """

    signature: str
    num_blocks: int
    first: str
    num_ops: int
    input_bytes: int
    made_bytes: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What a graph computes, what it keeps, and how well it can be height-compressed.

    `parameter_bytes`, `buffer_bytes`, `input_bytes`: bytes by owner; activations are in `diagnosis`. `groups`: the
    blocks of the fine granularity by structure, those with the most saved bytes first.
    """

    name: str
    signature: str
    num_ops: int
    num_random_ops: int
    num_collective_ops: int
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    diagnosis: Diagnosis
    num_blocks: int
    groups: tuple[BlockGroup, ...]

    def to_text(self) -> str:
        """Return the report as aligned plain text that ends in a newline."""
        tables = (f"{title}\n{_aligned(table)}" for title, table in _tables(self))
        return "\n\n".join([f"{self.name}: {_verdict(self.diagnosis)}", _aligned(_facts(self)), *tables]) + "\n"

    def to_markdown(self) -> str:
        """Return the report as Markdown that ends in a newline."""
        head = (f"## {_escape(self.name)}", _verdict(self.diagnosis), _piped([("", ""), *_facts(self)]))
        tables = (f"### {title}\n\n{_piped(table)}" for title, table in _tables(self))
        return "\n\n".join([*head, *tables]) + "\n"

    def to_json(self) -> str:
        """Return everything in the report as JSON with sorted keys that ends in a newline."""
        record = asdict(self)
        record["diagnosis"]["is_skinny"] = self.diagnosis.is_skinny
        return json.dumps(record, indent=2, sort_keys=True) + "\n"


def report_graph(graph: Graph) -> GraphReport:
    """Return the report on `graph`, or raise `GraphError` if it has no nodes."""
    blocks = cut_blocks(graph, choose_cuts(graph, granularity=Granularity.FINE))
    owned_bytes = dict.fromkeys(StorageKind, 0)
    for storage in graph.storages:
        owned_bytes[storage.kind] += storage.size_bytes
    return GraphReport(
        name=graph.name,
        signature=graph_signature(graph),
        num_ops=len(graph.nodes),
        num_random_ops=sum(node.is_random for node in graph.nodes),
        num_collective_ops=sum(node.is_collective for node in graph.nodes),
        parameter_bytes=owned_bytes[StorageKind.PARAMETER],
        buffer_bytes=owned_bytes[StorageKind.BUFFER],
        input_bytes=owned_bytes[StorageKind.INPUT],
        diagnosis=diagnose(graph),
        num_blocks=len(blocks),
        groups=_groups(graph, blocks),
    )


def format_bytes(size_bytes: float) -> str:
    """Return a readable size: `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} TiB"


def _groups(graph: Graph, blocks: Sequence[BlockSpan]) -> tuple[BlockGroup, ...]:
    alike: dict[str, list[BlockSpan]] = {}
    for block in blocks:
        alike.setdefault(block.signature, []).append(block)
    groups: list[BlockGroup] = []
    for signature, same in alike.items():
        nodes = graph.nodes[same[0].start : same[0].stop]
        before = graph.storages_of(same[0].inputs)
        made = graph.storages_of(v for node in nodes for v in node.makes)
        saved = {storage for node in nodes for storage in node.saved}
        group = BlockGroup(
            signature=signature,
            num_blocks=len(same),
            first=same[0].name,
            num_ops=len(nodes),
            input_bytes=graph.activation_bytes(before),
            made_bytes=graph.activation_bytes(made - before),
            saved_bytes=graph.activation_bytes(saved - before),
        )
        groups.append(group)
    return tuple(sorted(groups, key=lambda group: -group.num_blocks * group.saved_bytes))


def _verdict(diagnosis: Diagnosis) -> str:
    shape = "skinny" if diagnosis.is_skinny else "not skinny"
    return (
        f"{shape}, the widest frontier is {diagnosis.frontier_ratio:.1%} of all activation bytes "
        f"(skinny: at most {SKINNY_RATIO:.0%}, with a place to cut)"
    )


def _facts(report: GraphReport) -> list[_Row]:
    diagnosis = report.diagnosis
    facts = [
        ("ops", f"{report.num_ops} ({report.num_random_ops} random, {report.num_collective_ops} collective)"),
        ("parameters", format_bytes(report.parameter_bytes)),
        ("buffers", format_bytes(report.buffer_bytes)),
        ("inputs", format_bytes(report.input_bytes)),
        ("activations made", format_bytes(diagnosis.total_bytes)),
        ("kept by plain training", format_bytes(diagnosis.saved_bytes)),
        ("narrow cuts", f"{diagnosis.num_narrow_cuts}, the widest {format_bytes(diagnosis.widest_cut_bytes)}"),
        ("layer cuts", f"{diagnosis.num_layer_cuts}"),
        ("blocks", f"{report.num_blocks}, {len(report.groups)} of them unlike"),
    ]
    widest, op = diagnosis.widest, diagnosis.widest_op
    if widest is not None:
        facts.append(("widest frontier", f"{format_bytes(widest.width_bytes)} after {_place(widest)}"))
    if op is not None:
        facts.append(("widest op", f"{format_bytes(op.working_set_bytes)} in {_place(op)}"))
    return facts


def _place(where: WidestPoint | WidestOp) -> str:
    return f"{where.name} ({where.op} in {where.module or 'the top module'})"


def _tables(report: GraphReport) -> Iterator[tuple[str, list[_Row]]]:
    """Yield a title and a table, with the header as its first row, for every list that is not empty."""
    groups: list[_Row] = []
    for g in report.groups:
        sizes = map(format_bytes, (g.input_bytes, g.made_bytes, g.saved_bytes))
        groups.append((f"{g.num_blocks}", g.first, f"{g.num_ops}", *sizes))
    skips: list[_Row] = [
        (format_bytes(s.size_bytes), f"{s.num_cuts}", f"{s.op} ({s.made_by})", s.module)
        for s in report.diagnosis.long_skips
    ]
    for title, header, rows in (
        ("Blocks by structure", ("blocks", "first", "ops", "before", "made", "saved"), groups),
        ("Storages that cross several layer cuts", ("bytes", "layer cuts crossed", "made by", "module"), skips),
    ):
        if rows:
            shown = title if len(rows) <= MAX_ROWS else f"{title} ({MAX_ROWS} of {len(rows)})"
            yield shown, [header, *rows[:MAX_ROWS]]


def _aligned(rows: Sequence[_Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _piped(rows: Sequence[_Row]) -> str:
    header, *body = (f"| {' | '.join(map(_escape, row))} |" for row in rows)
    return "\n".join([header, f"|{'---|' * len(rows[0])}", *body])


def _escape(text: str) -> str:
    """Return `text` escaped for Markdown, also for a table cell."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
