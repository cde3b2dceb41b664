"""What torch's allocator had given out, moment by moment, to the byte: how peak memory is measured, on a CPU too.

The memory of a process (RSS) says little about a training step: the allocator of C keeps what was freed, and pages
that were never written do not count. Here every allocation and release of torch's own CPU allocator is logged by its
profiler, what kernels take for a moment included. Memory from elsewhere (numpy, MKL's scratch) is not seen.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "lptransformer mark "


@dataclass
class Allocations:
    """Bytes alive over time, counted from the beginning of `log_allocations`; readable after its end."""

    _marks: list[tuple[str, int]] = field(default_factory=list)  # name, ns
    _times: list[int] = field(default_factory=list)
    _alive: list[int] = field(default_factory=list)  # after the change at that time

    @staticmethod
    def mark(name: str) -> None:
        """Give this moment a name; the same name can be given again."""
        with record_function(_MARK + name):
            pass

    def names(self) -> list[str]:
        """The marks, in order of time."""
        return [name for name, _ in self._marks]

    def alive(self, number: int) -> int:
        """Bytes alive at the mark of that number."""
        before = bisect.bisect_right(self._times, self._marks[number][1])
        return self._alive[before - 1] if before else 0

    def peak(self, number: int, until: int | None = None) -> int:
        """The most bytes alive at once from one mark to another (by number), or to the end."""
        first = bisect.bisect_right(self._times, self._marks[number][1])
        last = len(self._times) if until is None else bisect.bisect_right(self._times, self._marks[until][1])
        return max([self.alive(number), *self._alive[first:last]])

    @property
    def at_the_end(self) -> int:
        return self._alive[-1] if self._alive else 0


@contextlib.contextmanager
def log_allocations(into: Allocations | None = None) -> Iterator[Allocations]:
    """Log what happens inside, on this thread and on the CPU; what was alive before is not known."""
    found = Allocations() if into is None else into
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_chatter():
        profiler.start()
    try:
        yield found
    finally:
        with _without_chatter():
            profiler.stop()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes: list[tuple[int, int]] = []
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if name == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            changes.append((event.start_ns(), event.nbytes()))  # type: ignore[attr-defined]
        elif name.startswith(_MARK):
            found._marks.append((name.removeprefix(_MARK), event.start_ns()))
    changes.sort(key=lambda change: change[0])  # stable
    found._marks.sort(key=lambda mark: mark[1])
    found._times = [time for time, _ in changes]
    found._alive = list(itertools.accumulate(size for _, size in changes))


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """The profiler's library writes a line when it starts and stops, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
