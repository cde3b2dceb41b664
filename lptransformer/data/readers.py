"""Files of text: from the globs of a configuration to files, and from files to documents.

Plain text, .jsonl (key "text") and .parquet (column "text"). Everything is read in blocks, never a whole corpus.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as remember
from glob import glob
from pathlib import Path
from typing import Any

from lptransformer.errors import ConfigError, DataError

_BLOCK = 1 << 22  # bytes read at a time
MANIFEST = "manifest.json"  # what makes a folder a prepared token set

Advance = Callable[[int], None]  # called with the number of bytes of the sources read since the last call


@dataclass(frozen=True)
class Source:
    """One named part of data.train or data.valid: its files in order, or the folder of a prepared token set."""

    name: str
    files: tuple[Path, ...] = ()
    prepared: Path | None = None
    weight: float | None = None


# ---- globs -> files


def parse_sources(spec: Any, key: str, where: str | None = None) -> list[Source]:
    """The sources that `data.train` or `data.valid` (`key` is "train" or "valid") names.

    spec: a glob, a list of globs, or a mapping of names to globs or to {files: globs, weight: number}; None or an
    empty mapping names none. What has no name is called `key`. Instead of globs, the folder of one prepared set.
    where: what messages call the place that `spec` comes from, data.<key> unless it is given.
    """
    named = spec if isinstance(spec, Mapping) else {} if spec is None else {key: spec}
    origin = where or f"data.{key}"
    sources = []
    for name, value in named.items():
        where = f"{origin}.{name}" if isinstance(spec, Mapping) else origin
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", str(name)):
            raise ConfigError(f"{where}: a name is made of letters, digits, '.', '_' and '-'")
        globs, weight = value, None
        if isinstance(value, Mapping):
            if "files" not in value or set(value) - {"files", "weight"}:
                raise ConfigError(f"{where}: has the keys {sorted(value)}; right are: files, and weight if wanted")
            globs, weight = value["files"], value.get("weight")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (number and 0 < weight < math.inf):
            raise ConfigError(f"{where}.weight: {weight!r} is not a number above 0")
        globs = [globs] if isinstance(globs, str | Path) else globs
        if not isinstance(globs, Sequence) or not globs or not all(isinstance(one, str | Path) for one in globs):
            raise ConfigError(f"{where}: {globs!r} is neither a glob nor a list of globs")
        sources.append(_find(str(name), [str(one) for one in globs], weight, where))
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError(f"{origin}: some sources have a weight and some have none; give one to all or to none")
    return sources


def _find(name: str, globs: list[str], weight: float | None, where: str) -> Source:
    """Each glob's files in alphabetical order; a file that several globs match is taken once."""
    if len(globs) == 1 and (Path(globs[0]) / MANIFEST).is_file():
        return Source(name, prepared=Path(globs[0]), weight=weight)
    files: dict[Path, None] = {}
    for pattern in globs:
        if Path(pattern).is_dir():
            raise DataError(
                f"{where}: {pattern} is a folder without a complete token set; for the files in it give {pattern}/*.txt"
            )
        found = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))
        paths = [Path(one) for one in found if Path(one).is_file()]
        if not paths:
            raise DataError(f"{where}: no file matches {pattern}")
        files.update(dict.fromkeys(paths))
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
    return Source(name, tuple(files), weight=weight)


# ---- files -> documents


def _read_plain(path: Path, advance: Advance) -> Iterator[Iterable[str]]:
    """A text file is one document, given in blocks that begin with white space, so that no word is cut."""

    def blocks() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, offset = "", 0
        with path.open("rb") as file:
            while True:
                block = file.read(_BLOCK)
                undecoded = len(decoder.getstate()[0])
                try:
                    rest += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, offset - undecoded + error.start) from error
                offset += len(block)
                cut = max(rest.rfind(" "), rest.rfind("\n")) if block else len(rest)
                if cut > 0:
                    yield rest[:cut]
                    rest = rest[cut:]
                advance(len(block))
                if not block:
                    return

    yield blocks()


def _read_jsonl(path: Path, advance: Advance) -> Iterator[Iterable[str]]:
    """Every line is a JSON object whose "text" is a document; blank lines and empty texts are skipped."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                content = json.loads(line.decode()) if line.strip() else {"text": ""}
                text = content.get("text") if isinstance(content, dict) else None
                if not isinstance(text, str):
                    raise DataError(f'{path}, line {number}: not an object with a string under the key "text"')
                text.encode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            except UnicodeEncodeError as error:
                raise DataError(f"{path}, line {number}: half of a surrogate pair is no character") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from error
            offset += len(line)
            advance(len(line))
            yield [text]


def _read_parquet(path: Path, advance: Advance) -> Iterator[Iterable[str]]:
    """Every row's "text" is a document; empty ones are skipped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, read, row = path.stat().st_size, 0, 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DataError(f'{path}: has no column "text"; its columns are {", ".join(names)}')
            kind = file.schema_arrow.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f'{path}: the column "text" holds {kind}, not strings')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise DataError(f'{path}, row {row}: the column "text" has no value')
                    yield [text]
                now = size * row // file.metadata.num_rows
                advance(now - read)
                read = now
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row + 1} or after: not UTF-8") from error
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}  # by extension; all else is plain text


def documents(path: Path, advance: Advance) -> Iterator[Iterable[str]]:
    """The documents of a file, each as consecutive blocks of text. Raises DataError, naming the file."""
    found = False

    def noted(blocks: Iterable[str]) -> Iterator[str]:
        nonlocal found
        for block in blocks:
            found = found or not (block == "" or block.isspace())
            yield block

    for blocks in reader(path)(path, advance):
        yield noted(blocks)
    if not found:
        raise DataError(f"{path}: holds no text")


def reader(path: Path) -> Callable[[Path, Advance], Iterator[Iterable[str]]]:
    return _READERS.get(path.suffix.lower(), _read_plain)


def _not_utf8(path: Path, offset: int) -> DataError:
    return DataError(f"{path}: not UTF-8 text: the byte at offset {offset} (from 0) does not belong there")


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its name, its size in bytes, its sha256."""
    status = path.stat()
    return {"path": path.name, "bytes": status.st_size, "sha256": _sha256(path, status.st_size, status.st_mtime_ns)}


@remember
def _sha256(path: Path, _size: int, _changed: int) -> str:
    """The size and the time of the last change are part of the key under which the hash is remembered."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
