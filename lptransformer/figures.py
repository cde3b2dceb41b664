"""Figures in the style of this package, and their files. The same figure gives the same bytes."""

from __future__ import annotations

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


def save(figure: Figure, stem: Path) -> Path:
    """STEM.png and STEM.svg; each file appears whole or not at all. Returns the PNG's path."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            path = stem.with_name(f"{stem.name}.{kind}")
            with files.replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return stem.with_name(f"{stem.name}.png")
