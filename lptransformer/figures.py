"""Figures in the style of this package, and their files. The same figure gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lptransformer import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92"}
_STYLE |= {"axes.axisbelow": True, "font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "lptransformer"}


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its axes, row by row; `options` are those of matplotlib's `subplots`."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, and a file is all that is wanted

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def save(figure: Figure, stem: Path, svg: bool = False) -> Path:
    """STEM.png, with `svg` also STEM.svg; each file appears whole or not at all. Returns the PNG's path."""
    import matplotlib

    kinds: dict[str, dict[str, Any]] = {"png": {"Software": None}}  # first: every drawing moves the layout a little
    kinds |= {"svg": {"Date": None}} if svg else {}
    with matplotlib.rc_context(_STYLE):
        for kind, metadata in kinds.items():
            path = stem.with_name(f"{stem.name}.{kind}")
            with files.replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return stem.with_name(f"{stem.name}.png")


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """A label at the end (x, y, text, colour) of every line, moved up or down until none covers another.

    They stand in a column right of the axes; a thin line leads to one whose end is elsewhere. Called when the
    axes have their limits and the figure its layout (`draw_without_rendering`), which decides how high a line is.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = 10 * axes.figure.dpi / 72 / axes.get_window_extent().height * (high - low)  # a line of text
    ordered = sorted(((x, min(max(y, low), high), text, colour) for x, y, text, colour in ends), key=lambda end: end[1])
    left, right = axes.get_xlim()
    for (x, y, text, colour), place in zip(ordered, _apart([end[1] for end in ordered], gap, low), strict=True):
        moved = right - x > 0.05 * (right - left) or abs(place - y) > 0.2 * gap
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 2,
            "alpha": 0.6,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            text,
            (x, y),
            (1.04, place),
            xycoords="data",
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            fontsize=8,
            va="center",
            arrowprops=line if moved else None,
            annotation_clip=False,
        )


def _apart(wanted: Sequence[float], gap: float, low: float) -> list[float]:
    """Rising places at least `gap` apart, as near to the wanted ones (rising) as such groups allow, none below `low`.

    Neighbours that would overlap form a group around the mean of what they want.
    """
    groups: list[list[float]] = []  # of what is wanted

    def bottom(group: Sequence[float]) -> float:
        return max(low, sum(group) / len(group) - gap * (len(group) - 1) / 2)

    for one in wanted:
        groups.append([one])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [bottom(group) + gap * i for group in groups for i in range(len(group))]
