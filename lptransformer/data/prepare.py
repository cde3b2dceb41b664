"""Text and examples to packed token sets on disk.

`prepare_all` turns the sources of a configuration into token sets: content-addressed folders with one Arrow file of
token windows and a manifest. A folder is built under another name, synced, and renamed when it is complete, so what
is there is whole, and several processes may prepare at once.

A set of text has its documents one behind the other in full windows. A set of examples says which tokens carry a
label, and where documents begin. data/windows makes both.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lptransformer import files
from lptransformer.console import bar
from lptransformer.data import chat, rows, windows
from lptransformer.data import tokenizer as tokenizers
from lptransformer.data.readers import MANIFEST, Source, describe, documents, examples, is_text, layout, parse_all
from lptransformer.data.token_set import TokenSet, Window, fitting, require_full_window, sum_of_manifest
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.data.train_stream import TrainStream
from lptransformer.data.windows import Counts, WindowOptions
from lptransformer.errors import ConfigError, DataError

_FORMAT = 1  # part of every content address: raise it when what is written changes
_EXAMPLES = 2  # the format of sets with labels of their own or isolated documents, and of all addresses with options
_DATA_FILE = "data-00000-of-00001.arrow"
_TOKENIZER_FILE = "tokenizer_config.json"  # every tokenizer folder has it
_ROWS_PER_CHUNK = 1024


def _write_windows(
    folder: Path, blocks: Iterable[np.ndarray], sequence_length: int, vocab_size: int, address: str
) -> tuple[int, dict[str, list[int | str]]]:
    """Write the ids as rows of `sequence_length` (the last may be shorter); see `_write_tables`."""

    def tables() -> Iterator[dict[str, tuple[np.ndarray, Sequence[int]]]]:
        def table(ids: np.ndarray) -> dict[str, tuple[np.ndarray, Sequence[int]]]:
            return {"input_ids": (ids, [*range(0, len(ids), sequence_length), len(ids)])}

        chunk = _ROWS_PER_CHUNK * sequence_length
        rest = np.empty(0, np.int32)
        for block in blocks:
            rest = np.concatenate([rest, block])
            whole = len(rest) // chunk * chunk
            for start in range(0, whole, chunk):
                yield table(rest[start : start + chunk])
            rest = rest[whole:]
        if len(rest):
            yield table(rest)

    return _write_tables(folder, tables(), {"input_ids": _kind(vocab_size)}, vocab_size, address)


def _write_rows(
    folder: Path, rows_of_set: Iterable[Window], vocab_size: int, address: str
) -> tuple[int, dict[str, list[int | str]]]:
    """Write windows with their labels and the starts of their documents; see `_write_tables`."""
    kinds = {"input_ids": _kind(vocab_size), "labelled": np.dtype(np.uint8), "starts": np.dtype(np.int32)}

    def tables() -> Iterator[dict[str, tuple[np.ndarray, Sequence[int]]]]:
        for some in windows.batched(rows_of_set, _ROWS_PER_CHUNK):
            lists = zip(*(one[:3] for one in some), strict=True)  # ids, labelled, starts
            yield {
                name: (np.concatenate(column), [0, *np.cumsum([len(one) for one in column]).tolist()])
                for name, column in zip(kinds, lists, strict=True)
            }

    return _write_tables(folder, tables(), kinds, vocab_size, address)


def _kind(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def _write_tables(
    folder: Path,
    tables: Iterable[Mapping[str, tuple[np.ndarray, Sequence[int]]]],
    kinds: Mapping[str, np.dtype[Any]],
    vocab_size: int,
    address: str,
) -> tuple[int, dict[str, list[int | str]]]:
    """Write columns of lists, each as its values and where its rows begin and the last one ends; returns the number of
    rows and, by file, its size and sum.

    The folder is what `datasets.Dataset.save_to_disk` writes, but for the fingerprint, which that draws at random.
    """
    import pyarrow as pa
    from datasets import DatasetInfo, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({name: List(Value(kind.name)) for name, kind in kinds.items()})
    rows = 0
    with (
        files.SummedFile(folder / _DATA_FILE) as raw,
        io.BufferedWriter(raw) as file,
        ArrowWriter(stream=file, features=features) as writer,
    ):
        for table in tables:
            ids, ends = table["input_ids"]
            assert ids.min() >= 0 and ids.max() < vocab_size, "the tokenizer gave an id outside its vocabulary"
            lists = {
                name: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.astype(kinds[name])))
                for name, (values, ends) in table.items()
            }
            writer.write_table(pa.table(lists))
            rows += len(ends) - 1
        writer.finalize(close_stream=False)
        file.flush()
        records = {_DATA_FILE: raw.record}
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": _DATA_FILE}], "_fingerprint": address}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    state |= {"_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    return rows, records | {name: files.record(folder / name) for name in ("dataset_info.json", "state.json")}


@contextmanager
def _new_folder(final: Path, marker: str) -> Iterator[Path]:
    """A folder to fill that becomes `final` when the block ends well, and vanishes when it does not.

    When another process made `final` (which holds the file `marker`) in the meantime, that one stays.
    """
    try:
        with files.unfinished(final) as folder:
            yield folder
            files.sync_all(folder)
            try:
                folder.rename(final)
            except OSError:
                if not (final / marker).is_file():  # damaged by hand: no process leaves such a folder
                    shutil.rmtree(final)
                    folder.rename(final)
            files.sync(final.parent)
    except OSError as error:
        raise DataError(f"data.cache: {final} cannot be written: {error}") from error


def _address(content: Any, options: Mapping[str, Any] | None = None) -> str:
    """Of what is there without options, what it always was."""
    whole = [_EXAMPLES, content, options] if options else [_FORMAT, content]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _contents(source: Source) -> list[list[str]]:
    return [[rows.address(path), describe(path)["sha256"]] for path in source.files]


def _part_and_columns(source: Source, has_template: bool) -> dict[str, Any]:
    """What of a source is read, where that is not the whole and the column "text"."""
    layouts = [layout(path, source, has_template) for path in source.files]
    found: dict[str, Any] = {} if source.part is None else {"part": [source.part, source.held_out]}
    if any(one.columns not in ((), ("text",)) for one in layouts):
        found["layouts"] = [[one.format, one.columns] for one in layouts]
    return found


def _options(source: Source, tokenizer: Tokenizer, options: WindowOptions, text: bool) -> dict[str, Any]:
    """What decides a token set beside the files, the tokenizer and the length; nothing for whole, plain text."""
    found = _part_and_columns(source, tokenizer.has_template)
    begins = options.begins(tokenizer)
    if begins or not text:
        found["bos_token_id"] = tokenizer.backend.bos_token_id
    if not text:
        found |= {"loss_on": options.loss_on, "long_rows": options.long_rows, "bos": [options.bos, begins]}
        found |= {"isolated": options.isolates(text)}
        if tokenizer.has_template:
            found["template"] = chat.template_address(tokenizer)
    elif begins or options.isolates(text):
        found |= {"begins": begins, "isolated": options.isolates(text)}
    return found


def _bytes_of(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    sequence_length: int,
    cache: str | Path,
    progress: bool = True,
    options: WindowOptions = WindowOptions(),  # noqa: B008 (it cannot be changed)
) -> TokenSet:
    """The token set of a source: opened when it is prepared already, made below `cache` when it is not.

    Raises DataError for files that are not as they should be, and for a prepared set that another tokenizer or
    another sequence length made.
    """
    if source.prepared is not None:
        return _as_asked(fitting(TokenSet.open(source.prepared), tokenizer, sequence_length), tokenizer, options)
    text = is_text(source, tokenizer.has_template)
    of_set = _options(source, tokenizer, options, text)
    address = _address([_contents(source), tokenizer.fingerprint, sequence_length], of_set)
    folder = Path(cache) / f"{source.name}-{address}"
    plain = text and not options.isolates(text)
    if not (folder / MANIFEST).is_file():
        counts = Counts()
        with (
            _new_folder(folder, MANIFEST) as unfinished,
            bar(f"tokenising {source.name}", _bytes_of(source.files), in_bytes=True, shown=progress) as advance,
        ):
            if text:
                parts = windows.text_tokens(source, tokenizer, options, counts, advance)
                rows_of_set = windows.isolated_windows(parts, sequence_length)
            else:
                encoded = windows.encoded_examples(source, tokenizer, options, counts, advance)
                rows_of_set = windows.packed(encoded, tokenizer, options, sequence_length, counts)

            def noted(parts: Iterable[Any]) -> Iterator[Any]:
                for part in parts:
                    counts.tokens += len(part[0])
                    yield part

            if plain:
                ids = (part[0] for part in noted(parts))
                many, written = _write_windows(unfinished, ids, sequence_length, tokenizer.vocab_size, address)
            else:
                many, written = _write_rows(unfinished, noted(rows_of_set), tokenizer.vocab_size, address)
            if many == 0:
                raise DataError(f"{source.name}: {_nothing(source, counts, sequence_length)}")
            manifest: dict[str, Any] = {
                "format": _FORMAT if plain else _EXAMPLES,
                "name": source.name,
                "sources": [describe(path) for path in source.files],
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "sequence_length": sequence_length,
                "rows": many,
                "tokens": counts.tokens,
                "documents": counts.documents,
                "bytes": counts.bytes,
                "words": counts.words,
                "files": written,
            }
            if not plain:
                manifest["isolate_documents"] = options.isolates(text)
            manifest["begins"] = options.begins(tokenizer)
            if not text:
                manifest |= {"long_rows": counts.long_rows, "left_out": counts.left_out}
            manifest["sum"] = sum_of_manifest(manifest)
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    prepared = fitting(TokenSet.open(folder), tokenizer, sequence_length)
    if progress and prepared.manifest.get("long_rows"):
        print(_of_long_rows(source.name, prepared.manifest, options), flush=True)
    return prepared


def _as_asked(prepared: TokenSet, tokenizer: Tokenizer, options: WindowOptions) -> TokenSet:
    """Raise DataError where a prepared set is not what keys say that decided how it was made; older ones do not tell
    all."""
    asked = {"isolate_documents": options.isolate_documents}
    asked["bos"] = None if options.bos == "auto" else options.begins(tokenizer)
    made = {"isolate_documents": prepared.isolated, "bos": prepared.manifest.get("begins")}
    for key, value in asked.items():
        if None not in (value, made[key]) and value != made[key]:
            without = "" if made[key] else "out"
            what = "documents kept apart" if key == "isolate_documents" else "begin-of-text tokens"
            raise DataError(
                f"{prepared.folder}: prepared with{without} {what}, but data.{key} asks for the other: remove "
                "the key, or give the text as data.train and data.valid"
            )
    return prepared


def _nothing(source: Source, counts: Counts, sequence_length: int) -> str:
    if counts.documents:
        return f"no example has an answer within a window of data.sequence_length = {sequence_length} tokens"
    return f"data.valid = {source.held_out} leaves no document for this part ({source.part}) of {source.files[0]}"


def _of_long_rows(name: str, manifest: Mapping[str, Any], options: WindowOptions) -> str:
    many, of, length = manifest["long_rows"], manifest["documents"], manifest["sequence_length"]
    out = manifest["left_out"]
    done, left = "truncated" if options.long_rows == "truncate" else "split", ""
    if out:
        left = f"; {out} {'of them' if done == 'truncated' else 'pieces'} without an answer left out"
    return f"{name}: {many} of {of} rows are longer than the window of {length} tokens: {done} (data.long_rows){left}"


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

    def stream(self, seed: int, micro_batch_size: int) -> TrainStream:
        """The micro-batches of a run over the training sets."""
        sets, weights = [one.tokens for one in self.train], [one.weight for one in self.train]
        return TrainStream(sets, weights, seed, micro_batch_size)

    @property
    def rows_per_epoch(self) -> int:
        """The windows of an epoch, of a mixture as its weights make one."""
        return self.stream(0, 1).rows_per_epoch


def check_ids(largest_id: int, source: Source, where: str, tokenizer: Tokenizer, embedded: int) -> None:
    """Raise DataError where a text of this source, whose `largest_id` that is, uses one that the model does not embed.

    A tokenizer may have ids above the model's as long as nothing uses them: some have tokens that no text holds.
    """
    if largest_id < embedded:
        return
    found = largest_id

    def largest(arrays: Iterable[np.ndarray]) -> int:
        return max((int(one.max()) for one in arrays if len(one)), default=-1)

    for path in source.files:
        alone, options = replace(source, files=(path,), held_out=None, part=None), WindowOptions(bos="never")
        made = windows.text_tokens if is_text(alone, tokenizer.has_template) else windows.encoded_examples
        if (
            of_file := largest(one[0] for one in made(alone, tokenizer, options, Counts(), lambda read: None))
        ) >= embedded:
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
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    **options: Any,
) -> Prepared:
    """Make what is missing below `cache`, and open all of it; the arguments are the keys of the section `data`.

    train, valid, format, fields: see `parse_all`; options: see `WindowOptions`. vocab_size counts for the tokenizer
    "sentencepiece" alone, which is trained on the text of `train` (or is the one that made the prepared sets in
    `train`); without `train` (None) a program has the rows of training, and there is no such tokenizer. Ids
    of a text must be below `embedded`; None: the model embeds all.
    Raises DataError or ConfigError for all that can be wrong with the sources, also a training set without one full
    window.
    """
    how = WindowOptions(**options)
    tokenizers.check_name(tokenizer)
    train_sources, valid_sources = parse_all(train, valid, format, fields)
    if train is None and tokenizer == tokenizers.SENTENCEPIECE:
        raise ConfigError(
            "data.tokenizer is sentencepiece, which is trained on training text, and train_data has none: give another"
        )
    if train is not None and not train_sources:
        raise ConfigError("data.train: names no text; give a glob, a list of globs or a mapping of names to globs")
    files.remove_unfinished(Path(cache))
    there = set(Path(cache).glob("tokenizer-*"))
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
        tokens = prepare(source, opened, sequence_length, cache, progress, how)
        if embedded is not None:
            check_ids(tokens.largest_id, source, str(tokens.folder), opened, embedded)
        return tokens

    sets: list[TokenSet] = []
    try:
        for source in (*train_sources, *valid_sources):
            sets.append(made(source))
    except BaseException:
        if not sets and folder not in there:  # a tokenizer of which there is no set
            shutil.rmtree(folder, ignore_errors=True)
        raise
    train_sets, valid_sets = sets[: len(train_sources)], sets[len(train_sources) :]
    prepared = Prepared(
        tokenizer=opened,
        tokenizer_folder=folder,
        train=[TrainSet(one.name, one.weight, tokens) for one, tokens in zip(train_sources, train_sets, strict=True)],
        valid={one.name: tokens for one, tokens in zip(valid_sources, valid_sets, strict=True)},
    )
    for one in prepared.train:
        require_full_window(one.tokens)
    return prepared


def vocabulary(train: Any, valid: Any, tokenizer: str, vocab_size: int) -> int:
    """The number of ids that `prepare_all` would give, without making anything; its arguments, and its errors where
    files or the tokenizer are missing."""
    tokenizers.check_name(tokenizer)
    train_sources, _ = parse_all(train, valid)
    if tokenizer != tokenizers.SENTENCEPIECE:
        return tokenizers.load(tokenizer).vocab_size
    prepared = next((source.prepared for source in train_sources if source.prepared), None)
    return vocab_size if prepared is None else _tokenizer_beside(prepared)[0].vocab_size


def _trained_tokenizer(sources: Sequence[Source], vocab_size: int, cache: Path, progress: bool) -> Path:
    """The folder of the SentencePiece tokenizer of these texts; trained unless it is there."""
    texts_alone = [is_text(source, has_template=False) for source in sources]
    contents = [one for source in sources for one in _contents(source)]
    parts = [_part_and_columns(source, has_template=False) for source in sources]
    folder = cache / f"tokenizer-{_address([contents, vocab_size], {'parts': parts} if any(parts) else None)}"
    if not _has_tokenizer(folder):
        size = sum(_bytes_of(source.files) for source in sources)
        with (
            _new_folder(folder, _TOKENIZER_FILE) as unfinished,
            bar("training the tokenizer", size, in_bytes=True, shown=progress) as advance,
        ):

            def texts() -> Iterator[str]:
                for source, text in zip(sources, texts_alone, strict=True):
                    if text:
                        yield from (block for blocks in documents(source, advance) for block in blocks)
                    else:
                        yield from (f"{prompt}{answer}" for _, prompt, answer in examples(source, False, advance))

            tokenizers.train_sentencepiece(texts(), vocab_size, unfinished)
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
