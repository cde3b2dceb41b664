"""What all commands print: tables, lines, bars with the time that is left, numbers with units."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

BAR_AFTER_SECONDS = 2.0  # what takes no longer needs no bar


def standard_console() -> Console:
    """Standard output."""
    # rich takes FORCE_COLOR for a terminal; colours may be wanted in a file, a display that redraws itself is not.
    return Console(force_interactive=None if sys.stdout.isatty() else False)


def print_line(console: Console, text: str) -> None:
    """A line of text as it is, however long."""
    console.print(Text(text), soft_wrap=True)  # a Text: brackets and colons in a message mean nothing


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    console: Console | None = None,
    styles: Sequence[str] | None = None,
) -> None:
    """Print a table: lines of aligned columns where the output is not a terminal. Numbers are set right, floats
    with three decimals; None is shown as "-". `styles` are rich's, one for every row."""
    console = console or standard_console()
    cells = [[_cell(value) for value in row] for row in rows]
    right = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(columns))]
    if console.is_interactive:
        shown = Table(title=Text(title), title_justify="left")
        for name, is_number in zip(columns, right, strict=True):
            shown.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
        for row, style in zip(cells, styles or [""] * len(cells), strict=True):
            shown.add_row(*map(Text, row), style=style)
        console.print(shown)
        return
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    print_line(console, title)
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        aligned = [
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(line, widths, right, strict=True)
        ]
        print_line(console, "  ".join(aligned).rstrip())


@contextlib.contextmanager
def bar(
    what: str, total: int, *, in_bytes: bool = False, shown: bool = True, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """A progress bar named `what`, with the time left, for what takes over two seconds; yields the function that
    advances it. Only on a terminal, by default that of stderr."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    if not (shown and console.is_terminal):
        yield lambda done: None
        return
    progress = Progress(*columns, console=console)
    task = progress.add_task(what, total=total)
    timer = threading.Timer(BAR_AFTER_SECONDS, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done: progress.advance(task, done)
    finally:
        timer.cancel()
        timer.join()  # it may be starting the bar
        progress.stop()


def short_number(value: float) -> str:
    """A large number with one decimal and a unit: 12.3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def achieved(tflops_per_process: float | None, mfu: float | None) -> list[str]:
    """What is known of the FLOP/s of a process, and of their share of the peak."""
    known = [] if tflops_per_process is None else [f"{tflops_per_process:.3g} TFLOP/s"]
    return known if mfu is None else [*known, f"MFU {mfu:.1%}"]


def megabytes(value: int) -> str:
    """Bytes in MB, or in GB from 10 GB on."""
    return f"{value / 1e6:.0f} MB" if value < 1e10 else f"{value / 1e9:.1f} GB"


def clock(seconds: float) -> str:
    """Seconds as minutes and hours; --:-- where they are not known."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
