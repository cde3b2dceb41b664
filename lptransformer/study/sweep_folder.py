"""What the folders of a sweep say: how far its runs are, how they scored, why one ended. And a lock on the folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from lptransformer.config.load import resume_differences, to_dict
from lptransformer.errors import RunError
from lptransformer.run_folder import checkpoint, layout
from lptransformer.run_folder.metrics_log import JSONL_NAME, read_metrics
from lptransformer.study.sweep_file import Run, Sweep

LOG, LOCK = "train.log", "sweep.lock"
_TAIL_BYTES = 2**16


def check_folders(sweep: Sweep) -> None:
    """Raises RunError for the first run whose folder holds a run with another configuration."""
    for run in sweep.runs:
        if not (run.folder / layout.CONFIG).is_file():
            continue
        before = to_dict(layout.read_config(run.folder))
        differences = resume_differences(before, to_dict(run.config))
        if differences:
            raise RunError(
                f"{run.folder} holds another run: {'; '.join(differences)}. Remove it, or give the sweep another dir"
            )


def scores(run: Run, sweep: Sweep) -> dict[int, float]:
    """The score at every update after which a run was evaluated on all its validation sets."""
    if not (run.folder / JSONL_NAME).is_file():
        return {}
    found: dict[int, dict[str, float]] = {}
    for record in read_metrics(run.folder):
        if "evaluation" in record:
            found.setdefault(record["update"], {})[record["evaluation"]] = _loss(record["exits"], sweep)
    sets = set(run.config.data.valid)
    return {update: by_set[sweep.score.set] for update, by_set in found.items() if set(by_set) == sets}


def _loss(exits: list[dict[str, float]], sweep: Sweep) -> float:
    by_block = {one["last_block"]: one["nll_per_token"] for one in exits}
    return by_block.get(max(by_block) if sweep.score.exit_block is None else sweep.score.exit_block, math.nan)


def newest(run: Run, sweep: Sweep) -> tuple[int, float | None]:
    """While a run trains, from the end of its metrics: its last update and its last score."""
    update, score = 0, None
    with contextlib.suppress(OSError), (run.folder / JSONL_NAME).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        for line in file.read().split(b"\n"):
            with contextlib.suppress(ValueError):  # the first line and the last may be cut
                record = json.loads(line)
                if "stages" in record:
                    update = record["update"]
                elif record["evaluation"] == sweep.score.set:
                    score = float(_loss(record["exits"], sweep))
    return update, score


def resumable_at(run: Run, target: int) -> int:
    """The newest checkpoint before update `target`; 0 where there is none."""
    if not (run.folder / layout.CONFIG).is_file():
        return 0
    return max((update for update in checkpoint.complete_updates(run.folder) if update < target), default=0)


def last_words(log: Path, begin: int, returncode: int) -> str:
    """Why a process ended, from what it wrote after `begin` bytes: its error message, else its last line."""
    with log.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("lptransformer: ") for line in lines if line.startswith("lptransformer: ")]
    ended = f"ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
    return (own or lines or ["it said nothing"])[-1][:500] + f" ({ended}, {log})"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Keeps other sweeps out of a folder. Yields the lock's file descriptor, to be handed to every process that works
    in the folder: the lock is free when the last of them has closed it, so a sweep that was killed leaves its runs in
    peace. Raises RunError where somebody is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: a sweep is at work there, or runs that one has started: wait for them") from None
        yield file.fileno()
