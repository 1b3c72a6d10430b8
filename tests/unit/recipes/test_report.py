from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from recipes.config import compose_config
from recipes.modes import Mode
from recipes.outcome import Failed, Outcome
from recipes.picture import LABEL_SPACING, draw_comparison, spread
from recipes.table import HEADER, Row, comparison_rows, markdown_report
from tests.unit.recipes.outcomes import MIB, finished

NAIVE = finished(Mode.naive)
HALF = finished(Mode.hcb_eager, wall_s=0.125, peak_mib=50)
OTHER = finished(Mode.compile, wall_s=0.05, peak_mib=80, bits="other")
FAILED = Failed(Mode.selective, "ValueError: a | b", "selective.log")
OUTCOMES: list[Outcome] = [NAIVE, HALF, OTHER, FAILED]


def test_rows_compare_with_naive() -> None:
    naive, half, other, failed = comparison_rows(OUTCOMES)
    assert isinstance(naive, Row)
    assert isinstance(half, Row)
    assert isinstance(other, Row)
    assert naive.sameness is not None
    assert other.sameness is not None
    assert (naive.wall_ratio, naive.activation_ratio, naive.predicted_peak_bytes) == (1.0, 1.0, None)
    assert (half.wall_ratio, half.activation_ratio, half.predicted_peak_bytes) == (1.25, 0.5, 49 * MIB)
    assert naive.sameness.has_same_losses
    assert not other.sameness.has_same_losses
    assert not other.sameness.has_same_gradients
    assert other.sameness.has_same_buffers
    assert other.sameness.largest_loss_gap == 0.25
    assert failed is FAILED


def test_without_naive_nothing_is_compared() -> None:
    (half,) = comparison_rows([HALF])
    assert isinstance(half, Row)
    assert (half.wall_ratio, half.activation_ratio, half.sameness) == (None, None, None)


def test_markdown_has_a_line_for_every_mode() -> None:
    lines = markdown_report(compose_config(["size=tiny", "budget=30%"]), OUTCOMES).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(OUTCOMES)
    assert table[0] == f"| {' | '.join(HEADER)} |"
    assert table[3] == "| hcb_eager | 1.000000 | 125.0 | 1.25 | 50.00 | 0.50 | 49.00 | 51.00 | yes | yes | yes | yes |"
    assert table[4] == "| compile | 1.250000 | 50.0 | 0.50 | 80.00 | 0.80 |  | 81.00 | 2.5e-01 | no | no | yes |"
    assert table[5].startswith("| selective | failed: ValueError: a \\| b | ")
    assert "Budget: 30.0 MiB of activations. CPU (test); torch 2, Python 3." in lines


def test_picture_is_a_png_of_both_panels(tmp_path: Path) -> None:
    draw_comparison(compose_config(["size=tiny"]), OUTCOMES, tmp_path / "compare.png")
    pixels = matplotlib.image.imread(tmp_path / "compare.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000


def test_a_picture_of_failures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_comparison(compose_config(["size=tiny"]), [FAILED], tmp_path / "compare.png")


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Figure, list[Axes]]:
    """The picture of all modes at almost the same place, where labels would fall on one another."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path)))
    crowd = [finished(mode, wall_s=0.1 + 1e-4 * i, peak_mib=40 + 0.1 * i) for i, mode in enumerate(Mode)]
    draw_comparison(compose_config(["size=tiny"]), crowd, tmp_path / "compare.png")
    return drawn[0], drawn[0].axes


def test_every_mode_is_named_once_and_no_two_names_overlap(panels: tuple[Figure, list[Axes]]) -> None:
    figure, (left, right) = panels
    names = [text for text in left.texts if isinstance(text, Annotation)]
    assert sorted(name.get_text().split()[0] for name in names) == sorted([*(mode.value for mode in Mode), "budget"])
    # `Text`'s own extent: an annotation's would include its leader line.
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes: list[Bbox] = [Text.get_window_extent(name, renderer) for name in names]
    ordered = sorted(boxes, key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(ordered))
    assert max(box.x1 for box in boxes) <= right.get_tightbbox().x0


def test_axes_have_units(panels: tuple[Figure, list[Axes]]) -> None:
    _, axes = panels
    labels = [(each.get_xlabel(), each.get_ylabel()) for each in axes]
    assert labels == [
        ("time of a step (ms)", "activation peak (MiB)"),
        ("time in the step (ms)", "activations alive (MiB)"),
    ]


def test_predictions_are_drawn_over_ours_alone(panels: tuple[Figure, list[Axes]]) -> None:
    _, (_, right) = panels
    drawn = [line for line in right.lines if len(line.get_xdata()) > 0]
    assert len(drawn) == len(Mode) + 2
    assert "predicted by hcb" in [text.get_text() for text in right.get_legend().get_texts()]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_spread_keeps_distance_and_order(heights: list[float]) -> None:
    moved = spread(heights, spacing=LABEL_SPACING)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gaps = [moved[after] - moved[before] for before, after in pairwise(order)]
    assert all(gap >= LABEL_SPACING - 1e-9 for gap in gaps)
    assert max(moved) <= 1.0 + 1e-9
    assert min(moved) >= -1e-9


def test_spread_leaves_what_is_apart() -> None:
    assert spread([0.9, 0.1, 0.5], spacing=0.1) == [0.9, 0.1, 0.5]
