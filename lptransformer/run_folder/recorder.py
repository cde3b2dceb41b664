"""Writes down what one process does in some updates: every action, when it began and ended, how long it waited.

The times are the host's, with no synchronisation: on a GPU a forward pass ends when its kernels are queued, and the
host waits for them wherever it next needs a result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

COPIES = "copies"  # taking and sending read-only copies of weights: around the actions of an update
DIGITS = 7  # of seconds: a tenth of a microsecond


class Recorder:
    """The actions of the updates `first` to `last` (counted from 1) on this process.

    `waited` gives the seconds that the process has waited so far.
    """

    def __init__(self, first: int, last: int, waited: Callable[[], float]) -> None:
        self.first, self.last = first, last
        self.actions: list[list[Any]] = []  # of the update under way: [text, start, end, waited, in the head]
        self._waited = waited
        self._to_wall_clock = _seconds_to_wall_clock()
        self._started = 0.0
        self._head_started, self._head_seconds = 0.0, 0.0

    def wants(self, update: int) -> bool:
        return self.first <= update <= self.last

    def begin(self, started: float) -> None:
        """An update begins, at this time of perf_counter."""
        self.actions, self._started = [], started

    @property
    def started(self) -> float:
        """When the update under way began, by the wall clock. Processes on one machine agree on it."""
        return self._started + self._to_wall_clock

    @contextlib.contextmanager
    def action(self, text: str) -> Iterator[None]:
        """Around an action."""
        waited, head, start = self._waited(), self._head_seconds, time.perf_counter() - self._started
        yield
        end = time.perf_counter() - self._started
        numbers = (start, end, self._waited() - waited, self._head_seconds - head)
        self.actions.append([text, *(round(number, DIGITS) for number in numbers)])

    def watch_head(self, head: Any) -> None:
        """Tell the time in a head's forward pass, its loss and the gradient of its loss, from that of the blocks."""
        head.register_forward_pre_hook(self._head_begins)
        head.register_forward_hook(self._head_ends)

    def _head_begins(self, *_: Any) -> None:
        self._head_started = time.perf_counter()

    def _head_ends(self, *_: Any) -> None:
        self._head_seconds += time.perf_counter() - self._head_started


def _seconds_to_wall_clock() -> float:
    """What is added to perf_counter: of several readings the one that least came between."""
    readings = []
    for _ in range(10):
        before, wall, after = time.perf_counter(), time.time(), time.perf_counter()
        readings.append((after - before, wall - (before + after) / 2))
    return min(readings)[1]
