"""Files that appear whole or not at all: whenever the process dies or the power goes, the old contents are there or the
new ones. Sums by which a file is known again.

Those that the command line names as outputs are checked before the work whose result they get.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lptransformer.errors import UserError


def beside(path: Path) -> Path:
    """Where a file is written before it takes its place: the same folder, so that renaming is one step."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path to write to; takes its place when the block ends, and leaves nothing behind when it fails.

    After the block both the contents and the name are on the disk.
    """
    final = path.resolve()  # a symbolic link stays one
    temporary = beside(final)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(final)
        sync(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """The text in UTF-8, its line ends as they are. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def sync(path: Path) -> None:
    """What a file holds, or which names a folder has, is on the disk and outlives a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network disks sync no folders
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` for all that is in a folder, then for the folder. Links are names and not followed. Raises OSError."""
    for inside, _, names in os.walk(folder, topdown=False):
        for path in (Path(inside, name) for name in names):
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(inside))


def make_folders(path: Path) -> None:
    """A folder and those above it, where they are not there; each one's name is on the disk. Raises OSError."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sum_of(path: Path) -> str:
    """The xxh3-128 of what a file holds, in hexadecimal digits. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def record(path: Path) -> list[int | str]:
    """[size in bytes, `sum_of`]: by these a file is known again. Raises OSError."""
    return [path.stat().st_size, sum_of(path)]


class SummedFile(io.FileIO):
    """A new file that is written from front to back and knows the `record` of what was written, without reading it.

    Unbuffered: stand an io.BufferedWriter before it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self._size, self._sum = 0, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._size += written
        self._sum.update(memoryview(data).cast("B")[:written])
        return written

    @property
    def record(self) -> list[int | str]:
        return [self._size, self._sum.hexdigest()]


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
