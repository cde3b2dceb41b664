"""Plots of a comparison, as PNG and SVG: losses over tokens and seconds, every exit, Pareto fronts.

The same records give the same bytes. Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lptransformer.figures import new_figure, save
from lptransformer.study import comparison
from lptransformer.study.comparison import LEARNING_RATE, Choice, flat
from lptransformer.study.records import Record, exit_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which most people can tell apart, and four more.
COLOURS: tuple[str, ...] = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
COLOURS += ("#7F7F7F", "#6A3D9A", "#B8B000", "#17BECF")
Look = dict[str, Any]
_COSTS = {
    "total_flops": "total FLOPs",
    "serial_flops": "serial FLOPs",
    "pipeline_flops": "FLOPs of one of 8 pipeline ranks",
    "seconds": "training time (seconds)",
}


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """How the lines of every method look, by its place among them: a colour, and dashes where colours repeat."""
    return {
        method: {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}
        for i, method in enumerate(dict.fromkeys(methods))
    }


def draw_methods(chosen: Sequence[Choice], name: str, look: Mapping[str, Look], out: Path) -> Path:
    """The last exit's loss of every method's best setting, over tokens and over seconds; thin lines are other seeds.

    The legend is in the order of the last losses.
    """
    figure, axes = new_figure(1, 2, (11, 4.6), sharey=True)
    runs = [(choice.method, run, i == 0) for choice in chosen for i, run in enumerate(choice.runs.values())]
    for place, (key, label) in zip(axes, (("tokens", "training tokens"), ("seconds", _COSTS["seconds"])), strict=True):
        for method, run, first in runs:
            x, y = _columns(run, name, key)
            place.plot(x, y, **look[method], linewidth=1.5 if first else 0.7, alpha=1 if first else 0.5)
            place.plot(x[-1:], y[-1:], "o", color=look[method]["color"], markersize=3)
        place.set_xlabel(label)
        _count_axis(place)
    _show_late_part(axes[0], [run for _, run, _ in runs], name)
    axes[0].set_ylabel(f"loss on {name} (nats per token)")
    ends = [(choice.method, _columns(next(iter(choice.runs.values())), name, "seconds")) for choice in chosen]
    ordered = sorted((end for end in ends if end[1][1]), key=lambda end: -end[1][1][-1])
    handles = [axes[1].plot([], [], **look[method], label=method)[0] for method, _ in ordered]
    axes[1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return save(figure, out / f"methods-{name}")


def draw_exits(chosen: Sequence[Choice], name: str, key: str, look: Mapping[str, Look], out: Path) -> Path:
    """A panel per method: every exit over `key` (tokens or seconds), deeper exits darker; training losses behind."""
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure, axes = new_figure(rows, columns, (3.9 * columns, 3.1 * rows + 0.3), sharex=True, sharey=True)
    ends_of: dict[str, list[tuple[float, float, str, Any]]] = {}
    for place, choice in zip(axes, chosen, strict=False):
        run = next(iter(choice.runs.values()))
        heads = exit_blocks(run["evaluations"].get(name, {"columns": []}))
        ends = ends_of[choice.method] = []
        for i, block in enumerate(heads):
            shade = _lighter(look[choice.method]["color"], 0.75 * (1 - (i + 1) / len(heads)))
            x, y = _columns(run, name, key, block)
            place.plot(*_training(run, key, block), color=shade, linewidth=0.6, alpha=0.35)
            place.plot(x, y, color=shade, linewidth=1.5, marker="o", markersize=2.5)
            if y and math.isfinite(y[-1]):
                ends.append((x[-1], y[-1], f"block {block}", shade))
        place.set_title(f"{choice.method}  (learning rate {flat(run['config'])[LEARNING_RATE]:g})", loc="left")
    for place in axes[len(chosen) :]:
        place.set_axis_off()
    runs = [next(iter(choice.runs.values())) for choice in chosen]
    _show_late_part(axes[0], runs, name, all_exits=True)
    for place in axes[: len(chosen)]:
        _count_axis(place)
        place.tick_params(labelbottom=True, labelleft=True)
    figure.supxlabel("training tokens" if key == "tokens" else _COSTS["seconds"], fontsize=9)
    figure.supylabel(f"loss on {name} (nats per token)", fontsize=9)
    figure.draw_without_rendering()  # the layout decides how high a line of text is, in nats
    for place, ends in zip(axes, ends_of.values(), strict=False):
        _label_ends(place, ends)
    return save(figure, out / f"exits-{name}-{key}")


def draw_fronts(
    of_cost: Mapping[str, Mapping[str, Sequence[comparison.Point]]], name: str, look: Mapping[str, Look], out: Path
) -> Path:
    """Validation loss against what it cost: every evaluation is a point, every method's Pareto front a step line."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = new_figure(1, len(of_cost), (4.2 * len(of_cost), 4.4), sharey=True)
    for place, (cost, of_method) in zip(axes, of_cost.items(), strict=True):
        for method, points in of_method.items():
            good = [point for point in points if point.cost > 0 and math.isfinite(point.loss)]
            x, y = [point.cost for point in good], [point.loss for point in good]
            place.plot(x, y, ".", color=look[method]["color"], markersize=5, alpha=0.3, markeredgewidth=0)
            front = comparison.front(good)
            if front:
                furthest = max(x)
                steps = [*((p.cost, p.loss) for p in front), (furthest, front[-1].loss)]
                place.step(*zip(*steps, strict=True), where="post", **look[method], linewidth=1.6, label=method)
        place.set_xscale("log")
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.xaxis.set_minor_formatter(NullFormatter())
        place.set_xlabel(_COSTS[cost])
        place.grid(True, which="minor", color="0.96")
    fronts = [comparison.front(points) for of_method in of_cost.values() for points in of_method.values()]
    losses = sorted(point.loss for front in fronts for point in front)
    if losses:
        # The early points say little about which method is best.
        low, high = losses[0], losses[int(0.75 * (len(losses) - 1))]
        margin = 0.05 * (high - low) or 0.05
        axes[0].set_ylim(low - margin, high + margin)
        for place, of_method in zip(axes, of_cost.values(), strict=True):
            shown = [p.cost for points in of_method.values() for p in points if p.loss <= high and p.cost > 0]
            place.set_xlim(0.8 * min(shown), 1.25 * max(shown))
    axes[0].set_ylabel(f"loss on {name} (nats per token)")
    handles, labels = axes[-1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return save(figure, out / f"pareto-{name}")


def _columns(run: Record, name: str, key: str, block: int | None = None) -> tuple[list[float], list[float]]:
    table = run["evaluations"].get(name, {"columns": [key], "rows": []})
    x, y = table["columns"].index(key), -1 if block is None else table["columns"].index(block)
    return [row[x] for row in table["rows"]], [row[y] for row in table["rows"]]


def _training(run: Record, key: str, block: int) -> tuple[list[float], list[float]]:
    """The training loss; its places in tokens follow from the updates, because all updates have as many."""
    table = run["training"]
    if block not in table["columns"]:
        return [], []
    evaluated = next(row for of in run["evaluations"].values() for row in of["rows"])
    per_update = evaluated[1] / evaluated[0]
    y = table["columns"].index(block)
    x = [row[0] * per_update if key == "tokens" else row[1] for row in table["rows"]]
    return x, [row[y] for row in table["rows"]]


def _show_late_part(axes: Axes, runs: Sequence[Record], name: str, all_exits: bool = False) -> None:
    """Limits of the loss that show the differences at the end instead of the fall at the start."""
    late, last = [], []
    for run in runs:
        rows = run["evaluations"].get(name, {"rows": []})["rows"]
        first = 5 if all_exits else -1
        late += [loss for row in rows[len(rows) // 4 :] for loss in row[first:] if math.isfinite(loss)]
        last += [loss for row in rows[-1:] for loss in row[first:] if math.isfinite(loss)]
    if last:
        low, high = min(late), max(max(last), sorted(late)[int(0.97 * (len(late) - 1))])
        margin = 0.06 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def _count_axis(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """A label at the end (x, y, text, colour) of every line, moved up or down until none covers another."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = 11 * axes.figure.dpi / 72 / axes.get_window_extent().height * (high - low)  # a line of text, in nats
    ordered = sorted(ends, key=lambda end: end[1])
    places = [end[1] for end in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    shift = min((places[-1] - ordered[-1][1]) / 2, places[0] - low)  # half up, half down, not below the axis
    for (_, _, text, colour), place in zip(ordered, places, strict=True):
        at = (max(end[0] for end in ends), place - shift)
        offset: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(text, at, color=colour, annotation_clip=False, **offset)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(channel + (1 - channel) * share for channel in to_rgb(colour))
