"""From a file to rows: plain text in blocks; JSON, CSV, Parquet and Arrow as dictionaries, each with its place.

Files are read in blocks, but for `.json`, and as they are: line ends, dates and numbers stay what they were.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lptransformer import hub
from lptransformer.errors import DataError

_BLOCK = 1 << 22  # bytes read at a time
_BLANK = re.compile(r"\s*")
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
HUB = "hub:"
_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?", re.ASCII)

Advance = Callable[[int], None]  # called with the number of bytes of the file read since the last call


class Row(NamedTuple):
    """`place` names file and row, for messages."""

    place: str
    values: dict[str, Any]


def kind(path: Path) -> str:
    """What a file holds by its name: a key of _ROWS, else "text"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    named = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    found = named[0].removeprefix(".")
    found = "jsonl" if found == "ndjson" else found
    return found if found in _ROWS and not (packed and found in _OF_ARROW) else "text"


def address(path: Path) -> str:
    """How a file is read, for content addresses. Those of the first three are older than the other kinds."""
    found = {"text": "_read_plain", "jsonl": "_read_jsonl", "parquet": "_read_parquet"}.get(kind(path), kind(path))
    try:
        with path.open("rb") as file:
            marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    packed = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    return found + packed + ("+bom" if marked else "")


def text_blocks(path: Path, advance: Advance) -> Iterator[str]:
    """A text file in blocks that begin with white space, so that no word is cut."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with _opened(path, advance) as (stream, offset):
        while True:
            block = stream.read(_BLOCK)
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
            if not block:
                return


def rows(path: Path, advance: Advance, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a file that is no text; of Parquet and Arrow these columns alone (None: all). Raises DataError."""
    return _ROWS[kind(path)](path, advance, columns)


def column_names(path: Path) -> list[str]:
    """The columns of a file, of JSON those of its first row. Raises DataError for a file without rows."""
    if kind(path) in _OF_ARROW:
        with _OF_ARROW[kind(path)](path) as (schema, _):
            return list(schema.names)
    first = next(rows(path, lambda read: None), None)
    if first is None:
        raise DataError(f"{path}: holds no row")
    return list(first.values)


@contextmanager
def _opened(path: Path, advance: Advance) -> Iterator[tuple[io.BufferedReader, int]]:
    """The bytes of a file, unpacked, and how many of them are a byte order mark, which is left out."""

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            many = super().readinto(buffer) or 0
            advance(many)
            return many

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size) or b""
            advance(len(found))
            return found

        def readall(self) -> bytes:
            found = super().readall() or b""
            advance(len(found))
            return found

    try:
        with Counted(path) as file:
            stream = io.BufferedReader(_unpacked(path, file), _BLOCK)
            marked = stream.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8)
            yield stream, len(stream.read(len(codecs.BOM_UTF8))) if marked else 0
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error


def _unpacked(path: Path, file: io.FileIO) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=file, mode="rb")
        case ".bz2":
            return bz2.BZ2File(file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            import pyarrow as pa

            return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return file


def _jsonl(path: Path, advance: Advance, _columns: Sequence[str] | None) -> Iterator[Row]:
    with _opened(path, advance) as (stream, offset):
        for number, line in enumerate(stream, 1):
            place = f"{path}, line {number}"
            try:
                text = line.decode()
                if text.strip():
                    yield _object(json.loads(text), place, "\\ud" in text.lower())
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits too
                raise DataError(f"{place}: not JSON: {error}") from error
            offset += len(line)


def _json(path: Path, advance: Advance, _columns: Sequence[str] | None) -> Iterator[Row]:
    """An array of objects, or objects one after another, on lines or not."""
    with _opened(path, advance) as (stream, offset):
        try:
            text = stream.read().decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start) from error
    decoder, at, number = json.JSONDecoder(), _after_blanks(text, 0), 0
    array = text[at : at + 1] == "["
    at = _after_blanks(text, at + array)
    while at < len(text) and text[at] != "]":
        number += 1
        place = f"{path}, row {number}"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}") from error
        yield _object(value, place, True)
        at = _after_blanks(text, at)
        if array and text[at : at + 1] == ",":
            at = _after_blanks(text, at + 1)
        elif array and text[at : at + 1] != "]":
            raise DataError(f"{place}: not JSON: neither a comma nor the end of the array follows")
    if _after_blanks(text, at + array) < len(text) or (array and at == len(text)):
        raise DataError(f"{path}: not JSON: it has neither the end of an array nor further objects after row {number}")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _object(value: Any, place: str, escaped: bool) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {short(value)} is not an object with named fields")
    if escaped:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: half of a surrogate pair is no character") from error
    return Row(place, value)


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cells(path: Path, advance: Advance, _columns: Sequence[str] | None) -> Iterator[Row]:
    """Every cell is a string; the first row has the names."""
    csv.field_size_limit((1 << 31) - 1)  # of the whole process; a cell may be a book
    number = 0
    with _opened(path, advance) as (stream, _):
        text = io.TextIOWrapper(stream, "utf-8", newline="")
        try:
            table = csv.reader(text, delimiter="\t" if kind(path) == "tsv" else ",", strict=True)
            names = next(table, [])
            for cells in table:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}, row {number}: {len(cells)} cells, where the first line names {len(names)}"
                    )
                yield Row(f"{path}, row {number}", dict(zip(names, cells, strict=True)))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text, after row {number}") from error
        except csv.Error as error:
            raise DataError(f"{path}, row {number + 1}: {error}") from error


@contextmanager
def _parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema and the record batches."""
    import pyarrow.parquet as pq

    with _translated(path, "Parquet"), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        chosen = [name for name in schema.names if columns is None or name in columns]
        yield schema, file.iter_batches(batch_size=1024, columns=chosen)


@contextmanager
def _arrow(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, Iterator[Any]]]:
    """As `datasets` writes it (a stream), or the file format of Arrow (Feather)."""
    import pyarrow as pa

    with _translated(path, "Arrow"), pa.memory_map(str(path)) as source:
        try:
            stream = pa.ipc.open_stream(source)
            batches = iter(stream)
        except pa.ArrowInvalid:
            source.seek(0)
            stream = pa.ipc.open_file(source)
            batches = (stream.get_batch(number) for number in range(stream.num_record_batches))
        chosen = [name for name in stream.schema.names if columns is None or name in columns]
        yield stream.schema, (batch.select(chosen) for batch in batches)


@contextmanager
def _translated(path: Path, what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:  # a page that is damaged, or a file that is cut off, is the latter
        raise DataError(f"{path}: not a readable {what} file: {str(error).splitlines()[0]}") from error


_OF_ARROW = {"parquet": _parquet, "arrow": _arrow}


def _of_arrow(path: Path, advance: Advance, columns: Sequence[str] | None) -> Iterator[Row]:
    number = 0
    with _OF_ARROW[kind(path)](path, columns) as (_, batches):
        try:
            for batch in batches:
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, row {number + 1} or after: not UTF-8") from error
    advance(path.stat().st_size)


_ROWS: dict[str, Callable[[Path, Advance, Sequence[str] | None], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    **dict.fromkeys(("csv", "tsv"), _cells),
    **dict.fromkeys(_OF_ARROW, _of_arrow),
}


def _not_utf8(path: Path, offset: int) -> DataError:
    return DataError(f"{path}: not UTF-8 text: the byte at offset {offset} (from 0) does not belong there")


# ---- data sets of the library `datasets`, which are Arrow files


def saved_files(folder: Path, where: str) -> list[Path]:
    """The files of a folder that `save_to_disk` wrote; none where it is no such folder, or holds tokens. Raises
    DataError."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(f"{where}: {folder} holds the splits {', '.join(splits)}: give one, {folder / splits[0]}")
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if "input_ids" in json.loads((folder / "dataset_info.json").read_bytes())["features"]:
            return []  # a token set that is not complete
        return [folder / file["filename"] for file in state["_data_files"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {folder} is a damaged data set of `datasets`: {error}") from error


def hub_files(reference: str, split: str | None, where: str) -> list[Path]:
    """The Arrow files of "hub:OWNER/NAME", "/CONFIG" and ":SPLIT" behind it where there are several; fetched into the
    cache of `datasets` where they are not there. `split` is taken where there are several and none is named.

    Raises DataError.
    """
    named = _HUB.fullmatch(reference)
    if named is None:
        raise DataError(f"{where}: {reference} is not hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or one of them with :SPLIT")
    import datasets

    key = f"datasets/{named['name']}"  # of the commit that all processes of a run take
    try:
        datasets.disable_progress_bars()
        found = datasets.load_dataset(named["name"], named["config"], revision=hub.commits().get(key))
    except Exception as error:  # the library, its network stack and the disk raise many types
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: {reference} cannot be had from the hub or the cache: {what}") from error
    wanted = named["split"] or (split if len(found) > 1 else next(iter(found)))
    if wanted not in found:
        one = f"{reference.removesuffix(f':{wanted}')}:{next(iter(found))}"
        raise DataError(f"{where}: {reference} has the splits {', '.join(found)}: name one, as {one}")
    files = [Path(file["filename"]) for file in found[wanted].cache_files]
    if files and re.fullmatch(r"[0-9a-f]{40}", files[0].parent.name):
        hub.keep_to({key: files[0].parent.name})
    return files
