"""Who may write into a run folder: one start of its run at a time.

    run.lock     locked (flock) by every process of a run itself, so it is free when the last one has ended, and a
                 paused one still has it. A line of JSON for each: host and pid; of the first also command and time
    generation   the number of the newest start, and a word that no other start has

A lock can be missing (a disk without locks) or removed by hand; so whoever writes also compares the generation. Both
files stay when a run is replaced. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from lptransformer import files
from lptransformer.errors import RunError, TakenOverError
from lptransformer.run_folder.history import typed_command
from lptransformer.run_folder.layout import GENERATION, LOCK, signed

TRIES, TRY_SECONDS = 6, 0.05  # others who only look hold a lock for a moment
SEEN_SECONDS = 90.0  # until another host sees a file that took the place of one: NFS remembers names for a minute
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Hold:
    """A process's part in a run folder, until `file` is closed. While nobody has taken over, the folder's generation is
    that of `start`."""

    folder: Path
    start: str
    file: IO[str]

    @property
    def generation(self) -> int:
        """The number of the start."""
        return _generation(self.start)

    def check(self) -> None:
        """Raises TakenOverError where another start has begun since: this process must not write there any more."""
        if (found := _read(self.folder)) != self.start:
            what = f"another start of this run has taken over{_by(self.folder)}" if found else f"{GENERATION} has gone"
            raise TakenOverError(f"{self.folder}: {what}; this one writes nothing more there, and ends")


def check_free(folder: Path) -> None:
    """Raises RunError where a run is at work in a folder. Changes nothing."""
    with contextlib.suppress(OSError), (folder / LOCK).open("r+") as file:
        if take(file) is False:
            raise _busy(folder)


def begin(folder: Path) -> Hold:
    """The folder for a new start, on its global rank 0; it is made where it is not there.

    One line says so where its disk has no locks. Raises RunError where a run is at work in it, or it cannot be written.
    """
    with contextlib.ExitStack() as refused:
        try:
            files.make_folders(folder)
            file = refused.enter_context((folder / LOCK).open("a+"))
            taken = take(file)
            if taken is False:
                raise _busy(folder)
            start = f"{_generation(_read(folder)) + 1} {uuid.uuid4().hex}"
            files.write_text(folder / GENERATION, start)
            file.truncate(0)
            _sign(file, {"command": shlex.join(typed_command()), "time": time.strftime("%Y-%m-%d %H:%M:%S")})
            _share(file)
        except OSError as error:
            raise _unwritable(folder, error) from None
        if _read(folder) != start:  # a lock is let go of for a moment where it becomes a shared one
            raise _busy(folder)
        if taken is None:
            print(
                f"warning: run.dir is {folder}: its disk has no locks, so nothing keeps another start out; where there "
                "is one, this one ends before its next write",
                file=sys.stderr,
                flush=True,
            )
        refused.pop_all()
    return Hold(folder, start, file)


def join(folder: Path, start: str) -> Hold:
    """The part of another process of a start that has begun.

    Raises TakenOverError where a newer one has begun meanwhile, RunError where the folder cannot be written from here.
    """
    with contextlib.ExitStack() as refused:
        try:
            file = refused.enter_context((folder / LOCK).open("a+"))
            _share(file)
            deadline = time.monotonic() + SEEN_SECONDS
            while _generation(_read(folder)) < _generation(start) and time.monotonic() < deadline:
                time.sleep(TRY_SECONDS)
            hold = Hold(folder, start, file)
            hold.check()
            _sign(file, {})
        except OSError as error:
            raise _unwritable(folder, error) from None
        refused.pop_all()
    return hold


def take(file: IO[str]) -> bool | None:
    """Lock an open file for this process alone, without waiting; None where its disk has no locks."""
    for tries in range(TRIES):
        time.sleep(TRY_SECONDS if tries else 0.0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None
    return False


def _share(file: IO[str]) -> None:
    """From now on others may lock the file in this way too."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for nobody but a start that is just beginning
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _sign(file: IO[str], more: Mapping[str, Any]) -> None:
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **more}) + "\n")
    file.flush()


def _read(folder: Path) -> str:
    """The newest start; nothing where there was none."""
    try:
        return (folder / GENERATION).read_text()
    except FileNotFoundError:
        return ""


def _generation(start: str) -> int:
    number = start.partition(" ")[0]
    return int(number) if number.isdecimal() else 0


def holders(folder: Path) -> list[dict[str, Any]]:
    """Those of a folder's signatures whose process may still be there; else the first one."""
    found = signed(folder)
    here = socket.gethostname()
    return [one for one in found if one["host"] != here or psutil.pid_exists(one["pid"])] or found[:1]


def _unwritable(folder: Path, error: OSError) -> RunError:
    return RunError(f"run.dir is {folder}: {socket.gethostname()} cannot write there ({error.strerror})")


def _by(folder: Path) -> str:
    return "".join(f" (process {one['pid']} on {one['host']})" for one in holders(folder)[:1])


def _busy(folder: Path) -> RunError:
    first, *others = holders(folder) or [{"host": "an unknown host", "pid": "?"}]
    where, pid = first["host"], first["pid"]
    paused = False
    if where == socket.gethostname():
        with contextlib.suppress(psutil.Error):
            paused = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    who = f"process {pid} on {where}" + (f" and {len(others)} more" if others else "")
    since = f", since {first['time']} by `{first['command']}`" if "time" in first else ""
    stop = f"`kill {pid}` there saves and stops it" + (f", after `kill -CONT {pid}`: it is paused" if paused else "")
    return RunError(
        f"run.dir is {folder}: a run is at work there ({who}{since}). Wait until it has ended, or stop it: {stop}",
        command=f"report {folder}",
    )
