"""Pictures of timelines: pipeline ranks over time, and what they do in colours. The same slices give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lptransformer.figures import new_figure, save
from lptransformer.run_folder.recorder import COPIES
from lptransformer.run_folder.trace import HEAD, WAIT, Slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which most people can tell apart.
COLOURS = {
    "forward": "#0072B2",
    HEAD: "#56B4E9",
    "backward": "#009E73",
    "pull": "#E69F00",
    "update": "#D55E00",
    "message": "#555555",
    COPIES: "#CC79A7",
    WAIT: "#F0E442",
}
LABELS = {HEAD: "head and loss", "message": "send, receive", COPIES: "copies of weights"}
NUMBERED = ("forward", "backward", "pull")
HEIGHT = 0.8  # of a row


@dataclass(frozen=True)
class Panel:
    """A timeline and its title. Where a pipeline rank has no slices before its first or after its last, nothing is
    known about it."""

    title: str
    slices: Sequence[Slice]


def draw(panels: Sequence[Panel], stem: Path) -> Path:
    """STEM.png and STEM.svg: the panels below each other on one axis of time, first replicas only.

    Boxes have the number of their micro-batch where it fits. Every second update is lighter. Returns the PNG's path.
    """
    from matplotlib.patches import Patch

    shown = [[one for one in panel.slices if one.data_rank == 0] for panel in panels]
    ranks = max(one.pipeline_rank for one in shown[0]) + 1
    height = max(1.3, 0.45 + 0.32 * ranks)
    figure, axes = new_figure(len(panels), 1, (13, len(panels) * height + 1.1), sharex=True)
    end = max(one.end for slices in shown for one in slices)
    unit, scale = ("ms", 1e3) if end < 1 else ("s", 1.0)
    for place, panel, slices in zip(axes, panels, shown, strict=True):
        _draw_panel(place, slices, scale)
        place.set_title(panel.title, loc="left")
        place.set_xlim(0, end * scale)
        place.set_ylim(ranks - 0.5, -0.5)
        place.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        place.tick_params(left=False, labelbottom=True)
        place.grid(False, axis="y")
    axes[-1].set_xlabel(f"time ({unit}); every second update is lighter, numbers are micro-batches")
    kinds = {_colour_of(one) for slices in shown for one in slices}
    handles = [Patch(color=c, label=LABELS.get(kind, kind)) for kind, c in COLOURS.items() if kind in kinds]
    if any(_unknown(slices) for slices in shown):
        handles.append(Patch(facecolor="white", edgecolor="0.75", hatch="////", label="not recorded"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.draw_without_rendering()  # the layout decides how wide a second is
    for place, slices in zip(axes, shown, strict=True):
        _number_boxes(place, slices, scale, place.get_window_extent().width / figure.dpi / (end * scale))
    return save(figure, stem)


def _colour_of(one: Slice) -> str:
    return "message" if one.kind in ("send", "receive") else one.kind


def _draw_panel(place: Axes, slices: Sequence[Slice], scale: float) -> None:
    light = {update: i % 2 == 1 for i, update in enumerate(sorted({one.update for one in slices}))}

    def group(one: Slice) -> tuple[int, str, bool]:
        return one.pipeline_rank, _colour_of(one), light[one.update] and one.kind != WAIT

    for (rank, kind, lighter), same in groupby(sorted(slices, key=group), key=group):
        spans = [(one.start * scale, one.seconds * scale) for one in same]
        colour = _lighter(COLOURS[kind]) if lighter else COLOURS[kind]
        place.broken_barh(spans, (rank - HEIGHT / 2, HEIGHT), facecolor=colour, edgecolor="white", linewidth=0.2)
    for rank, start, end in _unknown(slices):
        span = [(start * scale, (end - start) * scale)]
        place.broken_barh(span, (rank - HEIGHT / 2, HEIGHT), facecolor="white", edgecolor="0.75", hatch="////", lw=0)


def _unknown(slices: Sequence[Slice]) -> list[tuple[int, float, float]]:
    """(pipeline rank, start, end) of what lies before a rank's first slice and after its last."""
    end = max(one.end for one in slices)
    found = []
    for rank in sorted({one.pipeline_rank for one in slices}):
        own = [one for one in slices if one.pipeline_rank == rank]
        first, last = min(one.start for one in own), max(one.end for one in own)
        found += [(rank, a, b) for a, b in ((0.0, first), (last, end)) if b - a > 1e-3 * end]
    return found


def _number_boxes(place: Axes, slices: Sequence[Slice], scale: float, inches_per_unit: float) -> None:
    """Numbers of micro-batches; a forward action is one box, its head included."""
    for one in slices:
        if one.action is None or one.action.micro_batch is None or one.kind not in NUMBERED:
            continue
        text = str(one.action.micro_batch)
        if one.seconds * scale * inches_per_unit > 0.065 * len(text) + 0.03:
            middle = (one.start + one.end) / 2 * scale
            place.text(middle, one.pipeline_rank, text, ha="center", va="center_baseline", color="white", fontsize=7)


def _lighter(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - 0.6 * (1 - part) for part in to_rgb(colour))
    return red, green, blue
