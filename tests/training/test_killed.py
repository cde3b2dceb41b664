"""Every process of a start is killed in turn: nothing is left running, the run can be resumed, the code is right.

And while one is paused, nobody else gets at its folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import small_run
import yaml
from tiers import full

from lptransformer.run_folder import checkpoint, history, layout, lock
from lptransformer.run_folder.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
pytestmark = [pytest.mark.slow]
CONFIG = {
    **small_run.CONFIG,
    "parallel": {"pipeline": 2, "timeout_seconds": 30},
    "train": {**small_run.CONFIG["train"], "steps": 1_000_000},
    "checkpoint": {"every": 5},
}
COMMANDS = {
    "command": [sys.executable, "-m", "lptransformer", "train", "c.yaml"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "29877", TRAIN, "c.yaml"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "29878", TRAIN, "c.yaml"],
}
# What a process is, by words of its command line; the first that is there counts.
KINDS = {
    "deepspeed.launcher.launch": "launcher",
    "bin/torchrun": "launcher",
    "deepspeed.launcher.runner": "runner",
    "bin/deepspeed": "runner",
    "launch/train.py": "worker",
    "lptransformer.training.launcher": "worker",
    "-m lptransformer": "command",
}


def processes(of_run: str) -> dict[str, list[psutil.Process]]:
    """The living processes of a run, whose variables carry its name, by what they are."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS.values()}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE or process.environ().get("RUN_OF_TEST") != of_run:
                continue
            line = " ".join(process.cmdline())
            if kind := next((kind for words, kind in KINDS.items() if words in line), None):
                found[kind].append(process)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "text.txt").write_text(small_run.TEXT)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    yield tmp_path
    for process in sum(processes(str(tmp_path)).values(), []):
        with contextlib.suppress(psutil.Error):
            process.kill()


def start(folder: Path, way: str, *more: str) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "RUN_OF_TEST": str(folder), "PYTHONPATH": str(ROOT)}
    log = (folder / "log.txt").open("ab")
    command = [*COMMANDS[way], *more]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(what: str, folder: Path, seconds: float, is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what}\n{(folder / 'log.txt').read_text()[-3000:]}"
        time.sleep(0.1)


LOST = ("lost a process", "failed", None)


@pytest.mark.parametrize(
    ("way", "victim", "ends", "codes"),
    [
        ("command", "command", ("stopped",), ()),
        full("command", "runner", ("stopped",), (3,)),
        full("command", "launcher", ("stopped",), (3,)),
        ("command", "worker", LOST, (1, 4)),
        ("deepspeed", "runner", ("stopped",), ()),
        full("deepspeed", "launcher", ("stopped",), ()),
        full("deepspeed", "worker", LOST, ()),
        ("torchrun", "launcher", ("stopped",), ()),
        full("torchrun", "worker", (*LOST, "stopped"), (1,)),
    ],
)
def test_nothing_is_left_and_the_run_goes_on(
    folder: Path, way: str, victim: str, ends: tuple[str | None, ...], codes: tuple[int, ...]
) -> None:
    run = folder / "run"
    started = start(folder, way)
    wait_for("no checkpoint", folder, 120, lambda: run.is_dir() and checkpoint.complete_updates(run))
    running = processes(str(folder))
    assert len(running["worker"]) == 2
    running[victim][0].send_signal(signal.SIGKILL)
    wait_for(f"left: {running}", folder, 90, lambda: not any(processes(str(folder)).values()))
    assert history.read_end(run) in ends
    if codes:
        assert started.wait(10) in codes
    update = checkpoint.latest(run)
    assert update > 0
    again = start(folder, "command", "--resume", f"--until={update + 2}")
    assert again.wait(120) == 0, (folder / "log.txt").read_text()[-3000:]
    assert history.read_end(run) == "finished" and checkpoint.latest(run) == update + 2


def test_a_paused_run_keeps_its_folder_and_writes_nothing_where_it_was_got_around(folder: Path) -> None:
    run, log = folder / "run", folder / "log.txt"
    older = start(folder, "command")
    wait_for("no checkpoint", folder, 120, lambda: run.is_dir() and checkpoint.complete_updates(run))
    workers = processes(str(folder))["worker"]
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    before, before_pause = small_run.contents(run), checkpoint.latest(run)
    first = lock.holders(run)[0]
    assert {one["pid"] for one in lock.holders(run)} == {worker.pid for worker in workers}
    for flags in (["--resume"], ["--overwrite"]):
        log.write_text("")
        assert start(folder, "command", *flags).wait(60) == 2
        assert f"process {first['pid']} on {socket.gethostname()} and 1 more" in log.read_text(), log.read_text()
        assert "is paused" in log.read_text()
    assert small_run.contents(run) == before
    (run / layout.LOCK).unlink()
    until = checkpoint.latest(run) + 2
    assert start(folder, "command", "--resume", f"--until={until}").wait(120) == 0, log.read_text()
    after = small_run.contents(run)
    log.write_text("")
    for worker in workers:
        worker.send_signal(signal.SIGCONT)
    assert older.wait(60) == 1 and "another start of this run has taken over" in log.read_text()
    unfinished = f"/.step-{before_pause + 5:08d}.1/"  # its own, where it was paused in the middle of a write
    assert {path: sum for path, sum in small_run.contents(run).items() if unfinished not in path} == after


def test_of_two_commands_at_once_one_wins(folder: Path) -> None:
    started = [start(folder, "command", "--parallel.pipeline=1", "--train.steps=5") for _ in range(2)]
    assert sorted(one.wait(120) for one in started) == [0, 2], (folder / "log.txt").read_text()
    assert [row["update"] for row in read_metrics(folder / "run") if "stages" in row] == [1, 2, 3, 4, 5]


def test_a_terminal_that_closes_stops_a_run_but_not_under_nohup(folder: Path) -> None:
    run = folder / "run"
    for before, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        old = signal.signal(signal.SIGHUP, before)
        try:
            started = start(folder, "command", "--parallel.pipeline=1", f"--run.dir=run-{stops}")
        finally:
            signal.signal(signal.SIGHUP, old)
        run = folder / f"run-{stops}"
        wait_for("no checkpoint", folder, 120, lambda run=run: run.is_dir() and checkpoint.complete_updates(run))
        started.send_signal(signal.SIGHUP)
        if not stops:
            time.sleep(2)
            assert started.poll() is None and history.read_end(run) is None
            started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 3 and history.read_end(run) == "stopped"
