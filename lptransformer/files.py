"""Files that appear whole or not at all: whenever the process dies or the power goes, the old contents are there or the
new ones. Sums by which a file is known again.

Those that the command line names as outputs are checked before the work whose result they get.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
    if not path.exists():
        make_folders(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sum_of(path: Path) -> str:
    """The xxh3-128 of what a file holds, in hexadecimal digits. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, _new_sum).hexdigest()


def sum_of_text(text: str) -> str:
    """The same of a text in UTF-8."""
    found = _new_sum()
    found.update(text.encode())
    return found.hexdigest()


def _new_sum() -> Any:
    import xxhash  # here, so that a host that lacks it can say what else it lacks (doctor)

    return xxhash.xxh3_128()


def record(path: Path) -> list[int | str]:
    """[size in bytes, `sum_of`]: by these a file is known again. Raises OSError."""
    return [path.stat().st_size, sum_of(path)]


class SummedFile(io.FileIO):
    """A new file that is written from front to back and knows the `record` of what was written, without reading it.

    Unbuffered: stand an io.BufferedWriter before it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self._size, self._sum = 0, _new_sum()

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._size += written
        self._sum.update(memoryview(data).cast("B")[:written])
        return written

    @property
    def record(self) -> list[int | str]:
        return [self._size, self._sum.hexdigest()]


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
def unfinished(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, to be filled, synced and renamed; nothing of it is left when the block ends.

    It is locked meanwhile: what a process that was killed has left is told from what another one is writing. Raises
    OSError.
    """
    make_folders(final.parent)
    remove_unfinished(final.parent, glob.escape(final.name))
    folder = final.parent / f".unfinished-{final.name}-{uuid.uuid4().hex[:12]}"
    lock = None
    try:
        while not folder.exists():  # again where somebody removed it before it was locked
            _unlock(lock)
            folder.mkdir()
            lock = _locked(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def remove_unfinished(parent: Path, name: str = "*") -> None:
    """Remove what `unfinished` has left for folders of this name (a pattern), where no living process writes it.

    What cannot be locked or removed stays.
    """
    for folder in parent.glob(f".unfinished-{name}-{'[0-9a-f]' * 12}"):
        if (lock := _locked(folder, fcntl.LOCK_NB)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _locked(folder: Path, more: int = 0) -> int | None:
    """A descriptor that holds the lock of a folder until it is closed; None where there is none to be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | more)
    except OSError:  # another process holds it, or the disk has no locks
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextmanager
def _note(name: str) -> Iterator[Path | None]:
    """A file in the user's cache on this host, which others wait for meanwhile; None where none can be written."""
    try:
        note = _cache() / name
        note.parent.mkdir(parents=True, exist_ok=True)
        lock = note.with_suffix(".lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, RuntimeError):  # no home, no room, no locks on that disk
        yield None
        return
    with lock:
        yield note


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lptransformer"


@contextmanager
def noted_once(name: str) -> Iterator[bool]:
    """Whether `name` is noted in the user's cache on this host; it is when the block ends. Others wait meanwhile.

    Where the cache cannot be written nothing is noted, and nobody waits.
    """
    with _note(name) as note:
        yield note is not None and note.exists()
        if note is not None:
            note.touch()


def noted_of(folder: Path, name: str, find: Callable[[], int]) -> int:
    """What `find` finds in the files of a folder: a number that is noted in the user's cache on this host (in the note
    `name`) until one of them has another size, time or inode. Others wait meanwhile.

    Where the cache cannot be written it is found each time. Raises what `find` raises, and OSError.
    """
    key, stats = str(folder.resolve()), {path.name: path.stat() for path in sorted(folder.iterdir())}
    state = [[name, one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino] for name, one in stats.items()]
    with suppress(OSError, RuntimeError):
        before = _read_notes(_cache() / f"{name}.json").get(key)
        if before is not None and before[0] == state:
            return before[1]
    with _note(f"{name}.json") as note:
        notes = {} if note is None else _read_notes(note)
        if key not in notes or notes[key][0] != state:
            notes = {one: noted for one, noted in notes.items() if Path(one).is_dir()} | {key: (state, find())}
            if note is not None:
                with suppress(OSError):
                    write_text(note, json.dumps(notes))
        return notes[key][1]


def _read_notes(note: Path) -> dict[str, tuple[Any, int]]:
    """By folder its state then, and what was found; nothing where there are no notes that can be read."""
    try:
        notes = json.loads(note.read_bytes())
        return {folder: (state, int(found)) for folder, (state, found) in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
