"""Prepared token sets: windows of token ids on disk, memory-mapped, and the batches they give."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lptransformer import files
from lptransformer.data.readers import MANIFEST
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
_MANIFEST: dict[str, type] = {"tokenizer_fingerprint": str, "sources": list}  # what must be there, and of which type
_MANIFEST |= dict.fromkeys(["sequence_length", "vocab_size", "rows", "tokens", "bytes", "words"], int)


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [micro_batch_size, sequence_length]; labels[t] = input_ids[t + 1], -100 for no label.

    position_ids: the same shape, where documents are isolated: they begin again at 0 at every document and at the
    padding. document_ids: then, which document of its window a position belongs to, counted from 0; None where every
    window is one.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        every = (self.input_ids, self.labels, self.position_ids, self.document_ids)
        return [tensor for tensor in every if tensor is not None]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; on a GPU the host does not wait for that."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or device.type != "cuda":
                return None if tensor is None else tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        input_ids, labels = moved(self.input_ids), moved(self.labels)
        assert input_ids is not None and labels is not None
        return Batch(input_ids, labels, moved(self.position_ids), moved(self.document_ids))

    @property
    def label_tokens(self) -> int:
        """How many positions have a label."""
        return int((self.labels != IGNORE_INDEX).sum())

    @cached_property
    def digest(self) -> int:
        """A checksum of ids and labels, above 0: by it processes see that they train on the same rows."""
        return zlib.crc32(self.labels.numpy().tobytes(), zlib.crc32(self.input_ids.numpy().tobytes())) or 1


class Window(NamedTuple):
    """One row of a set, up to sequence_length tokens. ids: uint16, int32 or int64 [tokens].

    labelled: uint8 [tokens], 1 where a token is to be predicted (never the first one); None: all but the first.
    starts: int32 [documents], where those begin, the first at 0; None where documents are not isolated.
    labels: int64 [tokens], what is to be predicted in place of each id, -100 for nothing; None: the ids.
    """

    ids: np.ndarray
    labelled: np.ndarray | None = None
    starts: np.ndarray | None = None
    labels: np.ndarray | None = None


class Column(NamedTuple):
    """A column of lists: the values of every chunk (memory-mapped, flat), and where in them each of its rows begins,
    and the last one ends."""

    values: list[np.ndarray]
    offsets: list[np.ndarray]


@dataclass(frozen=True)
class TokenSet:
    """A prepared set. `chunks` are the ids (memory-mapped, flat), `first_rows` the first row of every chunk.

    `columns`: "input_ids" and, where not every token carries a label or documents are isolated, "labelled" and
    "starts" (see Window). `largest_id` is that of all tokens, below the vocabulary of the manifest.
    """

    folder: Path
    manifest: dict[str, Any]
    columns: dict[str, Column] = field(repr=False)
    first_rows: np.ndarray = field(repr=False)
    largest_id: int

    @classmethod
    def open(cls, folder: str | Path) -> TokenSet:
        """Raises DataError when the folder is not a complete, sound token set: one with the files that were written.

        Sizes are compared each time; sums and ids once per host, and when a file has changed (files.noted_of).
        """
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
            for name, (size, _) in manifest.get("files", {}).items():
                if (found := (folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes, and {MANIFEST} says {size}")
            dataset = datasets.Dataset.load_from_disk(str(folder))
            names = ["input_ids", "labelled", "starts"] if manifest.get("format") == 2 else ["input_ids"]
            columns = {name: _column(dataset.data.column(name).chunks) for name in names}
        except Exception as error:
            what = f"{type(error).__name__} {error}".strip().splitlines()[0]
            raise _damaged(folder, f" ({what})") from error
        chunks, offsets = columns["input_ids"]
        sizes = [np.diff(of_chunk) for of_chunk in offsets]
        held = sum(len(chunk) for chunk in chunks), sum(len(of_chunk) for of_chunk in sizes)
        if "labelled" in columns:
            sound = all((of_chunk <= length).all() for of_chunk in sizes)
        else:
            sound = rows == -(-tokens // length) and not any(len(chunk) % length for chunk in chunks[:-1])
        if held != (tokens, rows) or not sound:
            what = f": it holds {held[0]} tokens in {held[1]} rows where its manifest says {tokens} in {rows}"
            raise _damaged(folder, what)
        try:
            largest = files.noted_of(folder, "token-sets", partial(_largest_of_checked, folder, manifest, chunks))
        except OSError as error:
            raise _damaged(folder, f" ({error})") from None
        if largest >= manifest["vocab_size"]:
            raise _damaged(folder, f": it holds the id {largest}, and its vocabulary has {manifest['vocab_size']} ids")
        first_rows = np.cumsum([0] + [len(of_chunk) for of_chunk in sizes[:-1]])
        return cls(folder, manifest, columns, first_rows, largest)

    @property
    def chunks(self) -> list[np.ndarray]:
        return self.columns["input_ids"].values

    def __len__(self) -> int:
        """Rows, the last shorter one included."""
        return self.manifest["rows"]

    @property
    def sequence_length(self) -> int:
        return self.manifest["sequence_length"]

    @property
    def isolated(self) -> bool:
        """Whether no document is to see another one."""
        return bool(self.manifest.get("isolate_documents"))

    @property
    def full_rows(self) -> int:
        """Rows that training uses: of plain text those of the full sequence length, else all."""
        return len(self) if "labelled" in self.columns else self.manifest["tokens"] // self.sequence_length

    def _of(self, name: str, index: int) -> np.ndarray:
        """A row of a column; not copied."""
        assert 0 <= index < len(self), f"row {index} of {len(self)}"
        chunk = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        first, last = self.columns[name].offsets[chunk][index - self.first_rows[chunk] :][:2]
        return self.columns[name].values[chunk][first:last]

    def row(self, index: int) -> np.ndarray:
        """The ids of one window, uint16 or int32 [sequence_length] (or shorter: the last one, and those of
        examples); not copied."""
        return self._of("input_ids", index)

    def window(self, index: int) -> Window:
        """One window with all that is known of it; not copied."""
        labelled = self._of("labelled", index) if "labelled" in self.columns else None
        return Window(self.row(index), labelled, self._of("starts", index) if self.isolated else None)

    def label_counts(self, rows: Iterable[int]) -> np.ndarray:
        """The number of labels of each of these rows, int64, without reading tokens."""
        if "labelled" in self.columns:
            return np.array([self._of("labelled", index).sum(dtype=np.int64) for index in rows], np.int64)
        indices, length = np.fromiter(rows, np.int64), self.sequence_length
        return np.clip(self.manifest["tokens"] - indices * length, 0, length) - 1

    def num_batches(self, micro_batch_size: int) -> int:
        return -(-len(self) // micro_batch_size)

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """All rows in order, for evaluation. Every batch is [micro_batch_size, sequence_length]: short and missing
        rows are filled with 0, without labels."""
        for start in range(0, len(self), micro_batch_size):
            windows = [self.window(index) for index in range(start, min(start + micro_batch_size, len(self)))]
            yield make_batch(windows, micro_batch_size, self.sequence_length)


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"{folder}: a damaged token set{what}; delete the folder and prepare it again")


def sum_of_manifest(manifest: Mapping[str, Any]) -> str:
    """What stands in it as `sum`: that of all else."""
    return files.sum_of_text(json.dumps({key: value for key, value in manifest.items() if key != "sum"}))


def _largest_of_checked(folder: Path, manifest: Mapping[str, Any], chunks: Sequence[np.ndarray]) -> int:
    """The largest id, read behind the files' sums, when the pages are there; a negative one counts as 2**32 less it.

    Raises DataError where a file is not what was written. Sets of older versions have no sums.
    """
    expected = {name: written for name, (_, written) in manifest.get("files", {}).items()}
    found = {name: files.sum_of(folder / name) for name in expected}
    if "sum" in manifest:
        expected[MANIFEST], found[MANIFEST] = manifest["sum"], sum_of_manifest(manifest)
    for name, written in expected.items():
        if found[name] != written:
            what = f": {name} is not what was written (its xxh3-128 is {found[name]}, and {MANIFEST} says {written})"
            raise _damaged(folder, what)
    return max((int(chunk.view(f"u{chunk.itemsize}").max()) for chunk in chunks if len(chunk)), default=-1)


def _column(lists: Sequence[Any]) -> Column:
    """A column of Arrow lists."""
    values = [one.flatten().to_numpy(zero_copy_only=True) for one in lists]
    offsets = [one.offsets.to_numpy() - one.offsets[0].as_py() for one in lists]
    return Column(values, offsets)


def label_count(window: Window) -> int:
    """The labels of a window, of which no token is without one by `labelled`."""
    return int((window.labels[1:] != IGNORE_INDEX).sum()) if window.labels is not None else len(window.ids) - 1


def make_batch(windows: Sequence[Window], micro_batch_size: int, sequence_length: int) -> Batch:
    import torch

    shape = (micro_batch_size, sequence_length)
    input_ids = torch.zeros(shape, dtype=torch.int64)  # [b, T]
    labels = torch.full_like(input_ids, IGNORE_INDEX)  # [b, T]
    for number, (row, labelled, _, wanted) in enumerate(windows):
        ids = torch.from_numpy(row.astype(np.int64))
        input_ids[number, : len(ids)] = ids
        labels[number, : len(ids) - 1] = (ids if wanted is None else torch.from_numpy(wanted))[1:]
        if labelled is not None:
            labels[number, : len(ids) - 1][torch.from_numpy(labelled[1:] == 0)] = IGNORE_INDEX
    if all(window.starts is None for window in windows):
        return Batch(input_ids, labels)
    positions = np.zeros(shape, np.int64)
    for number, (row, _, starts, _) in enumerate(windows):
        positions[number] = positions_of([0] if starts is None else starts, len(row), sequence_length)
    begins = positions[:, 1:] != positions[:, :-1] + 1
    documents = np.concatenate([np.zeros((micro_batch_size, 1), np.int64), begins.cumsum(1)], axis=1)
    of_several = torch.from_numpy(documents) if begins.any() else None
    return Batch(input_ids, labels, torch.from_numpy(positions), of_several)


def positions_of(starts: Sequence[int] | np.ndarray, tokens: int, length: int) -> np.ndarray:
    """Positions in documents that begin at `starts`, int64 [length]; again from 0 where the padding begins."""
    begins = np.zeros(length, np.int64)
    borders = np.array([*starts, tokens], np.int64)
    borders = borders[borders < length]
    begins[borders] = borders
    return np.arange(length) - np.maximum.accumulate(begins)


def whole_rounds(batches: Iterable[Batch], replicas: int) -> Iterator[Batch]:
    """The batches, and as many without labels as make every replica's share equal: at ZeRO 3 each forward pass is a
    collective of all replicas."""
    number, batch = 0, None
    for batch in batches:
        number += 1
        yield batch
    if batch is not None:
        import torch

        blank = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
        yield from itertools.repeat(blank, -number % replicas)


def fitting(token_set: TokenSet, tokenizer: Tokenizer, sequence_length: int) -> TokenSet:
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


def require_full_window(token_set: TokenSet) -> None:
    if token_set.full_rows == 0:
        raise DataError(
            f"{token_set.folder}: {token_set.manifest['tokens']} tokens of training text are less than one window of "
            f"data.sequence_length = {token_set.sequence_length} tokens"
        )
