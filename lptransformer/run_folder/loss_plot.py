"""The losses of a run as a picture, loss.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from lptransformer import files
from lptransformer.run_folder.metrics import MetricsRow, Stages


def plot_losses(rows: Sequence[MetricsRow], path_png: str | Path, stages: Stages) -> None:
    """Write a PNG: the loss (nats per token) of every exit over tokens and over seconds of training, with the points
    of the evaluations. The file appears whole or not at all."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no global state, and always the Agg backend for a PNG
    from matplotlib.ticker import EngFormatter

    updates = [row for row in rows if "stages" in row]
    evaluations = [row for row in rows if "evaluation" in row]
    markers = dict(zip(sorted({row["evaluation"] for row in evaluations}), cycle("osD^vPX*"), strict=False))
    places = {row["update"]: row for row in updates} | {0: {"tokens": 0, "seconds": 0.0}}
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "tokens"), (right, "seconds")):
        for index, (stage, _, last_block) in enumerate(stages):
            losses = [_exit_number(row["stages"], stage, "loss") for row in updates]
            points = [
                (places[row["update"]][key], _exit_number(row["exits"], stage, "nll_per_token"), row)
                for row in evaluations
                if row["update"] in places
            ]
            if all(map(math.isnan, losses)) and all(math.isnan(nll) for _, nll, _ in points):
                continue  # a stage without a head
            x = [row[key] for row in updates]
            color = colormaps["viridis"](0.85 * index / max(len(stages) - 1, 1))  # from dark to light with the depth
            axes.plot(x, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(x, _smooth(losses), color=color, linewidth=1.6, label=f"exit after block {last_block}")
            for place, nll, row in points:
                marker = markers[row["evaluation"]]
                axes.plot(place, nll, marker, color=color, markersize=6, markeredgecolor="white", zorder=3)
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("loss (nats per token)")
        axes.tick_params(labelleft=True)
    for name, marker in markers.items():
        left.plot([], [], marker, color="0.4", label=f"evaluation on {name}")
    left.set_xlabel("training tokens")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_xlabel("training time (seconds)")
    if left.lines:
        left.legend(frameon=False)

    with files.replacing(Path(path_png)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _exit_number(entries: Sequence[dict[str, Any]], stage: int, key: str) -> float:
    values = [entry[key] for entry in entries if entry["stage"] == stage and entry[key] is not None]
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
