"""What torch's profiler saw of some updates of a process: `run.profile`.

`profile/update-<first>-<last>-rank-<global rank>.json.gz` is in the Trace Event Format, as torch writes it: operations,
on a GPU its kernels and copies, and the actions of the schedule by their text (docs/design.md). What happens between
the updates (evaluations, saves) is in it too.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from lptransformer import files
from lptransformer.run_folder.layout import PROFILE


class Profiler:
    """Profiles the updates from the first to the last of `updates` (counted from 1; None: none) of this process.

    A context manager: after an error nothing is written. Where a run ends among the updates, `end` writes those that it
    has made. `may_commit` is asked before; `on_problem` hears of a file that could not be written, and the run goes on.
    Outside of these updates there is no profiler.
    """

    def __init__(
        self,
        folder: Path,
        updates: Sequence[int] | None,
        global_rank: int,
        device: torch.device,
        may_commit: Callable[[], None],
        on_problem: Callable[[str], None],
    ) -> None:
        self.folder, self.global_rank, self.may_commit, self.on_problem = folder, global_rank, may_commit, on_problem
        self.wanted = range(updates[0], updates[1] + 1) if updates else range(0)
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._running: profile | None = None
        self._done: list[int] = []

    @contextlib.contextmanager
    def of(self, update: int) -> Iterator[None]:
        """Around an update."""
        if update not in self.wanted:
            yield
            return
        if self._running is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its library writes lines into the display of a run
            self._running = profile(activities=self._activities)
            self._running.start()
        yield
        self._done.append(update)
        if update == self.wanted[-1]:
            self.end()

    def end(self, write: bool = True) -> None:
        """The profiler ends, where one is at work; `write`: its file is on the disk when this returns."""
        running, done, self._running, self._done = self._running, self._done, None, []
        if running is None:
            return
        running.stop()
        if not (done and write):
            return
        self.may_commit()
        path = self.folder / PROFILE / f"update-{done[0]}-{done[-1]}-rank-{self.global_rank}.json.gz"
        try:
            files.make_folders(path.parent)
            with files.replacing(path) as packed, tempfile.TemporaryDirectory() as scratch:
                plain = Path(scratch, "trace.json")
                running.export_chrome_trace(str(plain))
                with plain.open("rb") as source, gzip.open(packed, "wb") as target:
                    shutil.copyfileobj(source, target)
        except OSError as error:
            self.on_problem(f"{path} could not be written: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.end(write=kind is None)
