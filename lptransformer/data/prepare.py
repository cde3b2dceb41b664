"""Text to packed token sets on disk.

`prepare_all` turns the sources of a configuration into token sets: content-addressed folders with one Arrow file of
token windows and a manifest. A folder is built under another name and renamed when it is complete, so what is there
is whole, and several processes may prepare at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lptransformer.console import bar
from lptransformer.data import tokenizer as tokenizers
from lptransformer.data.readers import MANIFEST, Advance, Source, describe, documents, parse_sources, reader
from lptransformer.data.token_set import TokenSet, fitting, require_full_window
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.errors import ConfigError, DataError

_FORMAT = 1  # part of every content address: raise it when what is written changes
_DATA_FILE = "data-00000-of-00001.arrow"
_TOKENIZER_FILE = "tokenizer_config.json"  # every tokenizer folder has it
_BLOCK = 1 << 22  # characters encoded at a time
_ROWS_PER_CHUNK = 1024


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
        for blocks in documents(path, advance):
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


def _bytes_of(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def prepare(
    source: Source, tokenizer: Tokenizer, sequence_length: int, cache: str | Path, progress: bool = True
) -> TokenSet:
    """The token set of a source: opened when it is prepared already, made below `cache` when it is not.

    Raises DataError for files that are not as they should be, and for a prepared set that another tokenizer or
    another sequence length made.
    """
    if source.prepared is not None:
        return fitting(TokenSet.open(source.prepared), tokenizer, sequence_length)
    sources = [describe(path) for path in source.files]
    contents = [[reader(path).__name__, one["sha256"]] for path, one in zip(source.files, sources, strict=True)]
    address = _address([contents, tokenizer.fingerprint, sequence_length])
    folder = Path(cache) / f"{source.name}-{address}"
    if not (folder / MANIFEST).is_file():
        counts = _Counts()
        with (
            _new_folder(folder, MANIFEST) as unfinished,
            bar(f"tokenising {source.name}", _bytes_of(source.files), in_bytes=True, shown=progress) as advance,
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
    return fitting(TokenSet.open(folder), tokenizer, sequence_length)


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

    def folders(self) -> dict[str, dict[str, str]]:
        """The folders of all token sets, absolute, by "train" and "valid" and by name."""
        return {
            "train": {one.name: str(one.tokens.folder.absolute()) for one in self.train},
            "valid": {name: str(tokens.folder.absolute()) for name, tokens in self.valid.items()},
        }


def check_ids(
    ids: Iterable[np.ndarray], files: Sequence[Path], where: str, tokenizer: Tokenizer, embedded: int
) -> None:
    """Raise DataError where a text, whose `ids` come from these files, uses one that the model does not embed.

    A tokenizer may have ids above the model's as long as nothing uses them: some have tokens that no text holds.
    """
    if tokenizer.vocab_size <= embedded:
        return

    def largest(arrays: Iterable[np.ndarray]) -> int:
        return max((int(one.max()) for one in arrays if len(one)), default=-1)

    found = largest(ids)
    if found < embedded:
        return
    for path in files:
        if (of_file := largest(_tokens([path], tokenizer, _Counts(), lambda read: None))) >= embedded:
            where, found = str(path), of_file
            break
    token = tokenizer.backend.convert_ids_to_tokens(found)
    raise DataError(
        f"{where}: its text uses the id {found} ({token}) of the tokenizer, and the model has a vocabulary of "
        f"{embedded} (ids from 0): use the model's own tokenizer, or a text without it"
    )


def prepare_all(
    train: Any,
    valid: Any,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    cache: str | Path,
    progress: bool = True,
    embedded: int | None = None,
) -> Prepared:
    """Make what is missing below `cache`, and open all of it; the arguments are the keys of the section `data`.

    train, valid: see `parse_sources`. vocab_size counts for the tokenizer "sentencepiece" alone, which is trained on
    the text of `train` (or is the one that made the prepared sets in `train`). Ids of a text must be below `embedded`;
    None: the model embeds all.
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
        tokens = prepare(source, opened, sequence_length, cache, progress)
        if embedded is not None:
            check_ids(tokens.chunks, source.files, str(tokens.folder), opened, embedded)
        return tokens

    prepared = Prepared(
        tokenizer=opened,
        tokenizer_folder=folder,
        train=[TrainSet(source.name, source.weight, made(source)) for source in train_sources],
        valid={source.name: made(source) for source in valid_sources},
    )
    for one in prepared.train:
        require_full_window(one.tokens)
    return prepared


def vocabulary(train: Any, valid: Any, tokenizer: str, vocab_size: int) -> int:
    """The number of ids that `prepare_all` would give, without making anything; its arguments, and its errors where
    files or the tokenizer are missing."""
    tokenizers.check_name(tokenizer)
    train_sources, _ = parse_sources(train, "train"), parse_sources(valid, "valid")
    if tokenizer != tokenizers.SENTENCEPIECE:
        return tokenizers.load(tokenizer).vocab_size
    prepared = next((source.prepared for source in train_sources if source.prepared), None)
    return vocab_size if prepared is None else _tokenizer_beside(prepared)[0].vocab_size


def _trained_tokenizer(sources: Sequence[Source], vocab_size: int, cache: Path, progress: bool) -> Path:
    """The folder of the SentencePiece tokenizer of these texts; trained unless it is there."""
    files = [path for source in sources for path in source.files]
    contents = [[reader(path).__name__, describe(path)["sha256"]] for path in files]
    folder = cache / f"tokenizer-{_address([contents, vocab_size])}"
    if not _has_tokenizer(folder):
        with (
            _new_folder(folder, _TOKENIZER_FILE) as unfinished,
            bar("training the tokenizer", _bytes_of(files), in_bytes=True, shown=progress) as advance,
        ):
            texts = (text for path in files for blocks in documents(path, advance) for text in blocks)
            tokenizers.train_sentencepiece(texts, vocab_size, unfinished)
    return folder


def _has_tokenizer(folder: Path) -> bool:
    return (folder / _TOKENIZER_FILE).is_file()


def _tokenizer_beside(token_set: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer that made a prepared set, from the same cache folder."""
    wanted = TokenSet.open(token_set).manifest["tokenizer_fingerprint"]
    for folder in filter(_has_tokenizer, sorted(token_set.absolute().parent.glob("tokenizer-*"))):
        tokenizer = tokenizers.load(folder)
        if tokenizer.fingerprint == wanted:
            return tokenizer, folder
    raise DataError(
        f"{token_set}: the tokenizer that made it is not in the folder above it; set data.tokenizer to that tokenizer"
    )
