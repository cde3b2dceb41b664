"""One start of a run at a time: locks between processes, and the generation where a lock was got around."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from refusals import says

from lptransformer.errors import RunError, TakenOverError
from lptransformer.run_folder import lock
from lptransformer.run_folder.layout import GENERATION, LOCK

BEGINS = """
import sys, time
from pathlib import Path
from lptransformer.errors import RunError
from lptransformer.run_folder import lock
print("ready", flush=True)
at, held = float(sys.stdin.readline()), []
for folder in sys.argv[1:]:
    time.sleep(max(0, at - time.time()))
    at += 0.4
    try:
        held.append(lock.begin(Path(folder)))
        print("taken", flush=True)
    except RunError as error:
        print(error, flush=True)
sys.stdin.readline()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that begins in folders, the first at `at`, and holds them until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*folders: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BEGINS, *map(str, folders)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def begun(process: subprocess.Popen[str], at: float = 0.0) -> None:
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write(f"{at}\n")
    process.stdin.flush()


def refusal(call: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises(RunError) as caught:
        call(folder)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_at_work_is_named_also_when_it_is_paused_and_gone_when_it_is_killed(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "new" / "run"
    lock.check_free(folder)
    assert not folder.exists(), "looking makes nothing"
    other = start(folder)
    begun(other)
    assert other.stdout is not None and other.stdout.readline() == "taken\n"
    for call in (lock.check_free, lock.begin):
        says(refusal(call, folder), str(folder), f"process {other.pid} on {socket.gethostname()}", f"kill {other.pid}")
    other.send_signal(signal.SIGSTOP)
    os.waitpid(other.pid, os.WUNTRACED)
    says(refusal(lock.begin, folder), f"process {other.pid}", f"kill -CONT {other.pid}", "paused")
    assert (folder / GENERATION).read_text().startswith("1 ")
    other.kill()
    other.wait()
    with lock.begin(folder).file:
        assert (folder / GENERATION).read_text().startswith("2 ")


def test_every_process_holds_it_itself(tmp_path: Path, start: Start) -> None:
    first = start(tmp_path)
    begun(first)
    assert first.stdout is not None and first.stdout.readline() == "taken\n"
    second = lock.join(tmp_path, (tmp_path / GENERATION).read_text())
    says(refusal(lock.begin, tmp_path), f"process {first.pid} on", "and 1 more")
    first.kill()
    first.wait()
    second.check()
    says(refusal(lock.begin, tmp_path), f"process {os.getpid()} on")
    second.file.close()
    lock.check_free(tmp_path)


def test_of_starts_at_the_same_moment_one_wins(tmp_path: Path, start: Start) -> None:
    folders = [tmp_path / str(number) for number in range(5)]
    processes = [start(*folders) for _ in range(3)]
    at = time.time() + 2.0
    for process in processes:
        begun(process, at)
    answers = []
    for process in processes:
        assert process.stdout is not None
        answers.append([process.stdout.readline().strip() for _ in folders])
    for of_folder in zip(*answers, strict=True):
        winner = processes[of_folder.index("taken")].pid
        assert sorted(answer == "taken" for answer in of_folder) == [False, False, True]
        assert all(f"process {winner} on" in answer for answer in of_folder if answer != "taken"), of_folder


def test_a_start_that_comes_while_a_lock_becomes_a_shared_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may let go of a lock before it has the other kind."""
    share, won = lock._share, []

    def slowly(file: IO[str]) -> None:
        monkeypatch.setattr(lock, "_share", share)
        fcntl.flock(file, fcntl.LOCK_UN)
        won.append(lock.begin(tmp_path))
        share(file)

    monkeypatch.setattr(lock, "_share", slowly)
    refusal(lock.begin, tmp_path)
    won[0].check()
    refusal(lock.begin, tmp_path)
    won[0].file.close()
    lock.check_free(tmp_path)


@pytest.mark.parametrize("around", ["lock removed", "folder removed", "folder replaced"])
def test_who_is_got_around_may_not_write(tmp_path: Path, around: str) -> None:
    folder = tmp_path / "run"
    older = lock.begin(folder)
    older.check()
    if around == "lock removed":
        (folder / LOCK).unlink()
    else:
        shutil.rmtree(folder)
    newer = None if around == "folder removed" else lock.begin(folder)
    with pytest.raises(TakenOverError) as caught:
        older.check()
    assert caught.value.exit_code == 1
    says(str(caught.value), str(folder), "writes nothing more", *([f"process {os.getpid()} on"] if newer else []))
    if newer is not None:
        newer.check()
        lock.join(folder, newer.start).file.close()
        with pytest.raises(TakenOverError):
            lock.join(folder, older.start)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_it_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock.check_free(tmp_path)
    older = lock.begin(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    says(said, str(tmp_path), "no locks")
    lock.join(tmp_path, older.start).check()
    assert not capsys.readouterr().err
    newer = lock.begin(tmp_path)
    newer.check()
    with pytest.raises(TakenOverError, match="another start of this run has taken over"):
        older.check()


def test_a_lock_that_says_nothing_readable(tmp_path: Path) -> None:
    with lock.begin(tmp_path).file:
        for content in (b"", b"half a li", b"[1]\n", b'{"host": "a", "pid": "b"}', b"\xff"):
            (tmp_path / LOCK).write_bytes(content)
            says(refusal(lock.check_free, tmp_path), "a run is at work there", "unknown host")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says(refusal(lock.begin, tmp_path / "file" / "run"), str(tmp_path / "file" / "run"), "cannot write")


def test_the_command_refuses_before_anything_slow(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{data: {train: text.txt}, run: {dir: run}}")
    code = """
import sys
from lptransformer.__main__ import parser
from lptransformer.training.launcher import run
for flags in ([], ["--resume"], ["--overwrite"]):
    try:
        run(parser(), ["train", "c.yaml", *flags])
    except SystemExit as end:
        assert end.code == 2
assert "torch" not in sys.modules
"""
    with lock.begin(tmp_path / "run").file:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    for line in lines:
        says(line, f"process {os.getpid()} on {socket.gethostname()}", "report run")
