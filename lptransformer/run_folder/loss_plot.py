"""The losses of a run as a picture, loss.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lptransformer.figures import label_ends, new_figure, save
from lptransformer.run_folder.metrics import MetricsRow, Stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Markers of the evaluation sets, and how they are written in a label.
_SIGNS = dict(zip("osD^vPX*", "\u25cf\u25a0\u25c6\u25b2\u25bc\u271a\u2716\u2605", strict=True))


def plot_losses(rows: Sequence[MetricsRow], path_png: str | Path, stages: Stages, svg: bool = False) -> None:
    """Write a PNG: the loss (nats per token) of every exit over tokens and over seconds of training, with the points
    of the evaluations. With `svg` also an SVG beside it. Each file appears whole or not at all.

    The axis of the loss begins where training is after its first tenth; an arrow says how high it began. Names stand
    at the ends of the lines: every exit, and every evaluation set at the deepest exit's last point.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    updates = [row for row in rows if "stages" in row]
    evaluations = [row for row in rows if "evaluation" in row]
    markers = dict(zip(sorted({row["evaluation"] for row in evaluations}), cycle(_SIGNS), strict=False))
    places = {row["update"]: row for row in updates} | {0: {"tokens": 0, "seconds": 0.0}}
    figure, panels = new_figure(1, 2, (12, 4.8), sharey=True)
    shown: list[list[float]] = []  # what is drawn at full strength, in the order of the updates
    ends: list[list[tuple[float, float, str, Any]]] = [[], []]
    for axes, key, named in zip(panels, ("tokens", "seconds"), ends, strict=True):
        last_points: dict[str, tuple[float, float, str, Any]] = {}
        for index, (_, _, last_block) in enumerate(stages):
            losses = [_exit_number(row["stages"], last_block, "loss") for row in updates]
            points = [
                (places[row["update"]][key], _exit_number(row["exits"], last_block, "nll_per_token"), row)
                for row in evaluations
                if row["update"] in places
            ]
            if all(map(math.isnan, losses)) and all(math.isnan(nll) for _, nll, _ in points):
                continue  # a stage without a head
            x, smooth = [row[key] for row in updates], _smooth(losses)
            color = colormaps["viridis"](0.78 * index / max(len(stages) - 1, 1))  # from dark to light with the depth
            axes.plot(x, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth, color=color, linewidth=1.6)
            finite = [point for point in zip(x, smooth, strict=True) if math.isfinite(point[1])]
            if finite:
                named.append((*finite[-1], f"exit after block {last_block}", color))
            for place, nll, row in points:
                name = row["evaluation"]
                axes.plot(place, nll, markers[name], color=color, markersize=6, markeredgecolor="white", zorder=3)
                if math.isfinite(nll):
                    last_points[name] = (place, nll, f"{_SIGNS[markers[name]]} {name}", color)
            shown += [smooth, [nll for _, nll, _ in points]]
        named += last_points.values()
        axes.tick_params(labelleft=True)
        axes.set_ylabel("loss (nats per token)")
    highest = _show_late_part(panels[0], shown)
    for axes, named in zip(panels, ends, strict=True):
        axes.margins(x=0.01)
        if named:
            axes.set_xlim(left=0)
        if highest is not None:
            style: dict[str, Any] = {"color": "0.4", "fontsize": 8, "va": "bottom", "transform": axes.transAxes}
            axes.text(0.0, 1.01, f"\N{UPWARDS ARROW} the first losses, from {highest:.2f}, are cut off", **style)
    panels[0].set_xlabel("training tokens")
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[1].set_xlabel("training time (seconds)")
    figure.draw_without_rendering()  # the layout decides how high a line of text is, in nats
    for axes, named in zip(panels, ends, strict=True):
        label_ends(axes, named)
    save(figure, Path(path_png).with_suffix(""), svg)


def _show_late_part(axes: Axes, lines: Sequence[Sequence[float]]) -> float | None:
    """Limit the losses to those after the first tenth of every line; what was highest, where that cuts something off.

    Of the late ones a fiftieth may be cut off too (a spike), but never the last of a line.
    """
    finite = [[loss for loss in line if math.isfinite(loss)] for line in lines]
    late = sorted(loss for line in finite for loss in line[math.ceil(len(line) / 10) :])
    if not late:
        return None
    high = max(late[int(0.98 * (len(late) - 1))], *(line[-1] for line in finite if line))
    margin = 0.05 * (high - late[0]) or 0.05
    highest = max(loss for line in finite for loss in line)
    if highest <= high + margin:
        high = highest
    axes.set_ylim(late[0] - margin, high + margin)
    return highest if highest > high + margin else None


def _exit_number(entries: Sequence[dict[str, Any]], last_block: int, key: str) -> float:
    """That of the exit after a block: in rows of before a resume a stage of the same number may end elsewhere."""
    values = [entry[key] for entry in entries if entry["last_block"] == last_block and entry[key] is not None]
    return values[0] if values else math.nan


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of a fiftieth of the values around each one, so that many noisy updates still make a line. The window
    is centred, and shrinks towards both ends: a curve that falls steeply is not shifted. A gap stays a gap."""
    x = np.array(values, dtype=np.float64)
    good = np.isfinite(x)
    sums, counts = np.cumsum([0.0, *np.where(good, x, 0.0)]), np.cumsum([0, *good])
    i = np.arange(len(x))
    half = np.minimum(np.minimum(i, len(x) - 1 - i), len(x) // 100)
    total, count = (c[i + half + 1] - c[i - half] for c in (sums, counts))
    return [float(t / n) if ok else math.nan for t, n, ok in zip(total, count, good, strict=True)]
