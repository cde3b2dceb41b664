"""Plots of a comparison, one picture per question: who loses how much, what it costs, how it came about.

The same records give the same bytes. Losses are in nats per token, means over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lptransformer.figures import label_ends, new_figure, save
from lptransformer.study.comparison import Choice, Estimate, difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

# Okabe and Ito's colours, which most people can tell apart, and four more.
COLOURS: tuple[str, ...] = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
COLOURS += ("#7F7F7F", "#6A3D9A", "#B8B000", "#17BECF")
AHEAD, LEVEL, BEHIND = COLOURS[1], COLOURS[8], COLOURS[2]
MANY = 12  # evaluations: a line through fewer is drawn with a marker at each
Look = dict[str, Any]


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """How the lines of every method look, by its place among them: a colour, and dashes where colours repeat."""
    return {
        method: {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}
        for i, method in enumerate(dict.fromkeys(methods))
    }


# --- who loses how much


def draw_losses(chosen: Sequence[Choice], name: str, baseline: Choice | None, out: Path, svg: bool = False) -> Path:
    """A row per method, the best on top: what it loses to the baseline, a dot and its standard error over seeds.

    Without a baseline, the loss itself. Hollow dots are single seeds. Beside each row stands the mean loss.
    """
    from matplotlib.ticker import MaxNLocator

    rows = sorted(
        ((choice, difference(choice, baseline, name) if baseline else choice.estimate(name)) for choice in chosen),
        key=lambda row: (not math.isfinite(row[1].mean), row[1].mean),
    )
    figure, (axes,) = new_figure(1, 1, (8.5, 0.26 * len(rows) + 1.1))
    for y, (choice, loss) in enumerate(rows):
        if not math.isfinite(loss.mean):
            continue
        colour = _verdict(loss) if baseline else COLOURS[1]
        if choice is baseline:
            colour = COLOURS[0]
        inside = "white" if loss.error is None else colour
        style: dict[str, Any] = {"color": colour, "markerfacecolor": inside, "markersize": 5, "capsize": 2.5}
        axes.errorbar(loss.mean, y, xerr=loss.error or None, fmt="o", elinewidth=1.2, **style)
    if baseline:
        axes.axvline(0, color="0.3", linewidth=0.8, zorder=1)
        axes.text(0, 1.01, baseline.method, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    finite = [loss for _, loss in rows if math.isfinite(loss.mean)]
    cut = _reasonable([loss.mean for loss in finite])
    if finite:
        low = min(one.mean - (one.error or 0.0) for one in finite)
        high = max(one.mean + (one.error or 0.0) for one in finite if one.mean <= cut)
        margin = 0.04 * (high - low) or 0.05
        axes.set_xlim(low - margin, high + margin)
    axes.set_yticks(range(len(rows)), [choice.method for choice, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(7))
    for y, (choice, loss) in enumerate(rows):
        seeds = f"{len(choice.runs)} seed{'s' * (len(choice.runs) > 1)}"
        beyond = f"   beyond the axis: {loss.text(3, '+')}" if loss.mean > cut else ""
        said = f"{choice.estimate(name).text(4)}   {seeds}{beyond}"
        axes.text(1.015, y, said, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.3")
    axes.text(1.015, 1.01, "mean loss", transform=axes.transAxes, va="bottom", fontsize=8, color="0.3")
    of = f"loss on {name} minus that of {baseline.method}" if baseline else f"loss on {name}"
    grey = "; grey: within two standard errors, or of a single seed (hollow)" if baseline else ""
    axes.set_xlabel(f"{of}, nats per token, ± standard error over seeds\nleft is better{grey}")
    return save(figure, out / f"losses-{name}", svg)


def _verdict(loss: Estimate) -> str:
    """Ahead of the baseline, behind it, or within two standard errors of it (a single seed says neither)."""
    if loss.error is None or abs(loss.mean) <= 2 * loss.error:
        return LEVEL
    return AHEAD if loss.mean < 0 else BEHIND


def _reasonable(losses: Sequence[float]) -> float:
    """The largest value that an axis should reach: one far beyond it (a run that diverged) would hide the others."""
    if not losses:
        return math.inf
    spread = median(losses) - min(losses)
    return median(losses) + 6 * spread if spread > 0 else math.inf


# --- what it costs


def draw_costs(chosen: Sequence[Choice], name: str, baseline: Choice | None, out: Path, svg: bool = False) -> Path:
    """The loss at the end over the serial FLOPs: a labelled point per method, its standard error over seeds.

    Grey lines through the baseline: what is below is better, what is left of it has less to compute in sequence.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    found = []
    for choice in chosen:
        loss, spent = choice.estimate(name), _spent(choice, name)
        if math.isfinite(loss.mean) and spent > 0:
            found.append((choice, loss, spent))
    cut = _reasonable([loss.mean for _, loss, _ in found])
    shown = [one for one in found if one[1].mean <= cut]
    figure, (axes,) = new_figure(1, 1, (8.5, 4.4 + 0.08 * len(shown)))
    for choice, loss, spent in shown:
        colour = COLOURS[0] if choice is baseline else COLOURS[1]
        if choice is baseline:
            axes.axhline(loss.mean, color="0.75", linewidth=0.8, zorder=1)
            axes.axvline(spent, color="0.75", linewidth=0.8, zorder=1)
        whiskers: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "ecolor": "0.7"}
        axes.errorbar(spent, loss.mean, yerr=loss.error or None, fmt="o", color=colour, markersize=5, **whiskers)
    axes.set_xscale("log")
    if shown:
        # Room for labels, within a factor that also a single point has.
        axes.set_xlim(min(spent for *_, spent in shown) / 1.25, max(spent for *_, spent in shown) * 1.25)
        axes.margins(y=0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("serial FLOPs of the whole training")
    axes.set_ylabel(f"final loss on {name} (nats per token)")
    left_out = [f"{choice.method} ({loss.mean:.2f})" for choice, loss, _ in found if loss.mean > cut]
    if left_out:
        axes.set_title(f"above the axis: {', '.join(left_out)}", loc="left", fontsize=8, color="0.3")
    figure.draw_without_rendering()  # the layout decides how far points are from each other
    label_points(axes, [(spent, loss, choice.method) for choice, loss, spent in shown])
    return save(figure, out / f"cost-{name}", svg)


def _spent(choice: Choice, name: str) -> float:
    """The serial FLOPs of a method at its last evaluation."""
    tables = [run["evaluations"].get(name) for run in choice.runs.values()]
    last = [table["rows"][-1][table["columns"].index("serial_flops")] for table in tables if table and table["rows"]]
    return fmean(last) if last else 0.0


def label_points(axes: Axes, points: Sequence[tuple[float, Estimate, str]]) -> list[Text]:
    """A label near every point (x, y, text): the nearest of many places where it covers no label, point or whisker."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    pixels = axes.figure.dpi / 72
    taken: list[Any] = []
    for x, loss, _ in points:
        (left, low), (_, high) = (axes.transData.transform((x, loss.mean + s * (loss.error or 0.0))) for s in (-1, 1))
        taken.append(Bbox([[left - 4 * pixels, low - 4 * pixels], [left + 4 * pixels, high + 4 * pixels]]))
    room = axes.get_window_extent()
    labels: list[Text] = []
    places = [(distance, way) for distance in (7, 14, 21, 28, 36, 44, 54, 66, 80, 96, 120) for way in _WAYS]
    for x, loss, text in points:
        line: dict[str, Any] = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        at, halo = (x, loss.mean), [withStroke(linewidth=2, foreground="white")]
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "va": "center", "path_effects": halo}
        label = axes.annotate(text, at, (0, 0), **style)
        for distance, (right, up) in places:
            label.set_position((right * distance, up * distance))
            label.set_horizontalalignment("left" if right > 0 else "right" if right < 0 else "center")
            box = label.get_window_extent().padded(pixels)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        if distance > 7:  # a line of the same length, without a text
            axes.annotate("", at, (right * distance, up * distance), textcoords="offset points", arrowprops=line)
        taken.append(box)
        labels.append(label)
    return labels


_WAYS = (
    (1, 0),
    (-1, 0),
    (0.6, 0.8),
    (0.6, -0.8),
    (-0.6, 0.8),
    (-0.6, -0.8),
    (0, 1.3),
    (0, -1.3),
    (0.9, 0.4),
    (0.9, -0.4),
)


# --- how it came about


def draw_curves(chosen: Sequence[Choice], name: str, look: Mapping[str, Look], out: Path, svg: bool = False) -> Path:
    """The loss over the updates, a line per method with its name at the end.

    Where a run was evaluated a few times only, a marker stands at each: between them nothing is known.
    """
    lines = {choice.method: _mean_curve(choice, name) for choice in chosen}
    lines = {method: line for method, line in lines.items() if line}
    figure, (axes,) = new_figure(1, 1, (8.5, max(4.2, 0.17 * len(lines) + 1.0)))
    for method, line in lines.items():
        markers: dict[str, Any] = {"marker": "o", "markersize": 3} if len(line) < MANY else {}
        axes.plot(*zip(*line, strict=True), **look[method], linewidth=1.3, **markers)
    if lines:
        _show_late_part(axes, list(lines.values()))
    few = any(len(line) < MANY for line in lines.values())
    axes.set_xlabel("updates" + (" (markers: evaluations, where there are few)" if few else ""))
    axes.set_ylabel(f"loss on {name} (nats per token)")
    figure.draw_without_rendering()  # the layout decides how high a line of text is, in nats
    label_ends(axes, [(*line[-1], method, look[method]["color"]) for method, line in lines.items()])
    return save(figure, out / f"curves-{name}", svg)


def _mean_curve(choice: Choice, name: str) -> list[tuple[float, float]]:
    """(update, loss at the last exit), the mean of the seeds, at the updates that all of them evaluated."""
    tables = [run["evaluations"].get(name, {"rows": []}) for run in choice.runs.values()]
    of_seed = [{row[0]: row[-1] for row in table["rows"] if math.isfinite(row[-1])} for table in tables]
    shared = sorted(set.intersection(*map(set, of_seed)))
    return [(update, fmean(losses[update] for losses in of_seed)) for update in shared]


def _show_late_part(axes: Axes, lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Limits of the loss that show the differences at the end instead of the fall at the start.

    A line whose end is far beyond the others (a run that diverged) does not count.
    """
    cut = _reasonable([line[-1][1] for line in lines])
    good = [line for line in lines if line[-1][1] <= cut]
    late = sorted(loss for line in good for _, loss in line[len(line) // 4 :])
    low, high = late[0], max(late[int(0.9 * (len(late) - 1))], *(line[-1][1] for line in good))
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    first, last = min(line[0][0] for line in lines), max(line[-1][0] for line in lines)
    axes.set_xlim(max(0, first - 0.05 * (last - first)) if first > 0.1 * last else 0, 1.01 * last or 1)
