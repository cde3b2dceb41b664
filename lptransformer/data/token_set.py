"""Prepared token sets: windows of token ids on disk, memory-mapped, and the batches they give."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lptransformer.data.readers import MANIFEST
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
_MANIFEST: dict[str, type] = {"tokenizer_fingerprint": str, "sources": list}  # what must be there, and of which type
_MANIFEST |= dict.fromkeys(["sequence_length", "vocab_size", "rows", "tokens", "bytes", "words"], int)


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [micro_batch_size, sequence_length]; labels[t] = input_ids[t + 1], -100 for no label.

    With `position_ids`, of the same shape, the documents of a row are kept apart: they begin again at 0 with each.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @property
    def label_tokens(self) -> int:
        """How many positions have a label."""
        return int((self.labels != IGNORE_INDEX).sum())


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

    def label_counts(self, rows: Sequence[int]) -> list[int]:
        """The labels of each of these rows, without reading them."""
        last, rest = len(self) - 1, self.manifest["tokens"] - (len(self) - 1) * self.sequence_length
        return [(rest if row == last else self.sequence_length) - 1 for row in rows]

    def num_batches(self, micro_batch_size: int) -> int:
        return -(-len(self) // micro_batch_size)

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """All rows in order, for evaluation. Every batch is [micro_batch_size, sequence_length]: short and missing
        rows are filled with 0, without labels."""
        for start in range(0, len(self), micro_batch_size):
            rows = [self.row(index) for index in range(start, min(start + micro_batch_size, len(self)))]
            yield make_batch(rows, micro_batch_size, self.sequence_length)


def make_batch(rows: Sequence[np.ndarray], micro_batch_size: int, sequence_length: int) -> Batch:
    import torch

    input_ids = torch.zeros((micro_batch_size, sequence_length), dtype=torch.int64)  # [b, T]
    labels = torch.full_like(input_ids, IGNORE_INDEX)  # [b, T]
    for number, row in enumerate(rows):
        ids = torch.from_numpy(row.astype(np.int64))
        input_ids[number, : len(ids)] = ids
        labels[number, : len(ids) - 1] = ids[1:]
    return Batch(input_ids, labels)


def whole_rounds(batches: Iterable[Batch], replicas: int) -> Iterator[Batch]:
    """The batches, and as many without labels as make every replica's share equal: at ZeRO 3 each forward pass is a
    collective of all replicas."""
    number, batch = 0, None
    for batch in batches:
        number += 1
        yield batch
    if batch is not None:
        import torch

        blank = Batch(batch.input_ids, torch.full_like(batch.labels, IGNORE_INDEX))
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
