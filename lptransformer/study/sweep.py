"""A sweep: many runs, a few at a time, each in a process of its own. Stopped, it can be started again.

What a run has done is read from its folder alone, so a sweep that is started again continues where every run is. In its
folder: the runs, each with train.log and record.json; status.json (where every run is, why one failed); records.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lptransformer import files
from lptransformer.config.epochs import steps
from lptransformer.config.load import to_dict
from lptransformer.config.resume import Effect, changes
from lptransformer.console import print_table
from lptransformer.data.prepare import prepare_all
from lptransformer.errors import RunError, TrainingError, UserError
from lptransformer.processes import on_stop_signals
from lptransformer.run_folder import checkpoint, layout, lock
from lptransformer.run_folder.metrics_log import JSONL_NAME, read_metrics
from lptransformer.study import records
from lptransformer.study.collect import build
from lptransformer.study.halving import planned_updates, targets
from lptransformer.study.sweep_display import (
    AT_RUNG,
    DONE,
    DROPPED,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    RunState,
    SweepDisplay,
)
from lptransformer.study.sweep_file import Run, Sweep

STATUS = "status.json"
POLL_SECONDS, READ_SECONDS = 0.2, 1.0


def run_sweep(sweep: Sweep, processes: int = 1, dry_run: bool = False) -> None:
    """Finish every run of a sweep, `processes` of them at a time; with `dry_run` only list them.

    Raises UserError before anything starts where a run's folder or text is refused, TrainingError at the end when runs
    have failed, SystemExit(128 + signal) when a signal has stopped it.
    """
    check_folders(sweep)
    if dry_run:
        states = Supervisor(sweep, processes).states
        rows = [(name, state.status, state.updates, state.target) for name, state in states.items()]
        print_table(f"{len(rows)} runs in {sweep.folder}", ("run", "status", "updates", "until"), rows)
        return
    with alone(sweep.folder) as lock:
        sections = {json.dumps(section): section for section in (run.config.data.model_dump() for run in sweep.runs)}
        for section in sections.values():  # once, before processes that would all do it
            prepare_all(**section)
        Supervisor(sweep, processes, lock).work()


def train_command(sweep: Sweep, run: Run, flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "lptransformer", "train", str(sweep.base), *flags, *run.arguments]


class Supervisor:
    """The processes of a sweep, and what is known of its runs."""

    def __init__(self, sweep: Sweep, processes: int, lock: int | None = None) -> None:
        self.sweep = sweep
        self.processes = processes
        self.lock = lock
        self.runs = {run.name: run for run in sweep.runs}
        self.states = {run.name: RunState(run.name, run.method) for run in sweep.runs}
        self.scores: dict[str, dict[int, float]] = {}
        self.children: dict[str, tuple[subprocess.Popen[bytes], int]] = {}  # and where its part of the log begins
        self.records: dict[str, records.Record] = {}
        self.signals: list[int] = []
        self.stopped_by: int | None = None
        for run in sweep.runs:
            self._read_folder(run)
        self._decide()
        self.display = SweepDisplay(self.states, sum(map(self._planned, sweep.methods.values())))

    def work(self) -> None:
        """Until every run is done, dropped or failed, or a signal has stopped the sweep."""
        for run in self.sweep.runs:
            self._record(run, only_if_old=True)
        self._write_records()
        read = 0.0
        with on_stop_signals(lambda signum, frame: self.signals.append(signum)), self.display:
            while True:
                self._forward_signals()
                for name in [name for name, (child, _) in self.children.items() if child.poll() is not None]:
                    self._ended(self.runs[name])
                self._decide()
                waiting = [state for state in self.states.values() if state.status == WAITING]
                if self.stopped_by is None:
                    for state in waiting[: self.processes - len(self.children)]:
                        self._start(state)
                if not self.children and (self.stopped_by is not None or not waiting):
                    break
                if time.monotonic() - read >= READ_SECONDS:
                    read = time.monotonic()
                    for name in self.children:
                        self._watch(self.runs[name])
                    self._write_status()
                self.display.tick()
                time.sleep(POLL_SECONDS)
        self._write_status()
        self._conclude()

    def _conclude(self) -> None:
        for method, best in self.display.best().items():
            score = f"{best.score:.4f} nats/token on {self.sweep.score.set}"
            self.display.event(f"best of {method}: {best.name}  {score} after {best.score_update} updates")
        failed = [state for state in self.states.values() if state.status == FAILED]
        if failed:
            self.display.event(f"{len(failed)} of {len(self.states)} runs failed:")
        for state in failed:
            self.display.event(f"  {state.name} after {state.updates} updates: {state.error}")
        if self.stopped_by is not None:
            self.display.event("stopped; the same command continues from here")
            raise SystemExit(128 + self.stopped_by)
        self.display.event(f"records of all runs: {self.sweep.folder / records.RECORDS}")
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(self.states)} runs of {self.sweep.file} failed; started again, it tries them "
                "again and leaves the others alone"
            )

    # ---- what is to be done

    def _planned(self, settings: dict[str, list[str]]) -> int:
        """The updates of a method's runs."""
        if self.sweep.halving is not None:
            return planned_updates(settings, self.sweep.halving)
        return sum(steps(self.runs[name].config) for members in settings.values() for name in members)

    def _decide(self) -> None:
        """Target and status of every run that no process is working on."""
        failed = {state.name for state in self.states.values() if state.status == FAILED}
        for settings in self.sweep.methods.values():
            names = [name for members in settings.values() for name in members]
            target = {name: steps(self.runs[name].config) for name in names}
            if self.sweep.halving is not None:
                target = targets(settings, self.sweep.halving, self._score_at, failed)
            for name in names:
                state = self.states[name]
                state.target = target[name]
                if state.status in (RUNNING, FAILED, STOPPED):
                    continue
                if state.target not in self.scores[name]:
                    state.status = WAITING
                elif state.target == steps(self.runs[name].config):
                    state.status = DONE
                else:
                    state.status = DROPPED if max(target.values()) > state.target else AT_RUNG
                if self.sweep.checkpoints == "none" and state.status in (DONE, DROPPED) and self.lock is not None:
                    shutil.rmtree(self.runs[name].folder / "checkpoints", ignore_errors=True)

    def _score_at(self, name: str, update: int) -> float | None:
        return self.scores[name].get(update)

    # ---- processes

    def _start(self, state: RunState) -> None:
        run = self.runs[state.name]
        run.folder.mkdir(parents=True, exist_ok=True)
        state.updates = resumable_at(run, state.target)
        # A checkpoint at the target itself has an evaluation to make up.
        flags = ["--resume"] if state.updates else ["--overwrite"] if layout.holds_run(run.folder) else []
        flags += [f"--until={state.target}"] if state.target < steps(run.config) else []
        threads = max(1, len(os.sched_getaffinity(0)) // (self.processes * run.processes))
        with (run.folder / LOG).open("ab") as log:
            begin = log.tell()
            child = subprocess.Popen(
                train_command(self.sweep, run, flags),
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to the sweep alone, which hands it on
                pass_fds=() if self.lock is None else (self.lock,),
            )
        self.children[state.name] = (child, begin)
        state.status = RUNNING
        verb = f"resumed after update {state.updates}" if state.updates else "started"
        self.display.event(f"{state.name}: {verb}, until update {state.target}")

    def _ended(self, run: Run) -> None:
        child, begin = self.children.pop(run.name)
        state = self.states[run.name]
        try:
            self._read_folder(run)
        except UserError as error:
            state.error = str(error)
        if state.target in self.scores[run.name]:
            state.status, state.error = WAITING, ""  # _decide knows what is next
            self.display.event(f"{run.name}: {state.shown_score} nats/token after {state.target} updates")
        elif self.stopped_by is not None:
            state.status = STOPPED
        else:
            state.status = FAILED
            state.error = last_words(run.folder / LOG, begin, child.returncode)
            self.display.event(f"{run.name}: FAILED after {state.updates} updates: {state.error}")
        self._record(run)
        self._write_records()
        if self.sweep.checkpoints == "last" and (kept := resumable_at(run, sys.maxsize)):
            for folder in (run.folder / "checkpoints").glob("step-*"):
                if folder.name != f"step-{kept:08d}":
                    shutil.rmtree(folder)

    def _forward_signals(self) -> None:
        """Every Ctrl-C and SIGTERM goes to every run: the first makes it save and stop, a third Ctrl-C ends it."""
        while self.signals:
            signum = self.signals.pop(0)
            if self.stopped_by is None:
                self.display.event(f"stopping: {len(self.children)} runs save what they have")
            self.stopped_by = signum
            for child, _ in self.children.values():
                child.send_signal(signum)

    # ---- what is known

    def _read_folder(self, run: Run) -> None:
        state = self.states[run.name]
        self.scores[run.name] = {}
        self.scores[run.name] = of_run = scores(run, self.sweep)
        state.updates = max(newest(run, self.sweep)[0], *of_run, 0)
        if of_run:
            state.score_update = max(of_run)
            state.score = of_run[state.score_update]

    def _watch(self, run: Run) -> None:
        state = self.states[run.name]
        update, score = newest(run, self.sweep)
        state.updates = max(update, state.updates)
        if score is not None:
            state.score, state.score_update = score, state.updates

    def _record(self, run: Run, only_if_old: bool = False) -> None:
        """record.json of a run, where it has got anywhere."""
        path, metrics = run.folder / records.RECORD, run.folder / JSONL_NAME
        if only_if_old and path.is_file() and metrics.is_file() and path.stat().st_mtime >= metrics.stat().st_mtime:
            with contextlib.suppress(UserError):  # of another format: regenerated
                self.records[run.name] = records.read(path)[0]
                return
        paths = ("data.", "run.", "model.pretrained")
        overrides = {key: value for key, value in run.overrides.items() if not key.startswith(paths)}
        identity = {"name": run.name, "method": run.method, "overrides": overrides, "score": asdict(self.sweep.score)}
        with contextlib.suppress(UserError):  # it has not got anywhere yet
            self.records[run.name] = build(run.folder, {**identity, "processes_at_once": self.processes})
            records.write(path, self.records[run.name])

    def _write_records(self) -> None:
        """All records in one file, in the order of the runs."""
        in_order = [self.records[name] for name in self.runs if name in self.records]
        records.write(self.sweep.folder / records.RECORDS, in_order)

    def _write_status(self) -> None:
        text = json.dumps({name: asdict(state) for name, state in self.states.items()}, indent=1) + "\n"
        files.write_text(self.sweep.folder / STATUS, text)


LOG, LOCK = "train.log", "sweep.lock"
_TAIL_BYTES = 2**16


def check_folders(sweep: Sweep) -> None:
    """Raises RunError for the first run whose folder holds a run with another configuration, or one that has gone
    beyond a rung (or the end) without a score there, which only training it again could give."""
    for run in sweep.runs:
        if not (run.folder / layout.CONFIG).is_file():
            continue
        changed = changes(to_dict(layout.read_config(run.folder)), to_dict(run.config))
        differences = [change.line for change in changed if change.effect is not Effect.NOTHING]
        if differences:
            raise RunError(
                f"{run.folder} holds another run: {'; '.join(differences)}. Remove it, or give the sweep another dir"
            )
        known, ends = scores(run, sweep), [*(sweep.halving.updates if sweep.halving else ()), steps(run.config)]
        if passed := [end for end in ends if end not in known and end < max(known, default=0)]:
            raise RunError(
                f"{run.folder} was scored after {max(known)} updates, and not after {passed[0]}: give halving.updates "
                "and train.steps as they were, or the sweep another dir"
            )


def scores(run: Run, sweep: Sweep) -> dict[int, float]:
    """The score at every update after which a run was evaluated on all its validation sets."""
    if not (run.folder / JSONL_NAME).is_file():
        return {}
    found: dict[int, dict[str, float]] = {}
    for row in read_metrics(run.folder):
        if "evaluation" in row:
            found.setdefault(row["update"], {})[row["evaluation"]] = _loss(row["exits"], sweep)
    sets = set(run.config.data.valid_names)
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
                row = json.loads(line)
                if "stages" in row:
                    update = row["update"]
                elif row["evaluation"] == sweep.score.set:
                    score = float(_loss(row["exits"], sweep))
    return update, score


def resumable_at(run: Run, target: int) -> int:
    """The newest checkpoint up to update `target`; 0 where there is none."""
    if not (run.folder / layout.CONFIG).is_file():
        return 0
    return max((update for update in checkpoint.complete_updates(run.folder) if update <= target), default=0)


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
    in the folder: the lock is free when the last of them has closed it, so the runs of a sweep that was killed keep
    it. Raises RunError where another sweep, or a run of one, is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        if lock.take(file) is False:
            raise RunError(f"{folder}: a sweep is at work there, or runs that one has started: wait for them")
        yield file.fileno()
