"""The pictures of a comparison: what stands in them and where, on records whose losses are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lptransformer import figures
from lptransformer.study import plots
from lptransformer.study.comparison import Choice, Estimate

COLUMNS = ["update", "tokens", "seconds", "total_flops", "serial_flops", "pipeline_flops", 3]


def choice(method: str, losses: Sequence[float], spent: float = 1e6, evaluations: int = 3) -> Choice:
    """A method whose seeds end with these losses, each evaluation before half a nat worse."""
    runs: dict[int, Any] = {}
    for seed, loss in enumerate(losses):
        rows = [
            [10 * i, 100 * i, 1.0 * i, spent * i, spent * i / evaluations, spent * i, loss + 0.5 * (evaluations - i)]
            for i in range(1, evaluations + 1)
        ]
        runs[seed] = {"updates": 10 * evaluations, "config": {"train": {}}}
        runs[seed]["evaluations"] = {"valid": {"columns": COLUMNS, "rows": rows}}
    return Choice(method, runs, "0.1", 10 * evaluations)


BASE = choice("backprop", (1.50, 1.52, 1.54))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, instead of files."""
    kept: list[Figure] = []

    def keep(figure: Figure, stem: Path, svg: bool = False) -> Path:
        figure.draw_without_rendering()
        kept.append(figure)
        return stem

    monkeypatch.setattr(plots, "save", keep)
    return kept


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


def overlaps(boxes: Sequence[Bbox]) -> list[tuple[Bbox, Bbox]]:
    # Lines of text may touch: their boxes have room above and below.
    smaller = [Bbox.from_extents(box.x0 + 1, box.y0 + 2, box.x1 - 1, box.y1 - 2) for box in boxes]
    return [(a, b) for a, b in itertools.combinations(smaller, 2) if a.overlaps(b)]


def test_losses_are_rows_from_the_best_to_the_worst_with_their_errors(drawn: list[Figure]) -> None:
    worse = choice("worse", (1.60, 1.62, 1.64))
    better = choice("better", (1.40, 1.43, 1.43))
    level = choice("one", (1.51,))
    plots.draw_losses([worse, BASE, better, level], "valid", BASE, Path())
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["better", "backprop", "one", "worse"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the best on top"
    bars = [container for container in axes.containers if hasattr(container, "has_xerr")]
    places = [float(bar.lines[0].get_xdata()[0]) for bar in bars]
    assert places == pytest.approx([-0.1, 0.0, 0.01, 0.1])
    assert [bar.has_xerr for bar in bars] == [True, False, False, True], "a single seed has no error"
    assert [bar.lines[0].get_color() for bar in bars] == [plots.AHEAD, plots.COLOURS[0], plots.LEVEL, plots.BEHIND]
    assert bars[2].lines[0].get_markerfacecolor() == "white"
    left, right = (float(end) for end in bars[0].lines[2][0].get_segments()[0][:, 0])
    assert (right - left) / 2 == pytest.approx(0.00577, abs=1e-4)  # of the differences -0.10, -0.09, -0.11
    assert texts(axes)[0] == "backprop" and "1.4200 ± 0.0100   3 seeds" in texts(axes)


def test_losses_without_a_baseline_and_one_that_diverged(drawn: list[Figure]) -> None:
    plots.draw_losses([choice(f"m{i}", (1.5 + 0.01 * i,)) for i in range(4)], "valid", None, Path())
    plots.draw_losses([BASE, choice("a", (1.6,)), choice("b", (1.4,)), choice("bad", (9.0,))], "valid", BASE, Path())
    first, second = (figure.axes[0] for figure in drawn)
    assert first.get_xlim()[0] < 1.5 < 1.53 < first.get_xlim()[1]
    assert second.get_xlim()[1] < 1, "it hides nobody else"
    assert any("beyond the axis: +7.5" in text for text in texts(second))


def test_a_verdict_needs_two_standard_errors() -> None:
    found = [plots._verdict(Estimate(*one)) for one in ((-0.1, 0.04), (-0.1, 0.06), (0.1, 0.04), (0.1, None))]
    assert found == [plots.AHEAD, plots.LEVEL, plots.BEHIND, plots.LEVEL]


def test_every_method_has_a_label_beside_its_point_that_covers_nothing(drawn: list[Figure]) -> None:
    crowd = [choice(f"method-{i}", (1.5 + 0.002 * i, 1.51 + 0.002 * i), 1e6 * (1 + i % 3)) for i in range(18)]
    plots.draw_costs([BASE, *crowd], "valid", BASE, Path())
    (axes,) = drawn[0].axes
    labels = [text for text in axes.texts if text.get_text()]
    assert sorted(texts(axes)) == sorted(["backprop", *(one.method for one in crowd)]) and axes.get_legend() is None
    boxes = [label.get_window_extent() for label in labels]
    assert not overlaps(boxes)
    points = [axes.transData.transform(one.get_xydata()[0]) for one in axes.lines if one.get_marker() == "o"]
    assert len(points) == 19 and not [box for box in boxes for x, y in points if box.contains(x, y)]
    spent = {x for one in axes.lines if one.get_marker() == "o" for x, _ in one.get_xydata()}
    assert spent == {1e6, 2e6, 3e6}, "at the last evaluation"


def test_curves_have_their_names_at_their_ends_and_markers_where_evaluations_are_few(drawn: list[Figure]) -> None:
    chosen = [choice("few", (1.5, 1.6)), choice("many", (1.7,), evaluations=12)]
    plots.draw_curves(chosen, "valid", plots.looks(["few", "many"]), Path())
    (axes,) = drawn[0].axes
    few, many = axes.lines
    assert (few.get_marker(), many.get_marker()) == ("o", "None")
    assert few.get_xydata().ravel().tolist() == pytest.approx([10, 2.55, 20, 2.05, 30, 1.55]), "means over seeds"
    assert texts(axes) == ["few", "many"] and "markers" in axes.get_xlabel() and axes.get_legend() is None
    assert axes.get_ylim()[1] < 7, "the fall at the start does not matter"


def test_pictures_of_methods_that_have_nothing_to_show(drawn: list[Figure]) -> None:
    nothing = {"updates": 0, "config": {"train": {}}, "evaluations": {}}
    none = [Choice("none", {0: nothing}, "0.1", 0), choice("nan", (float("nan"),))]
    plots.draw_losses(none, "valid", None, Path())
    plots.draw_costs(none, "valid", None, Path())
    plots.draw_curves(none, "valid", plots.looks(["none", "nan"]), Path())
    assert len(drawn) == 3


def test_labels_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.subplots()
    axes.set_ylim(1.0, 2.0)
    ends = [(1.0, y, f"block {i}", "black") for i, y in enumerate((1.501, 1.5, 1.502, 1.01, 1.9))]
    figures.label_ends(axes, ends)
    figure.draw_without_rendering()
    labels = sorted(axes.texts, key=lambda text: text.get_window_extent().y0)
    assert [label.get_text() for label in labels] == ["block 3", "block 1", "block 0", "block 2", "block 4"]
    places = [float(label.get_position()[1]) for label in labels]
    assert places[0] == pytest.approx(1.01) and places[4] == pytest.approx(1.9), "who is alone stands at its end"
    assert places[2] == pytest.approx(1.501), "others around what they want"
    lines = 10 * figure.dpi / 72 / axes.get_window_extent().height
    assert all(b - a >= 0.99 * lines for a, b in itertools.pairwise(places))
    figures.label_ends(axes, [])
    assert len(axes.texts) == 5


def test_pictures_are_png_alone_and_svg_where_it_is_asked_for(tmp_path: Path) -> None:
    figure, _ = figures.new_figure(1, 1, (2, 2))
    assert figures.save(figure, tmp_path / "a.b") == tmp_path / "a.b.png"
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.png"]
    figures.save(figure, tmp_path / "a.b", svg=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "a.b.svg"]
