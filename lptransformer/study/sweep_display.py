"""What a person sees of a sweep: one display for all runs in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WAITING, RUNNING, STOPPED = "waiting", "running", "stopped"
AT_RUNG = "at a rung"  # until the other runs of its method are there too
DONE, DROPPED, FAILED = "done", "dropped", "failed"


@dataclass
class RunState:
    """Where a run of a sweep is. `target` is the update it is to reach next, `score` its last one, None before."""

    name: str
    method: str
    status: str = WAITING
    updates: int = 0
    target: int = 0
    score: float | None = None
    score_update: int = 0
    error: str = ""

    @property
    def shown_score(self) -> str:
        return "-" if self.score is None else f"{self.score:.4f}"

    @property
    def finite_score(self) -> float:
        return math.inf if self.score is None or not math.isfinite(self.score) else self.score


class SweepDisplay:
    """Shows `states`, which the caller keeps up to date; a context manager.

    `planned` are the updates of the whole sweep. In a terminal: a bar, the running runs, the best run of every
    method. Elsewhere a line per event, and one about everything every `interval_seconds`.
    """

    def __init__(
        self,
        states: Mapping[str, RunState],
        planned: int,
        console: Console | None = None,
        interval_seconds: float = 60.0,
    ) -> None:
        self.states = states
        self.planned = planned
        self.console = console or Console(force_interactive=None if sys.stdout.isatty() else False)
        self.interval_seconds = interval_seconds
        self._started = self._printed = time.monotonic()
        self._before = sum(state.updates for state in states.values())
        self._live: Live | None = None

    def __enter__(self) -> SweepDisplay:
        if self.console.is_interactive:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """A line about something that has happened, above the display where there is one."""
        self.console.print(Text(text), soft_wrap=True)

    def tick(self) -> None:
        """Call this now and then: where there is no terminal it prints a line when one is due."""
        if self._live is None and time.monotonic() - self._printed >= self.interval_seconds:
            self._printed = time.monotonic()
            self.event(self.line())

    def line(self) -> str:
        running = [f"{s.name} {s.updates}/{s.target}" for s in self.states.values() if s.status == RUNNING]
        return "  ".join([self._counts(), f"eta {self._eta()}", *running])

    def _counts(self) -> str:
        counts = Counter(state.status for state in self.states.values())
        shown = [status for status in (DONE, DROPPED, RUNNING, AT_RUNG, WAITING, STOPPED, FAILED) if counts[status]]
        return f"{len(self.states)} runs: " + ", ".join(f"{counts[status]} {status}" for status in shown)

    def _updates(self) -> int:
        return sum(state.updates for state in self.states.values())

    def _eta(self) -> str:
        """At the speed of all runs together since the start."""
        done, seconds = self._updates() - self._before, time.monotonic() - self._started
        if done <= 0:
            return "--:--"
        missing = sum(state.target - state.updates for state in self.states.values() if state.status == FAILED)
        minutes = round(max(0, self.planned - self._updates() - missing) * seconds / done / 60)
        return f"{minutes // 60}:{minutes % 60:02} h"

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        progress = ProgressBar(total=max(self.planned, 1), completed=self._updates())
        bar.add_row(Text(self._counts(), style="bold"), progress, Text(f"eta {self._eta()}"))
        running = Table(box=None, padding=(0, 1), header_style="dim")
        for name in ("running", "update", "score"):
            running.add_column(name, justify="left" if name == "running" else "right", no_wrap=True)
        for state in self.states.values():
            if state.status == RUNNING:
                running.add_row(Text(state.name), f"{state.updates}/{state.target}", state.shown_score)
        best = Table(box=None, padding=(0, 1), header_style="dim")
        for name in ("best so far", "score", "run", "at update"):
            best.add_column(name, justify="right" if name in ("score", "at update") else "left", no_wrap=True)
        for method, state in self.best().items():
            best.add_row(Text(method), state.shown_score, Text(state.name), str(state.score_update))
        return Group(bar, running, best)

    def best(self) -> dict[str, RunState]:
        """The run with the lowest score of every method that has one."""
        found: dict[str, RunState] = {}
        for state in self.states.values():
            if math.isfinite(state.finite_score) and (
                state.method not in found or state.finite_score < found[state.method].finite_score
            ):
                found[state.method] = state
        return found
