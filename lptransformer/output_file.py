"""Files that the command line names as targets: checked before the work whose result they get, and written whole."""

from __future__ import annotations

import os
from pathlib import Path

from lptransformer import whole_file
from lptransformer.errors import UserError


def check(path: Path, flag: str) -> None:
    """Raises UserError where `write` could not write. What is there stays as it is."""
    try:
        if _is_stream(path):
            return
        final = path.resolve()
        if final.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if final.exists() and not os.access(final, os.W_OK):
            raise PermissionError(None, "the file is not to be changed")
        beside = whole_file.beside(final)
        if not beside.exists():
            beside.touch()
            beside.unlink()
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be written: {error.strerror}") from None


def write(path: Path, text: str, flag: str) -> None:
    """The old contents or the new ones are there, whatever happens. Raises UserError where it cannot be written."""
    try:
        if _is_stream(path):
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
        else:
            whole_file.write_text(path.resolve(), text)
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be written: {error.strerror}") from None


def _is_stream(path: Path) -> bool:
    """Such as /dev/stdout, whatever that is: it cannot be replaced, and what was written before stays before."""
    return path.exists() and not path.is_dir() and (path.is_relative_to("/dev") or not path.is_file())
