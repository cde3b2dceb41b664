"""Training, from start to end: check, start, then update after update: report, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lptransformer import hub
from lptransformer.config.epochs import steps
from lptransformer.config.schema import Config
from lptransformer.engine.interface import TrainingEngine
from lptransformer.engine.optimizer import DECAYING, decay_steps, learning_rate_after
from lptransformer.engine.p2p import Control
from lptransformer.engine.process_groups import World, translate_lost_processes
from lptransformer.errors import LostProcessError, RunError, TakenOverError, TrainingError
from lptransformer.processes import command_of_run, forget_launchers, launched_rank, on_stop_signals
from lptransformer.run_folder import checkpoint, history, layout, lock
from lptransformer.run_folder.profile import Profiler
from lptransformer.run_folder.trackers import check_installed
from lptransformer.store import several_hosts
from lptransformer.training.build import start
from lptransformer.training.memory import as_resumed
from lptransformer.training.reporter import Reporter

FAILED_KEY = "failed"  # in the store: a process has failed, and was not lost


def train(
    config: Config,
    resume: bool = False,
    overwrite: bool = False,
    until: int | None = None,
    force: bool = False,
    step: int | None = None,
) -> None:
    """Train as configured, in the run folder `config.run.dir`; every process of the run calls this.

    With `until` the run stops after that update, evaluated and saved, and can be resumed: learning rate and all else
    go by train.steps. With `force` it starts even where the memory will not do. What is resumed goes on from the newest
    checkpoint that is whole, or from that after `step` updates; newer ones are set aside.
    Raises UserError before anything is written when the run cannot start, TrainingError when it cannot go on.
    """
    with contextlib.ExitStack() as until_the_end:
        train_in_folder(config, resume, overwrite, until, force, step, until_the_end)


def train_in_folder(
    config: Config,
    resume: bool,
    overwrite: bool,
    until: int | None,
    force: bool,
    step: int | None,
    until_the_end: contextlib.ExitStack,
) -> None:
    """`train`, which holds its folder until the end."""
    assert config.run.dir is not None
    folder = Path(config.run.dir)
    if launched_rank() == 0:
        check_installed(config.run.trackers)
        lock.check_free(folder)
        if resume:  # before anything is counted in what a hub gives
            hub.keep_to(history.hub_commits(folder))
        layout.check(folder, as_resumed(config) if resume else config, resume, overwrite, step)
    engine, data, config, resumed = start(config, resume, force, step=step)
    with engine.world.starting():  # a run folder appears only when every process has got this far
        layout.check_until(config, until, resume=False)  # of train.epochs the number is known now
        if several_hosts(engine.world.size):
            check_shared(folder, engine.world)
        if resumed is not None:
            layout.check_data(folder, data.folders())
            hold(folder, engine, until_the_end)
            engine.load_checkpoint(folder, resumed)
    if resumed is None:
        hold(folder, engine, until_the_end)
    said: list[str] = []
    if engine.world.global_rank == 0:
        if resume:
            checkpoint.remove_unfinished(folder)
            aside = checkpoint.set_aside_newer(folder, engine.update)
            said = [f"what was saved later is set aside: {one}" for one in aside]
            said += rate_from_here(layout.read_config(folder), config, engine.update)
            said = layout.note_resume(folder, config, engine.update, data.folders()) + said
        else:
            assert engine.describe_run is not None
            engine.describe_run(folder, overwrite)
    reporter = Reporter(engine, config, data, folder, resume, until, said)
    rank, device = engine.world.global_rank, engine.world.device
    profiler = Profiler(folder, config.run.profile, rank, device, engine.may_commit, engine.on_problem)

    def is_done(first: int) -> bool:
        """On global rank 0, when all reports are there: the first so many updates, with the evaluation after them."""
        return engine.update >= first and not layout.owed(folder, config, engine.update, until)

    with (
        noting_the_end(engine, folder, lambda: is_done(reporter.last_update)),
        translate_lost_processes(),
        reporter,
        profiler,
        stopping_cleanly(engine),
    ):
        # Before training, or what a run owes that ended between a save and the evaluation after it.
        owed, reporter.last_update = json.loads(engine.world.decided_by_the_first("owed", reporter.at_the_start))
        cut_short = not evaluate(engine, reporter, owed)
        if cut_short and not resume:
            engine.save_checkpoint(folder)
        while engine.update < reporter.last_update and not cut_short:
            engine.request(due(config, engine.update + 1, until) | reporter.enough(engine))
            with profiler.of(engine.update + 1):
                result = reporter.watch(engine.train_batch)
            reporter.take(result.reports)
            if result.control & Control.SAVE:
                engine.save_checkpoint(folder)
            if result.control & Control.STOP:  # what is made is safe before the last evaluation, which may be long
                reporter.take(engine.settle())
            if result.control & Control.EVALUATE:
                cut_short = not evaluate(engine, reporter, engine.valid)
                if cut_short and not result.control & Control.SAVE:  # a resume begins with what is owed here
                    engine.save_checkpoint(folder)
            if result.control & Control.STOP:
                break
        profiler.end()
        reporter.take(engine.close())
        reporter.check_saved(engine.update)
        complete = engine.world.global_rank == 0 and is_done(reporter.steps)
        if config.run.export is not None and complete:
            for line in export(folder, config.run.export):
                reporter.progress.message(line)
    reporter.say_what_is_next(engine.update, complete)


def hold(folder: Path, engine: TrainingEngine, until_the_end: contextlib.ExitStack) -> None:
    """Every process of a start holds the run folder: global rank 0 takes it, the others hear of that and join it.

    Raises RunError where another run is at work there.
    """
    taken: list[lock.Hold] = []

    def begin() -> str:
        taken.append(lock.begin(folder))
        return taken[0].start

    with translate_lost_processes():
        started = engine.world.decided_by_the_first("hold", begin)
    own = taken[0] if taken else lock.join(folder, started)
    until_the_end.enter_context(own.file)
    engine.may_commit, engine.generation = own.check, own.generation


def rate_from_here(before: Config, now: Config, update: int) -> list[str]:
    """A line where the learning rate after `update` is not what it would have been, also where train.steps says so."""
    were = steps(before)
    old = learning_rate_after(before.train, were, min(update, were))
    new = learning_rate_after(now.train, steps(now), update)
    if old == new:
        return []
    train, many = now.train, steps(now)
    decay = f", its last {decay_steps(train, many)} updates decaying" if train.lr_scheduler == DECAYING else ""
    return [
        f"the learning rate after update {update} goes from {old:.3g} to {new:.3g}, and on as {train.lr_scheduler} "
        f"with its peak at {train.learning_rate:g} and its end at update {many}{decay}"
    ]


def evaluate(engine: TrainingEngine, reporter: Reporter, names: Iterable[str]) -> bool:
    """These validation sets, in every process; False where a stop has cut it short, in every process alike."""
    for name in names:
        with reporter.evaluating(name) as advance:
            reports = engine.eval_batch(name, advance)
        reporter.take(reports)
        if engine.cut_short:
            return False
    return True


def export(folder: Path, out: str) -> list[str]:
    """The finished run's model, by the command for that in a process of its own: training imports no evaluation.

    Returns what it says. Raises TrainingError where it fails.
    """
    command = [sys.executable, "-m", "lptransformer", "export", str(folder), out]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    if done.returncode != 0:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1].removeprefix("lptransformer: ")
        raise TrainingError(f"the run is finished and saved, but not exported to run.export = {out}: {why}")
    return done.stdout.splitlines()


def check_shared(folder: Path, world: World) -> None:
    """Whether all hosts of a run see its folder as one: every process calls this. Raises RunError in all of them."""
    host, store = socket.gethostname(), world.store
    if world.global_rank == 0:
        parent = next(path for path in folder.absolute().parents if path.is_dir())
        with tempfile.NamedTemporaryFile(prefix=".lptransformer-", dir=parent) as mark:
            store.set("shared folder", mark.name)
            answers = [json.loads(store.get(f"sees folder/{other}")) for other in range(1, world.size)]
        blind = list(dict.fromkeys(name for name, sees in answers if not sees))
        store.set("folder is shared", f"{', '.join(blind)} does not see what {host} writes there" if blind else "")
    else:
        sees = Path(store.get("shared folder").decode()).exists()
        store.set(f"sees folder/{world.global_rank}", json.dumps([host, sees]))
    if problem := store.get("folder is shared").decode():
        raise RunError(f"run.dir is {folder}: {problem}; give a folder on a disk that all hosts share")


def due(config: Config, update: int, until: int | None = None) -> Control:
    """What follows an update, as configured. The last update, or that of `until`, is followed by everything."""
    if update >= (until or steps(config)):
        return Control.EVALUATE | Control.SAVE | Control.STOP
    control = Control.EVALUATE if layout.is_evaluated(config, update, until) else Control.NOTHING
    if config.checkpoint.every and update % config.checkpoint.every == 0:
        control |= Control.SAVE
    return control


@contextlib.contextmanager
def noting_the_end(engine: TrainingEngine, folder: Path, is_done: Callable[[], bool]) -> Iterator[None]:
    """How a run has ended stands in its folder, written last. Global rank 0 alone asks whether it is done."""
    first, how = engine.world.global_rank == 0, "failed"
    if first:
        history.forget_end(folder)
    try:
        yield
        how = "finished" if first and is_done() else "stopped"
    except TrainingError as error:
        engine.may_commit()  # where another start has taken over, that is why the others have gone
        how = error.how
        raise
    finally:
        with contextlib.suppress(dist.DistError):  # the store may have gone
            if how == "failed" and not first:  # the others only see that this process goes
                engine.world.store.set(FAILED_KEY, "")
            if how == LostProcessError.how and first and engine.world.store.check([FAILED_KEY]):
                how = "failed"
        with contextlib.suppress(TakenOverError):
            if first:
                engine.may_commit()
                history.note_end(folder, how, engine.update, command_of_run())


@contextlib.contextmanager
def stopping_cleanly(engine: TrainingEngine) -> Iterator[None]:
    """SIGTERM, Ctrl-C and a closed terminal save and stop after the update under way; a third Ctrl-C ends the process
    at once."""
    interrupts = 0

    def stop(signum: int, frame: Any) -> None:
        nonlocal interrupts
        engine.request(Control.SAVE | Control.STOP, urgent=True)
        interrupts += signum == signal.SIGINT
        if interrupts == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # works inside a wait, where no handler of Python's runs

    with on_stop_signals(stop):
        try:
            yield
        finally:
            forget_launchers()
