"""What a person sees of a run: the display while it trains, the loss plot, tables of results.

The records are those of lptransformer.metrics. Where the output is not a terminal everything is plain lines.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lptransformer import whole_file
from lptransformer.metrics import Record, Stages


class Progress:
    """The display of a run of `total_updates` updates, as a context manager on global rank 0.

    In a terminal: a bar, a row per stage, and messages above them. Elsewhere: plain lines, the first and the last
    update and in between at most one every `interval_seconds`, every evaluation and every message. `quiet` leaves
    only the messages.
    """

    def __init__(
        self,
        total_updates: int,
        stages: Stages,
        quiet: bool = False,
        console: Console | None = None,
        interval_seconds: float = 5.0,
    ) -> None:
        self.total_updates = total_updates
        self.stages = stages
        self.quiet = quiet
        self.console = console or _console()
        self.interval_seconds = interval_seconds
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first update of this process and when it was done
        self._updated = self._started
        self._record: Record | None = None
        self._printed_update: int | None = None
        self._printed_at = -math.inf
        self._skipped = {stage: 0 for stage, _, _ in stages}
        self._skipped_since_line: set[int] = set()
        self._evaluations: dict[str, Record] = {}

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.console.is_interactive and not self.quiet:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._record is not None and self._printed_update != self._record["update"]:
            self._print_update(self._record)

    def update(self, record: Record) -> None:
        """Show the record of an update."""
        now = time.monotonic()
        self._first = self._first or (record["update"], now)
        self._record, self._updated = record, now
        for entry in record["stages"]:
            if entry["skipped"]:
                self._skipped[entry["stage"]] += 1
                self._skipped_since_line.add(entry["stage"])
        last = record["update"] == self.total_updates
        if self._live is None and (last or now - self._printed_at >= self.interval_seconds):
            self._print_update(record)

    def evaluation(self, record: Record) -> None:
        """Show the record of an evaluation."""
        # A new dictionary: the thread that redraws the display may be walking through the old one.
        self._evaluations = self._evaluations | {record["evaluation"]: record}
        if self._live is None and not self.quiet:
            exits = record["exits"]
            parts = [
                f"evaluation {record['update']}/{self.total_updates}",
                record["evaluation"],
                "nll " + " ".join(f"{e['nll_per_token']:.3f}" for e in exits),
                "perplexity " + " ".join(_perplexity(e["perplexity"]) for e in exits),
                "bits/byte " + " ".join(f"{e['bits_per_byte']:.3f}" for e in exits),
            ]
            _print_line(self.console, "  ".join(parts))

    def message(self, text: str) -> None:
        """Print a line, above the display where there is one."""
        _print_line(self.console, text)

    def _print_update(self, record: Record) -> None:
        self._printed_update, self._printed_at = record["update"], time.monotonic()
        if not self.quiet:
            _print_line(self.console, self._line(record))
        self._skipped_since_line.clear()

    def _line(self, record: Record) -> str:
        entries = record["stages"]
        parts = [
            f"update {record['update']}/{self.total_updates}",
            "loss " + " ".join(_optional(e["loss"], ".3f") for e in entries),
            "grad " + " ".join(_optional(e["grad_norm"], ".2g") for e in entries),
            f"lr {record['learning_rate']:.1e}",
            f"{_short(record['tokens_per_second'])} tok/s",
            f"eta {_clock(self._remaining_seconds())}",
            "idle " + " ".join(f"{e['idle_share']:.0%}" for e in entries),
            _megabytes(max(e["memory_bytes"] for e in entries)),
        ]
        if self._skipped_since_line:
            parts.append("SKIPPED by stage " + ", ".join(map(str, sorted(self._skipped_since_line))))
        return "  ".join(parts)

    def _remaining_seconds(self) -> float:
        """At the speed of this process since its first update, which is slower than the others; nan if unknown."""
        if self._record is None or self._first is None:
            return math.nan
        remaining: int = self.total_updates - self._record["update"]
        if remaining <= 0:
            return 0.0
        first_update, first_done = self._first
        done: int = self._record["update"] - first_update
        if done == 0:
            return remaining * (first_done - self._started)
        per_update = (self._updated - first_done) / done
        return max(0.0, remaining * per_update - (time.monotonic() - self._updated))

    def _render(self) -> RenderableType:
        tables = [self._render_stages()] + ([self._render_evaluations()] if self._evaluations else [])
        return Group(self._render_bar(), Columns(tables, padding=(0, 3)))  # side by side where the terminal is wide

    def _render_bar(self) -> RenderableType:
        done = self._record["update"] if self._record else 0
        speed = f"{_short(self._record['tokens_per_second'])} tok/s" if self._record else "starting"
        elapsed, eta = _clock(time.monotonic() - self._started), _clock(self._remaining_seconds())
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(f"update {done}/{self.total_updates}", style="bold"),
            ProgressBar(total=max(self.total_updates, 1), completed=done),
            Text(f"{speed}  {elapsed} elapsed  eta {eta}"),
        )
        return row

    def _render_stages(self) -> Table:
        entries = {entry["stage"]: entry for entry in self._record["stages"]} if self._record else {}
        grid = Table(box=None, padding=(0, 1), header_style="dim")
        for name in ("stage", "blocks", "loss", "grad norm", "lr", "memory", "idle", "skipped"):
            grid.add_column(name, justify="right", no_wrap=True)
        for stage, first, last in self.stages:
            cells = [str(stage), f"{first}-{last}" if last > first else str(first)]
            entry = entries.get(stage)
            if entry and self._record:
                cells += [
                    _optional(entry["loss"], ".3f"),
                    _optional(entry["grad_norm"], ".2g"),
                    f"{self._record['learning_rate']:.1e}",
                    _megabytes(entry["memory_bytes"]),
                    f"{entry['idle_share']:.0%}",
                ]
            else:
                cells += ["-"] * 5
            grid.add_row(*cells, str(self._skipped[stage]), style="bold red" if entry and entry["skipped"] else None)
        return grid

    def _render_evaluations(self) -> Table:
        grid = Table(box=None, padding=(0, 1), header_style="dim")
        grid.add_column("nll / perplexity of exit", justify="right", no_wrap=True)
        for name, record in self._evaluations.items():
            grid.add_column(Text(f"{name} @{record['update']}"), justify="right", no_wrap=True)
        for stage, _, last in self.stages:
            cells = [f"after block {last}"]
            for record in self._evaluations.values():
                exits = [e for e in record["exits"] if e["stage"] == stage]
                cells += [f"{e['nll_per_token']:.3f} / {_perplexity(e['perplexity'])}" for e in exits] or ["-"]
            grid.add_row(*cells)
        return grid


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console | None = None) -> None:
    """Print a table: lines of aligned columns where the output is not a terminal. Numbers are set right, floats
    with three decimals; None is shown as "-"."""
    console = console or _console()
    cells = [[_cell(value) for value in row] for row in rows]
    right = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(columns))]
    if console.is_interactive:
        shown = Table(title=Text(title), title_justify="left")
        for name, is_number in zip(columns, right, strict=True):
            shown.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
        for row in cells:
            shown.add_row(*map(Text, row))
        console.print(shown)
        return
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    _print_line(console, title)
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        aligned = [
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(line, widths, right, strict=True)
        ]
        _print_line(console, "  ".join(aligned).rstrip())


def plot_losses(records: Sequence[Record], path_png: str | Path, stages: Stages) -> None:
    """Write a PNG: the loss (nats per token) of every exit over tokens and over seconds of training, with the points
    of the evaluations. The file appears whole or not at all."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no global state, and always the Agg backend for a PNG
    from matplotlib.ticker import EngFormatter

    updates = [record for record in records if "stages" in record]
    evaluations = [record for record in records if "evaluation" in record]
    markers = dict(zip(sorted({record["evaluation"] for record in evaluations}), cycle("osD^vPX*"), strict=False))
    places = {record["update"]: record for record in updates} | {0: {"tokens": 0, "seconds": 0.0}}
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "tokens"), (right, "seconds")):
        for index, (stage, _, last_block) in enumerate(stages):
            losses = [_exit_number(record["stages"], stage, "loss") for record in updates]
            points = [
                (places[record["update"]][key], _exit_number(record["exits"], stage, "nll_per_token"), record)
                for record in evaluations
                if record["update"] in places
            ]
            if all(map(math.isnan, losses)) and all(math.isnan(nll) for _, nll, _ in points):
                continue  # a stage without a head
            x = [record[key] for record in updates]
            color = colormaps["viridis"](0.85 * index / max(len(stages) - 1, 1))  # from dark to light with the depth
            axes.plot(x, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(x, _smooth(losses), color=color, linewidth=1.6, label=f"exit after block {last_block}")
            for place, nll, record in points:
                marker = markers[record["evaluation"]]
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

    with whole_file.replacing(Path(path_png)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _exit_number(entries: Sequence[Record], stage: int, key: str) -> float:
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


def _console() -> Console:
    # rich takes FORCE_COLOR for a terminal; colours may be wanted in a file, a display that redraws itself is not.
    return Console(force_interactive=None if sys.stdout.isatty() else False)


def _print_line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)  # a Text: brackets and colons in a message mean nothing


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 or math.isnan(value) else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.0f} MB" if value < 1e10 else f"{value / 1e9:.1f} GB"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
