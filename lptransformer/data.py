"""Text to packed token sets on disk, and token sets to batches.

`prepare_all` turns the sources of a configuration into token sets: content-addressed folders with one Arrow file of
token windows and a manifest. A folder is built under another name and renamed when it is complete, so what is there
is whole, and several processes may prepare at once. `TokenSet.batches` reads a set in order (evaluation);
`TrainStream.batch` gives micro-batch i of a run as a pure function of i, the same in every process.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as remember
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lptransformer import tokenizer as tokenizers
from lptransformer.errors import ConfigError, DataError
from lptransformer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
MANIFEST = "manifest.json"
_FORMAT = 1  # part of every content address: raise it when what is written changes
_DATA_FILE = "data-00000-of-00001.arrow"
_MANIFEST: dict[str, type] = {"tokenizer_fingerprint": str, "sources": list}  # what must be there, and of which type
_MANIFEST |= dict.fromkeys(["sequence_length", "vocab_size", "rows", "tokens", "bytes", "words"], int)
_TOKENIZER_FILE = "tokenizer_config.json"  # every tokenizer folder has it
_BLOCK = 1 << 22  # bytes read, and characters encoded, at a time
_ROWS_PER_CHUNK = 1024

Advance = Callable[[int], None]  # called with the number of bytes of the sources read since the last call


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [micro_batch_size, sequence_length]; labels[t] = input_ids[t + 1], -100 for no label."""

    input_ids: Tensor
    labels: Tensor

    @property
    def label_tokens(self) -> int:
        """How many positions have a label."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Source:
    """One named part of data.train or data.valid: its files in order, or the folder of a prepared token set."""

    name: str
    files: tuple[Path, ...] = ()
    prepared: Path | None = None
    weight: float | None = None


# ---- what is asked for: globs -> files


def check_sources_exist(train: Any, valid: Any = None, tokenizer: str = tokenizers.BYTES) -> None:
    """Fail early where the configuration alone shows it; imports nothing heavy and reads no text.

    Raises ConfigError or DataError for sources of another form (see `parse_sources`), a glob without files, an empty
    file, and a tokenizer that does not exist.
    """
    tokenizers.check_name(tokenizer)
    parse_sources(train, "train")
    parse_sources(valid, "valid")


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
    """Every line is a JSON object whose "text" is a document; blank lines and empty texts are passed over."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line.decode()) if line.strip() else {"text": ""}
                text = record.get("text") if isinstance(record, dict) else None
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
    """Every row's "text" is a document; empty ones are passed over."""
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


def _documents(path: Path, advance: Advance) -> Iterator[Iterable[str]]:
    """The documents of a file, each as consecutive blocks of text. Raises DataError, naming the file."""
    found = False

    def noted(blocks: Iterable[str]) -> Iterator[str]:
        nonlocal found
        for block in blocks:
            found = found or not (block == "" or block.isspace())
            yield block

    for blocks in _reader(path)(path, advance):
        yield noted(blocks)
    if not found:
        raise DataError(f"{path}: holds no text")


def _reader(path: Path) -> Callable[[Path, Advance], Iterator[Iterable[str]]]:
    return _READERS.get(path.suffix.lower(), _read_plain)


def _not_utf8(path: Path, offset: int) -> DataError:
    return DataError(f"{path}: not UTF-8 text: the byte at offset {offset} (from 0) does not belong there")


def _describe(path: Path) -> dict[str, Any]:
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


# ---- documents -> token sets


@dataclass
class _Counts:
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0


def _tokens(files: Sequence[Path], tokenizer: Tokenizer, counts: _Counts, advance: Advance) -> Iterator[np.ndarray]:
    """The ids of all documents, int32 [some], with end_of_text_id between documents; fills in `counts`."""
    separator = np.array([] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id], np.int32)

    def counted(blocks: Iterable[str]) -> Iterator[str]:
        for block in blocks:
            counts.bytes += len(block.encode())
            counts.words += len(block.split())
            yield block

    def encoded() -> np.ndarray:
        arrays = iter(tokenizer.encode_many([piece for piece in waiting if piece is not None]))
        return np.concatenate([separator if piece is None else next(arrays) for piece in waiting])

    waiting: list[str | None] = []  # pieces of text; None stands between documents
    characters = 0
    for path in files:
        for blocks in _documents(path, advance):
            for number, piece in enumerate(tokenizer.pieces(counted(blocks))):
                if number == 0:
                    waiting += [None] if counts.documents else []
                    counts.documents += 1
                waiting.append(piece)
                characters += len(piece)
                if characters >= _BLOCK:
                    yield encoded()
                    waiting, characters = [], 0
    if waiting:
        yield encoded()


def _write_windows(
    folder: Path, blocks: Iterable[np.ndarray], sequence_length: int, vocab_size: int, address: str
) -> int:
    """Write the ids as rows of `sequence_length` (the last may be shorter); returns the number of rows.

    The folder is what `datasets.Dataset.save_to_disk` writes, but for the fingerprint, which that draws at random.
    """
    import pyarrow as pa
    from datasets import DatasetInfo, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    kind = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    features = Features({"input_ids": List(Value(kind.name))})
    rows = 0

    def write(ids: np.ndarray) -> None:
        nonlocal rows
        assert ids.min() >= 0 and ids.max() < vocab_size, "the tokenizer gave an id outside its vocabulary"
        ends = [*range(0, len(ids), sequence_length), len(ids)]
        lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(ids.astype(kind)))
        writer.write_table(pa.table({"input_ids": lists}))
        rows += len(ends) - 1

    chunk = _ROWS_PER_CHUNK * sequence_length
    rest = np.empty(0, np.int32)
    with ArrowWriter(path=str(folder / _DATA_FILE), features=features) as writer:
        for block in blocks:
            rest = np.concatenate([rest, block])
            whole = len(rest) // chunk * chunk
            for start in range(0, whole, chunk):
                write(rest[start : start + chunk])
            rest = rest[whole:]
        if len(rest):
            write(rest)
        writer.finalize()
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": _DATA_FILE}], "_fingerprint": address}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    state |= {"_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    return rows


@contextmanager
def _new_folder(final: Path, marker: str) -> Iterator[Path]:
    """A folder to fill that becomes `final` when the block ends well, and vanishes when it does not.

    When another process made `final` (which holds the file `marker`) in the meantime, that one stays.
    """
    unfinished = final.parent / f".unfinished-{final.name}-{uuid.uuid4().hex[:12]}"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        try:
            unfinished.rename(final)
        except OSError:
            if not (final / marker).is_file():  # damaged by hand: no process leaves such a folder
                shutil.rmtree(final)
                unfinished.rename(final)
    except OSError as error:
        raise DataError(f"data.cache: {final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _address(content: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, content], sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _progress(what: str, files: Sequence[Path], enabled: bool) -> Iterator[Advance]:
    """A bar over the bytes of the files, on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as progress:
        task = progress.add_task(what, total=sum(path.stat().st_size for path in files))
        yield lambda size: progress.advance(task, size)


def prepare(
    source: Source, tokenizer: Tokenizer, sequence_length: int, cache: str | Path, progress: bool = True
) -> TokenSet:
    """The token set of a source: opened when it is prepared already, made below `cache` when it is not.

    Raises DataError for files that are not as they should be, and for a prepared set that another tokenizer or
    another sequence length made.
    """
    if source.prepared is not None:
        return _fitting(TokenSet.open(source.prepared), tokenizer, sequence_length)
    sources = [_describe(path) for path in source.files]
    contents = [[_reader(path).__name__, one["sha256"]] for path, one in zip(source.files, sources, strict=True)]
    address = _address([contents, tokenizer.fingerprint, sequence_length])
    folder = Path(cache) / f"{source.name}-{address}"
    if not (folder / MANIFEST).is_file():
        counts = _Counts()
        with (
            _new_folder(folder, MANIFEST) as unfinished,
            _progress(f"tokenising {source.name}", source.files, progress) as advance,
        ):

            def blocks() -> Iterator[np.ndarray]:
                for ids in _tokens(source.files, tokenizer, counts, advance):
                    counts.tokens += len(ids)
                    yield ids

            rows = _write_windows(unfinished, blocks(), sequence_length, tokenizer.vocab_size, address)
            manifest = {
                "format": _FORMAT,
                "name": source.name,
                "sources": sources,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "sequence_length": sequence_length,
                "rows": rows,
                "tokens": counts.tokens,
                "documents": counts.documents,
                "bytes": counts.bytes,
                "words": counts.words,
            }
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return _fitting(TokenSet.open(folder), tokenizer, sequence_length)


class TrainSet(NamedTuple):
    """One training source; weight is its share in the mixture, None for its natural one."""

    name: str
    weight: float | None
    tokens: TokenSet


@dataclass(frozen=True)
class Prepared:
    """What a run reads: the tokenizer (opened) and its folder, the training sets, the validation sets by name."""

    tokenizer: Tokenizer
    tokenizer_folder: Path
    train: list[TrainSet]
    valid: dict[str, TokenSet]


def prepare_all(
    train: Any,
    valid: Any,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    cache: str | Path,
    progress: bool = True,
) -> Prepared:
    """Make what is missing below `cache`, and open all of it; the arguments are the keys of the section `data`.

    train, valid: see `parse_sources`. vocab_size counts for the tokenizer "sentencepiece" alone, which is trained on
    the text of `train` (or is the one that made the prepared sets in `train`).
    Raises DataError or ConfigError for all that can be wrong with the sources, also a training set without one full
    window.
    """
    tokenizers.check_name(tokenizer)
    train_sources, valid_sources = parse_sources(train, "train"), parse_sources(valid, "valid")
    if not train_sources:
        raise ConfigError("data.train: names no text; give a glob, a list of globs or a mapping of names to globs")
    if tokenizer != tokenizers.SENTENCEPIECE:
        opened = tokenizers.load(tokenizer)
        contents = {name: hashlib.sha256(content).hexdigest() for name, content in opened.files.items()}
        folder = Path(cache) / f"tokenizer-{_address(contents)}"
        if not _has_tokenizer(folder):
            with _new_folder(folder, _TOKENIZER_FILE) as unfinished:
                opened.save(unfinished)
    elif any(source.prepared for source in train_sources):
        opened, folder = _tokenizer_beside(next(source.prepared for source in train_sources if source.prepared))
    else:
        folder = _trained_tokenizer(train_sources, vocab_size, Path(cache), progress)
        opened = tokenizers.load(folder)

    def made(source: Source) -> TokenSet:
        return prepare(source, opened, sequence_length, cache, progress)

    prepared = Prepared(
        tokenizer=opened,
        tokenizer_folder=folder,
        train=[TrainSet(source.name, source.weight, made(source)) for source in train_sources],
        valid={source.name: made(source) for source in valid_sources},
    )
    for one in prepared.train:
        _require_full_window(one.tokens)
    return prepared


def _trained_tokenizer(sources: Sequence[Source], vocab_size: int, cache: Path, progress: bool) -> Path:
    """The folder of the SentencePiece tokenizer of these texts; trained unless it is there."""
    files = [path for source in sources for path in source.files]
    contents = [[_reader(path).__name__, _describe(path)["sha256"]] for path in files]
    folder = cache / f"tokenizer-{_address([contents, vocab_size])}"
    if not _has_tokenizer(folder):
        with (
            _new_folder(folder, _TOKENIZER_FILE) as unfinished,
            _progress("training the tokenizer", files, progress) as advance,
        ):
            texts = (text for path in files for blocks in _documents(path, advance) for text in blocks)
            tokenizers.train_sentencepiece(texts, vocab_size, unfinished)
    return folder


def _has_tokenizer(folder: Path) -> bool:
    return (folder / _TOKENIZER_FILE).is_file()


def _tokenizer_beside(token_set: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer that made a prepared set lies in the same cache folder."""
    wanted = TokenSet.open(token_set).manifest["tokenizer_fingerprint"]
    for folder in filter(_has_tokenizer, sorted(token_set.absolute().parent.glob("tokenizer-*"))):
        tokenizer = tokenizers.load(folder)
        if tokenizer.fingerprint == wanted:
            return tokenizer, folder
    raise DataError(
        f"{token_set}: the tokenizer that made it is not in the folder above it; set data.tokenizer to that tokenizer"
    )


# ---- token sets -> batches


@dataclass(frozen=True)
class TokenSet:
    """A prepared set. `chunks` are the ids (memory-mapped, flat), `first_rows` the first row of every chunk."""

    folder: Path
    manifest: dict[str, Any]
    chunks: list[np.ndarray] = field(repr=False)
    first_rows: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> TokenSet:
        """Raises DataError when the folder is not a complete, sound token set."""
        import datasets

        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise DataError(f"{folder}: not a complete token set: it has no {MANIFEST}")
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            missing = [key for key, kind in _MANIFEST.items() if not isinstance(manifest.get(key), kind)]
            if missing:
                raise ValueError(f"{MANIFEST} does not say {', '.join(missing)}")
            rows, tokens, length = manifest["rows"], manifest["tokens"], manifest["sequence_length"]
            dataset = datasets.Dataset.load_from_disk(str(folder))
            lists = dataset.data.column("input_ids").chunks
            chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in lists]
        except Exception as error:
            what = f"{type(error).__name__} {error}".strip().splitlines()[0]
            raise DataError(
                f"{folder}: a damaged token set ({what}); delete the folder and prepare it again"
            ) from error
        held = sum(len(chunk) for chunk in chunks), sum(len(chunk) for chunk in lists)
        ragged = any(len(chunk) % length for chunk in chunks[:-1])
        if held != (tokens, rows) or ragged or rows != -(-tokens // length):
            raise DataError(
                f"{folder}: a damaged token set: it holds {held[0]} tokens in {held[1]} rows where its manifest says "
                f"{tokens} in {rows}; delete the folder and prepare it again"
            )
        first_rows = np.cumsum([0] + [len(chunk) for chunk in lists[:-1]])
        return cls(folder, manifest, chunks, first_rows)

    def __len__(self) -> int:
        """Rows, the last shorter one included."""
        return self.manifest["rows"]

    @property
    def sequence_length(self) -> int:
        return self.manifest["sequence_length"]

    @property
    def full_rows(self) -> int:
        """Rows of the full sequence length: those that training uses."""
        return self.manifest["tokens"] // self.sequence_length

    def row(self, index: int) -> np.ndarray:
        """The ids of one window, uint16 or int32 [sequence_length] (the last one may be shorter); not copied."""
        assert 0 <= index < len(self), f"row {index} of {len(self)}"
        chunk = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        start = (index - int(self.first_rows[chunk])) * self.sequence_length
        return self.chunks[chunk][start : start + self.sequence_length]

    def num_batches(self, micro_batch_size: int) -> int:
        return -(-len(self) // micro_batch_size)

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """All rows in order, for evaluation. Every batch is [micro_batch_size, sequence_length]: short and missing
        rows are filled with 0, without labels."""
        for start in range(0, len(self), micro_batch_size):
            rows = [self.row(index) for index in range(start, min(start + micro_batch_size, len(self)))]
            yield _batch(rows, micro_batch_size, self.sequence_length)


def _batch(rows: Sequence[np.ndarray], micro_batch_size: int, sequence_length: int) -> Batch:
    import torch

    input_ids = torch.zeros((micro_batch_size, sequence_length), dtype=torch.int64)  # [b, T]
    labels = torch.full_like(input_ids, IGNORE_INDEX)  # [b, T]
    for number, row in enumerate(rows):
        ids = torch.from_numpy(row.astype(np.int64))
        input_ids[number, : len(ids)] = ids
        labels[number, : len(ids) - 1] = ids[1:]
    return Batch(input_ids, labels)


def _fitting(token_set: TokenSet, tokenizer: Tokenizer, sequence_length: int) -> TokenSet:
    """Raise DataError unless this tokenizer and this sequence length made the set."""
    manifest = token_set.manifest
    if manifest["sequence_length"] != sequence_length:
        raise DataError(
            f"{token_set.folder}: prepared with windows of {manifest['sequence_length']} tokens, but "
            f"data.sequence_length is {sequence_length}"
        )
    if (manifest["tokenizer_fingerprint"], manifest["vocab_size"]) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise DataError(
            f"{token_set.folder}: prepared with another tokenizer (vocabulary {manifest['vocab_size']}, fingerprint "
            f"{manifest['tokenizer_fingerprint'][:12]}) than data.tokenizer gives (vocabulary {tokenizer.vocab_size}, "
            f"fingerprint {tokenizer.fingerprint[:12]})"
        )
    return token_set


def _require_full_window(token_set: TokenSet) -> None:
    if token_set.full_rows == 0:
        raise DataError(
            f"{token_set.folder}: {token_set.manifest['tokens']} tokens of training text are less than one window of "
            f"data.sequence_length = {token_set.sequence_length} tokens"
        )


class TrainStream:
    """The micro-batches of a run: `batch(i)` depends on the sets, the weights, the seed and i, and on nothing else.

    Row g of a run (counted from its start) belongs to epoch g // rows_per_epoch and is drawn without replacement
    from it. Without weights an epoch holds every full window once. With weights it holds round(share x rows) windows
    of every set (at least one), which are the next ones of that set's own permutations.
    """

    def __init__(
        self, sets: Sequence[TokenSet], weights: Sequence[float | None] | None, seed: int, micro_batch_size: int
    ) -> None:
        """Raises DataError for a set without a full window. Weights are all numbers above 0, or all None."""
        assert sets and micro_batch_size > 0 and seed >= 0
        assert len({token_set.sequence_length for token_set in sets}) == 1, "sets of different sequence length"
        for token_set in sets:
            _require_full_window(token_set)
        rows = [token_set.full_rows for token_set in sets]
        given = [weight for weight in weights or [] if weight is not None]
        assert len(given) in (0, len(sets)), "a weight for every set, or for none"
        self.sets = list(sets)
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.rows_of_set = [max(1, round(weight / sum(given) * sum(rows))) for weight in given] or rows
        self.rows_per_epoch = sum(self.rows_of_set)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` since the start of the run: [micro_batch_size, sequence_length]."""
        first = index * self.micro_batch_size
        rows = []
        for row in range(first, first + self.micro_batch_size):
            number, of_set = self._order(row // self.rows_per_epoch)[row % self.rows_per_epoch]
            rows.append(self.sets[number].row(int(of_set)))
        return _batch(rows, self.micro_batch_size, self.sets[0].sequence_length)

    def position(self, index: int) -> dict[str, int]:
        """Where micro-batch `index` begins: the epoch, and the rows of it that are used before."""
        epoch, offset = divmod(index * self.micro_batch_size, self.rows_per_epoch)
        return {"epoch": epoch, "offset": offset}

    def index(self, position: Mapping[str, int]) -> int:
        """The micro-batch that begins at a position. Raises DataError when none does, with these data and sizes."""
        row = position["epoch"] * self.rows_per_epoch + position["offset"]
        if row % self.micro_batch_size or not 0 <= position["offset"] < self.rows_per_epoch:
            raise DataError(
                f"no micro-batch begins at row {position['offset']} of epoch {position['epoch']}: an epoch has "
                f"{self.rows_per_epoch} rows and a micro-batch {self.micro_batch_size}; the position belongs to other "
                "data or another train.micro_batch_size"
            )
        return row // self.micro_batch_size

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order of use, int64 [rows_per_epoch, 2]: (number of the set, row of the set)."""
        if epoch not in self._orders:
            drawn = [self._drawn(number, epoch) for number in range(len(self.sets))]
            numbers = np.repeat(np.arange(len(drawn)), self.rows_of_set)
            order = _permutation(self.rows_per_epoch, self.seed, 0, epoch)
            # A micro-batch can lie across two epochs; older ones are done with.
            self._orders = {old: rows for old, rows in self._orders.items() if abs(old - epoch) == 1}
            self._orders[epoch] = np.stack([numbers, np.concatenate(drawn)], axis=1)[order]
        return self._orders[epoch]

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        """The rows of one set in an epoch: a stretch of the set's endless series of permutations."""
        start = epoch * self.rows_of_set[number]
        stop, rows = start + self.rows_of_set[number], self.sets[number].full_rows
        rounds = range(start // rows, (stop - 1) // rows + 1)
        series = np.concatenate([_permutation(rows, self.seed, 1, number, which) for which in rounds])
        return series[start - rounds[0] * rows : stop - rounds[0] * rows]


def _permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of range(length), a function of `key`. NumPy keeps the raw bits of a generator the same for ever,
    which it does not promise of its shuffles."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(length), kind="stable")
