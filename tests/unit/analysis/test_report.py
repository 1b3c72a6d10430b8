"""The report says the same in text, Markdown and JSON, and says it the same way every time."""

import json
import re

import pytest

from tests.unit.graph.graphs_by_hand import GraphBuilder, chain_graph, transformer_graph
from tinybp_lightning.analysis import format_bytes, report_graph
from tinybp_lightning.analysis.report import MAX_ROWS
from tinybp_lightning.errors import GraphError
from tinybp_lightning.graph import Graph


def test_text_of_a_transformer_literally() -> None:
    assert report_graph(transformer_graph(8)).to_text() == (
        """\
transformer: skinny, the widest frontier is 3.6% of all activation bytes (skinny: at most 25%, with a place to cut)

  ops                     93 (0 random, 0 collective)
  parameters              11.8 KiB
  buffers                 0 B
  inputs                  10 B
  activations made        136.7 KiB
  kept by plain training  81.1 KiB
  narrow cuts             17, the widest 1008 B
  layer cuts              9
  blocks                  18, 4 of them unlike
  widest frontier         4.9 KiB after linear_silu_10 (linear_silu in model.layers.0.mlp)
  widest op               5.9 KiB in rotate_5 (rotate in model.layers.0.self_attn)

Blocks by structure
  blocks  first                 ops  before  made     saved
  8       model.layers.0[2:9]   7    1008 B  9.8 KiB  3.9 KiB
  8       model.layers.0[9:13]  4    1008 B  6.8 KiB  3.9 KiB
  1       transformer[90:93]    3    1000 B  2.9 KiB  2.0 KiB
  1       model[0:2]            2    0 B     1008 B   0 B

Storages that cross several layer cuts
  bytes  layer cuts crossed  made by     module
  8 B    8                   rotary (0)  model.rotary_emb
"""
    )


def unlike_blocks(num_blocks: int) -> Graph:
    build = GraphBuilder("model_a|b")
    x = build.input(4)
    for index in range(num_blocks):
        x = build.op("down", [build.op(f"op{index}", [x], 30, save_output=True)], 10, save_output=True)
    return build.build(build.op("head", [build.op("pool", [x], 10)], 10))


def test_long_lists_say_what_they_leave_out() -> None:
    report = report_graph(unlike_blocks(20))
    assert len(report.groups) == 21
    text = report.to_text()
    assert f"Blocks by structure ({MAX_ROWS} of 21)" in text
    assert len(re.findall(r"^  1 ", text, re.MULTILINE)) == MAX_ROWS
    assert len(json.loads(report.to_json())["groups"]) == 21


def test_columns_are_aligned() -> None:
    lines = report_graph(transformer_graph(8)).to_text().splitlines()
    header = next(line for line in lines if line.startswith("  blocks  first"))
    rows = lines[lines.index(header) + 1 : lines.index("", lines.index(header))]
    starts = [match.start() for match in re.finditer(r"\S+", header)]
    assert rows
    assert all(row[start - 1] == " " and row[start] != " " for row in rows for start in starts)


def test_groups_share_out_all_blocks() -> None:
    report = report_graph(transformer_graph(8))
    assert sum(group.num_blocks for group in report.groups) == report.num_blocks == 18
    assert [group.num_blocks for group in report.groups] == [8, 8, 1, 1]
    assert sum(group.num_blocks * group.saved_bytes for group in report.groups) <= report.diagnosis.saved_bytes
    first = report.groups[0]
    assert (first.first, first.num_ops, first.input_bytes) == ("model.layers.0[2:9]", 7, 1008)
    # rms_norm, qkv, rotate, sdpa, out and the sum; of these `rotate` and `sdpa` save their results, the norm after the
    # sum belongs to the next block.
    assert (first.made_bytes, first.saved_bytes) == (10_000, 4000)


def test_private_masks_are_saved_bytes_of_their_block() -> None:
    build = GraphBuilder()
    x = build.op("op", [build.input(4)], 10)
    mask = build.storage(5)
    (group,) = report_graph(build.build(build.op("dropout", [x], 10, saved=[mask]))).groups
    assert (group.made_bytes, group.saved_bytes) == (20, 5)


def test_owners_of_bytes() -> None:
    report = report_graph(transformer_graph(1))
    assert report.parameter_bytes == 5000 + 7000 + 7
    assert (report.buffer_bytes, report.input_bytes) == (0, 10)


def test_markdown_tables_have_as_many_cells_as_headers() -> None:
    markdown = report_graph(unlike_blocks(3)).to_markdown()
    assert markdown.startswith("## model\\_a\\|b\n")
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    assert all(len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 for table in tables)


def test_json_is_stable_and_complete() -> None:
    report = report_graph(transformer_graph(3))
    text = report.to_json()
    assert text == report_graph(transformer_graph(3)).to_json()
    record = json.loads(text)
    assert text == json.dumps(record, indent=2, sort_keys=True) + "\n"
    assert record["diagnosis"]["is_skinny"] is True
    assert record["diagnosis"]["widest"]["op"] == "linear_silu"
    assert record["diagnosis"]["long_skips"][0]["module"] == "model.rotary_emb"
    assert record["signature"] == report.signature


def test_a_graph_without_ops_has_no_report() -> None:
    with pytest.raises(GraphError, match=r"`nodes=\(\)`"):
        report_graph(chain_graph(0))


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (2 << 40, "2.00 TiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
