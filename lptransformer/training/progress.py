"""What a person sees of a run while it trains.

The rows are those of lptransformer.run_folder.metrics. Where the output is not a terminal everything is plain lines.
"""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lptransformer.console import achieved, clock, megabytes, print_line, short_number, standard_console
from lptransformer.run_folder.metrics import MetricsRow, Stages


class Progress:
    """The display of a run of `total_updates` updates, as a context manager on global rank 0.

    In a terminal: a bar, a row per stage, and messages above them. Elsewhere: plain lines, the first and the last
    update and in between at most one every `interval_seconds`, every evaluation and every message.
    """

    def __init__(
        self,
        total_updates: int,
        stages: Stages,
        console: Console | None = None,
        interval_seconds: float = 5.0,
    ) -> None:
        self.total_updates = total_updates
        self.stages = stages
        self.console = console or standard_console()
        self.interval_seconds = interval_seconds
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first update of this process and when it was done
        self._updated = self._started
        self._row: MetricsRow | None = None
        self._printed_update: int | None = None
        self._printed_at = -math.inf
        self._skipped = {stage: 0 for stage, _, _ in stages}
        self._skipped_since_line: set[int] = set()
        self._evaluations: dict[str, MetricsRow] = {}

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.console.is_interactive:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._row is not None and self._printed_update != self._row["update"]:
            self._print_update(self._row)

    def update(self, row: MetricsRow) -> None:
        """Show the row of an update."""
        now = time.monotonic()
        self._first = self._first or (row["update"], now)
        self._row, self._updated = row, now
        for entry in row["stages"]:
            if entry["skipped"]:
                self._skipped[entry["stage"]] += 1
                self._skipped_since_line.add(entry["stage"])
        last = row["update"] == self.total_updates
        if self._live is None and (last or now - self._printed_at >= self.interval_seconds):
            self._print_update(row)

    def evaluation(self, row: MetricsRow) -> None:
        """Show the row of an evaluation."""
        # A new dictionary: the thread that redraws the display may be walking through the old one.
        self._evaluations = self._evaluations | {row["evaluation"]: row}
        if self._live is None:
            exits = row["exits"]
            parts = [
                f"evaluation {row['update']}/{self.total_updates}",
                row["evaluation"],
                "nll " + " ".join(f"{e['nll_per_token']:.3f}" for e in exits),
                "perplexity " + " ".join(_perplexity(e["perplexity"]) for e in exits),
                "bits/byte " + " ".join(f"{e['bits_per_byte']:.3f}" for e in exits),
            ]
            print_line(self.console, "  ".join(parts))

    def message(self, text: str) -> None:
        """Print a line, above the display where there is one."""
        print_line(self.console, text)

    def _print_update(self, row: MetricsRow) -> None:
        self._printed_update, self._printed_at = row["update"], time.monotonic()
        print_line(self.console, self._line(row))
        self._skipped_since_line.clear()

    def _line(self, row: MetricsRow) -> str:
        entries = row["stages"]
        parts = [
            f"update {row['update']}/{self.total_updates}",
            "loss " + " ".join(_optional(e["loss"], ".3f") for e in entries),
            "grad " + " ".join(_optional(e["grad_norm"], ".2g") for e in entries),
            f"lr {row['learning_rate']:.1e}",
            _speed(row),
            f"eta {clock(self._remaining_seconds())}",
            "idle " + " ".join(f"{e['idle_share']:.0%}" for e in entries),
            megabytes(max(e["memory_bytes"] for e in entries)),
        ]
        if self._skipped_since_line:
            parts.append("SKIPPED by stage " + ", ".join(map(str, sorted(self._skipped_since_line))))
        return "  ".join(parts)

    def _remaining_seconds(self) -> float:
        """At the speed of this process since its first update, which is slower than the others; nan if unknown."""
        if self._row is None or self._first is None:
            return math.nan
        remaining: int = self.total_updates - self._row["update"]
        if remaining <= 0:
            return 0.0
        first_update, first_done = self._first
        done: int = self._row["update"] - first_update
        if done == 0:
            return remaining * (first_done - self._started)
        per_update = (self._updated - first_done) / done
        return max(0.0, remaining * per_update - (time.monotonic() - self._updated))

    def _render(self) -> RenderableType:
        tables = [self._render_stages()] + ([self._render_evaluations()] if self._evaluations else [])
        return Group(self._render_bar(), Columns(tables, padding=(0, 3)))  # side by side where the terminal is wide

    def _render_bar(self) -> RenderableType:
        done = self._row["update"] if self._row else 0
        speed = _speed(self._row) if self._row else "starting"
        elapsed, eta = clock(time.monotonic() - self._started), clock(self._remaining_seconds())
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(
            Text(f"update {done}/{self.total_updates}", style="bold"),
            ProgressBar(total=max(self.total_updates, 1), completed=done),
            Text(f"{speed}  {elapsed} elapsed  eta {eta}"),
        )
        return grid

    def _render_stages(self) -> Table:
        entries = {entry["stage"]: entry for entry in self._row["stages"]} if self._row else {}
        grid = Table(box=None, padding=(0, 1), header_style="dim")
        for name in ("stage", "blocks", "loss", "grad norm", "lr", "memory", "idle", "skipped"):
            grid.add_column(name, justify="right", no_wrap=True)
        for stage, first, last in self.stages:
            cells = [str(stage), f"{first}-{last}" if last > first else str(first)]
            entry = entries.get(stage)
            if entry and self._row:
                cells += [
                    _optional(entry["loss"], ".3f"),
                    _optional(entry["grad_norm"], ".2g"),
                    f"{self._row['learning_rate']:.1e}",
                    megabytes(entry["memory_bytes"]),
                    f"{entry['idle_share']:.0%}",
                ]
            else:
                cells += ["-"] * 5
            grid.add_row(*cells, str(self._skipped[stage]), style="bold red" if entry and entry["skipped"] else None)
        return grid

    def _render_evaluations(self) -> Table:
        grid = Table(box=None, padding=(0, 1), header_style="dim")
        grid.add_column("nll / perplexity of exit", justify="right", no_wrap=True)
        for name, row in self._evaluations.items():
            grid.add_column(Text(f"{name} @{row['update']}"), justify="right", no_wrap=True)
        for stage, _, last in self.stages:
            cells = [f"after block {last}"]
            for row in self._evaluations.values():
                exits = [e for e in row["exits"] if e["stage"] == stage]
                cells += [f"{e['nll_per_token']:.3f} / {_perplexity(e['perplexity'])}" for e in exits] or ["-"]
            grid.add_row(*cells)
        return grid


def _speed(row: MetricsRow) -> str:
    of_process = achieved(row.get("tflops_per_process"), row.get("mfu"))
    return "  ".join([f"{short_number(row['tokens_per_second'])} tok/s", *of_process])


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 or math.isnan(value) else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"
