"""Files that appear whole or not at all: whenever the process dies, the old contents are there or the new ones.

Those that the command line names as outputs are checked before the work whose result they get.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lptransformer.errors import UserError


def beside(path: Path) -> Path:
    """Where a file is written before it takes its place: the same folder, so that renaming is one step."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path to write to; takes its place when the block ends, and leaves nothing behind when it fails."""
    final = path.resolve()  # a symbolic link stays one
    temporary = beside(final)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """The text in UTF-8, its line ends as they are. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def set_aside(path: Path) -> Path:
    """Rename a file that is broken, so that a new one can take its place; returns where it is now."""
    aside = path.with_name(path.name + ".broken")
    path.replace(aside)
    return aside


def check_output(path: Path, flag: str) -> None:
    """Raises UserError where `write_output` could not write. What is there stays as it is."""
    try:
        if _is_stream(path):
            return
        final = path.resolve()
        if final.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if final.exists() and not os.access(final, os.W_OK):
            raise PermissionError(None, "the file is not to be changed")
        temporary = beside(final)
        if not temporary.exists():
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be written: {error.strerror}") from None


def write_output(path: Path, text: str, flag: str) -> None:
    """The old contents or the new ones are there, whatever happens. Raises UserError where it cannot be written."""
    try:
        if _is_stream(path):
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
        else:
            write_text(path.resolve(), text)
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be written: {error.strerror}") from None


def _is_stream(path: Path) -> bool:
    """Such as /dev/stdout, whatever that is: it cannot be replaced, and what was written before stays before."""
    return path.exists() and not path.is_dir() and (path.is_relative_to("/dev") or not path.is_file())


def make_folder(path: Path, flag: str) -> None:
    """A folder that the command line names, if it is not there. Raises UserError where none can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}={path}: no folder can be made there ({error.strerror}); give another") from None


@contextmanager
def noted_once(name: str) -> Iterator[bool]:
    """Whether `name` is noted in the user's cache on this host; it is when the block ends. Others wait meanwhile.

    Where the cache cannot be written nothing is noted, and nobody waits.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lptransformer"
        note = folder / name
        note.parent.mkdir(parents=True, exist_ok=True)
        lock = note.with_suffix(".lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, RuntimeError):  # no home, no room, no locks on that disk
        yield False
        return
    with lock:
        yield note.exists()
        note.touch()
