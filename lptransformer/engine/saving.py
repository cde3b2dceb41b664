"""Checkpoints on their way to the disk: a copy in the host's memory, a thread that writes it, and the count of who is
done. The thread takes part in no communication."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lptransformer import files
from lptransformer.console import megabytes
from lptransformer.engine.process_groups import World, translate_lost_processes
from lptransformer.engine.transfers import Event, SideStream
from lptransformer.errors import RunError
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.checkpoint import Sums
from lptransformer.run_folder.metrics import SavedReport
from lptransformer.run_folder.saved_stage import StageContent


class HostCopies:
    """Buffers in the host's memory that are kept from save to save: fresh memory is four times slower to fill."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, SideStream(device)
        self._kept: dict[tuple[int, str, int], Tensor] = {}

    def of(self, stage: int, content: StageContent, keep: bool) -> StageContent:
        """The same content, copied, unless it never changes. With `keep` what the copy before it had is overwritten."""

        def copied(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if not keep:
                return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            # By their places: the names of copies on their way are those of versions, and others in every save.
            numbered = enumerate(tensors.items())
            return {name: self._copy((stage, kind, place), tensor) for place, (name, tensor) in numbered}

        with self._side:
            flat = copied("piece", content.pieces.flat)
            weights, copies = copied("weight", content.weights), copied("copy", content.copies)
        return replace(content, pieces=replace(content.pieces, flat=flat), weights=weights, copies=copies)

    def _copy(self, key: tuple[int, str, int], tensor: Tensor) -> Tensor:
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            self._kept[key] = buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._side.copy(buffer, tensor)
        return buffer

    def made(self) -> Event:
        """When the copies so far are made. The computation goes on then; the host does not wait."""
        event = self._side.event()
        event.precede(self._device)
        return event

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())


class Save:
    """One process's part of a checkpoint of `run`, written by a thread, or here and now."""

    def __init__(
        self, run: Path, update: int, global_rank: int, generation: int, may_commit: Callable[[], None]
    ) -> None:
        self.run, self.update, self.global_rank, self.generation = run, update, global_rank, generation
        self.may_commit = may_commit
        self.lost_seconds = 0.0  # what it has kept this process from training, with waiting for the save before it
        self._sums: dict[str, list[int | str]] = {}
        self._error: str | None = None
        self._thread: threading.Thread | None = None

    def write(self, replica: int, contents: Iterable[tuple[int, StageContent]]) -> None:
        """Write what this replica has of its stages, by their number."""
        try:
            files.make_folders(self.run / "checkpoints")
            for stage, content in contents:
                self.may_commit()
                free = shutil.disk_usage(self.run).free
                if free < content.num_bytes:
                    needed = f"{megabytes(content.num_bytes)} are needed for stage {stage}"
                    raise OSError(f"{megabytes(free)} are free on the disk of {self.run}, and {needed}")
                self._sums |= saved_stage.write(self.run, self.update, stage, replica, content, self.generation)
        except Exception as error:  # whatever it is, the run may go on
            self._error = f"{type(error).__name__}: {error}".removeprefix("OSError: ")

    def begin(self, replica: int, contents: Sequence[tuple[int, StageContent]], made: Event) -> None:
        """The same by a thread, when they are `made`; `contents` stay as they are until it is done."""

        def write() -> None:
            made.wait()
            self.write(replica, contents)

        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()

    def add_folder(self, folder: Path) -> None:
        """Count files of a folder of the checkpoint that somebody else has written."""
        step = checkpoint.unfinished_folder(self.run, self.update, self.generation)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._sums[path.relative_to(step).as_posix()] = files.record(path)
        files.sync_all(folder)

    @property
    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def report(self) -> SavedReport:
        """What became of it, when it is done."""
        return SavedReport(str(self.run), self.update, self.global_rank, self._sums, self.lost_seconds, self._error)


class Commits:
    """On global rank 0: what the processes have reported of their saves."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.begun: set[tuple[str, int]] = set()  # by run and update, and not finished
        self._reported: dict[tuple[str, int], list[SavedReport]] = {}
        self._failed: list[tuple[str, int]] = []

    def take(self, report: SavedReport) -> None:
        self._reported.setdefault((report.run, report.update), []).append(report)

    @property
    def waiting(self) -> bool:
        """Whether a checkpoint is written and does not count yet."""
        return any(len(reports) == self.processes for reports in self._reported.values())

    def finish(self, generation: int) -> list[str]:
        """Make those checkpoints count that all processes have written. Returns what went wrong, in words, with those
        that a process could not write: what there is of them is removed."""
        failed = []
        for (run, update), reports in list(self._reported.items()):
            if len(reports) < self.processes:
                continue
            del self._reported[run, update]
            self.begun.discard((run, update))
            wrong = next((one.error for one in reports if one.error is not None), None)
            sums: Sums = {path: record for one in reports for path, record in one.sums.items()}
            if wrong is None:
                try:
                    checkpoint.finish(run, update, sums, generation, max(one.lost_seconds for one in reports))
                except OSError as error:
                    wrong = str(error)
            if wrong is not None:
                shutil.rmtree(checkpoint.unfinished_folder(run, update, generation), ignore_errors=True)
                self._failed.append((run, update))
                failed.append(f"the checkpoint after {update} updates was not saved: {wrong}")
        return failed

    def take_failed(self) -> list[tuple[str, int]]:
        """By run and update what could not be saved since the last call."""
        taken, self._failed = self._failed, []
        return taken


def say(problem: str) -> None:
    """Tell a person who looks at the terminal."""
    print(f"lptransformer: {problem}", file=sys.stderr, flush=True)


def agreed_step(world: World, run: Path, update: int | None = None) -> int:
    """The newest checkpoint of which every process has found its share of the files whole, or that after `update`
    updates. Says on global rank 0 which are damaged.

    Every process calls this. Raises RunError, in every process, where there is none.
    """
    count = world.store.add(f"looked/{world.global_rank}", 1)
    key, damaged = f"checkpoints/{count}", list[str]()
    with translate_lost_processes():
        if world.global_rank == 0:
            there = checkpoint.complete_updates(run)[::-1]
            world.store.set(key, json.dumps(there))
        there = json.loads(world.store.get(key))
        if update is not None:
            if update not in there:
                checkpoint.find(run, update)  # which says what there is
            there = [update]
        for one in there:
            world.store.set(f"{key}/{one}/{world.global_rank}", _damage(checkpoint.folder_of(run, one), world))
            answers = [world.store.get(f"{key}/{one}/{rank}").decode() for rank in range(world.size)]
            if not any(answers):
                if damaged and world.global_rank == 0:
                    say(f"{damaged[0]}: going back to the checkpoint after {one} updates")
                return one
            damaged.append(next(answer for answer in answers if answer))
    if not damaged:
        return checkpoint.latest(run)  # which says that there is none
    raise RunError(f"{damaged[0]}: choose another checkpoint" if update is not None else f"{run}: {damaged[0]}")


def _damage(folder: Path, world: World) -> str:
    """What is wrong with this process's share of a checkpoint's files; nothing where they are good."""
    try:
        paths = sorted(checkpoint.read_sums(folder))
        checkpoint.check(folder, paths[world.global_rank :: world.size])
    except RunError as error:
        return str(error)
    return ""
