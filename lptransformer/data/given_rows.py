"""Rows that a program hands over in place of text: {input_ids, labels}, by their number or one after another.

Labels are those of Hugging Face: as many as ids, that of a token at its own place (not shifted), -100 for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from lptransformer.data.token_set import IGNORE_INDEX, Batch, Window, label_count, make_batch
from lptransformer.errors import DataError


@dataclass(frozen=True)
class GivenRows:
    """Rows with a length, such as a datasets.Dataset or a list. A row must be the same whenever it is asked for.

    Ids and labels are below `vocab_size`; a row has up to `sequence_length` tokens, and what it lacks is padding.
    """

    rows: Sequence[Mapping[str, Any]]
    sequence_length: int
    vocab_size: int
    name: str = "train_data"
    # The next micro-batch is read by a thread, and what reads from one open file may take no second question.
    _one_at_a_time: Any = field(default_factory=Lock, repr=False, compare=False)

    @property
    def full_rows(self) -> int:
        """Rows that training uses: all."""
        return len(self.rows)

    def window(self, index: int) -> Window:
        """Raises DataError for a row that is none, or does not fit."""
        with self._one_at_a_time:
            row = self.rows[index]
        return window(row, f"{self.name}: row {index}", self.sequence_length, self.vocab_size)

    def label_counts(self, rows: Iterable[int]) -> list[int]:
        return [label_count(self.window(index)) for index in rows]

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """All rows in order, for evaluation; see TokenSet.batches."""
        for start in range(0, len(self.rows), micro_batch_size):
            indices = range(start, min(start + micro_batch_size, len(self.rows)))
            yield make_batch([self.window(index) for index in indices], micro_batch_size, self.sequence_length)


class RowsInOrder:
    """The micro-batches of a run from rows without a length, in their order: what is read is what is trained.

    An update is read as a whole, in every process, because its labels are counted before its first backward pass. A
    run that is resumed skips the rows of the updates that it has. At the end an iterable begins again; an iterator
    cannot.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        sequence_length: int,
        vocab_size: int,
        *,
        micro_batch_size: int,
        micro_batches: int,
        kept_rows: int = 0,
    ) -> None:
        """`micro_batches` are those of an update, over all replicas. The first `kept_rows` can be asked for again."""
        self.rows, self.sequence_length, self.vocab_size = rows, sequence_length, vocab_size
        self.micro_batch_size, self.micro_batches, self.kept_rows = micro_batch_size, micro_batches, kept_rows
        self._left = iter(rows)
        self._read, self._ended = 0, False  # rows so far, those that were skipped too
        self._updates: dict[int, list[Window]] = {}  # the newest ones: of the one before labels are asked for once more

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` since the start of the run: [micro_batch_size, sequence_length]. Raises DataError."""
        return make_batch(self._windows(index), self.micro_batch_size, self.sequence_length)

    def label_counts(self, index: int) -> list[int]:
        return [label_count(one) for one in self._windows(index)]

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index * self.micro_batch_size}

    def index(self, position: Mapping[str, int]) -> int:
        """Raises DataError where the position is of data with a length, or of micro-batches of another size."""
        if position["epoch"] or position["offset"] % self.micro_batch_size:
            raise DataError(
                f"train_data has no length, and no micro-batch of {self.micro_batch_size} rows begins at row "
                f"{position['offset']} of epoch {position['epoch']}, where the checkpoint is: give the data that it "
                "was trained on, and the same train.micro_batch_size"
            )
        return position["offset"] // self.micro_batch_size

    def _windows(self, index: int) -> list[Window]:
        update, place = divmod(index, self.micro_batches)
        if update not in self._updates:
            kept = -(-self.kept_rows // (self.micro_batches * self.micro_batch_size))  # updates
            self._updates = {old: rows for old, rows in self._updates.items() if abs(update - old) <= 2 or old < kept}
            self._updates[update] = self._read_update(update)
        first = place * self.micro_batch_size
        return self._updates[update][first : first + self.micro_batch_size]

    def _read_update(self, update: int) -> list[Window]:
        many = self.micro_batches * self.micro_batch_size
        if self._read > update * many:
            if self._ended:
                raise self._too_few()
            if self._once:
                raise DataError(
                    f"train_data is an iterator that was read up to row {self._read - 1} already, and update "
                    f"{update + 1} begins at row {update * many}: call initialize anew, with a new iterator"
                )
            self._left, self._read = iter(self.rows), 0
        while self._read < update * many:
            self._row()
        return [self._window(self._row()) for _ in range(many)]

    @property
    def _once(self) -> bool:
        return iter(self.rows) is self.rows

    def _row(self) -> Any:
        try:
            row = next(self._left)
        except StopIteration:
            try:
                row = next(self._left if self._once else self._again())
            except StopIteration:
                self._ended = True
                raise self._too_few() from None
        self._read += 1
        return row

    def _too_few(self) -> DataError:
        return DataError(
            f"train_data ended after {self._read} rows, and an update takes "
            f"{self.micro_batches * self.micro_batch_size}: give more rows, fewer train.steps, or what can be read "
            "again (a list, a datasets.Dataset)"
        )

    def _again(self) -> Iterator[Any]:
        self._left = iter(self.rows)
        return self._left

    def _window(self, row: Any) -> Window:
        return window(row, f"train_data: row {self._read - 1}", self.sequence_length, self.vocab_size)


def sized(rows: Any, sequence_length: int, vocab_size: int, name: str = "train_data") -> GivenRows | None:
    """The rows of a program, where they have a length; None for an iterable without one.

    Raises DataError for what is neither, and for nothing.
    """
    if isinstance(rows, Mapping):
        raise DataError(f"{name} is a {type(rows).__name__} of {', '.join(map(str, rows))}: give one of these")
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        if len(rows) == 0:
            raise DataError(f"{name} has no rows")
        return GivenRows(rows, sequence_length, vocab_size, name)
    if not hasattr(rows, "__iter__"):
        raise DataError(f"{name} is a {type(rows).__name__}: give a datasets.Dataset or an iterable of rows")
    return None


def valid_sets(given: Mapping[str, Any], sequence_length: int, vocab_size: int) -> dict[str, GivenRows]:
    """Validation sets by name. Raises DataError, also where one has no length: it is read more than once."""
    found = {}
    for name, rows in given.items():
        one = sized(rows, sequence_length, vocab_size, f"valid_data {name}")
        if one is None:
            raise DataError(f"valid_data {name} is a {type(rows).__name__} without a length: give a list, or a Dataset")
        found[name] = one
    return found


def window(row: Any, where: str, sequence_length: int, vocab_size: int) -> Window:
    """A row as a window, of which padding that its attention_mask hides at its end is cut off.

    Raises DataError, with `where` the row is.
    """
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        has = f"holds {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
        raise DataError(f"{where} {has}: a row is {{input_ids, labels}}")
    ids = _numbers(row["input_ids"], f"{where}: input_ids")
    labels = _numbers(row["labels"], f"{where}: labels") if row.get("labels") is not None else ids
    if len(labels) != len(ids):
        raise DataError(f"{where} has {len(ids)} input_ids and {len(labels)} labels: give as many (not shifted)")
    if row.get("attention_mask") is not None:
        seen = _numbers(row["attention_mask"], f"{where}: attention_mask").astype(bool)
        if len(seen) != len(ids) or not seen[: seen.sum()].all():
            raise DataError(f"{where}: its attention_mask hides more than padding at its end, which is not taken")
        ids, labels = ids[: seen.sum()], labels[: seen.sum()]
    if not 0 < len(ids) <= sequence_length:
        raise DataError(f"{where} has {len(ids)} tokens, and data.sequence_length is {sequence_length}: give 1 to that")
    outside = [*ids[(ids < 0) | (ids >= vocab_size)], *labels[(labels != IGNORE_INDEX) & (labels < 0)]]
    outside += [*labels[labels >= vocab_size]]
    if outside:
        raise DataError(f"{where} holds {outside[0]}: ids are 0 to {vocab_size - 1} in this vocabulary")
    return Window(ids, labels=None if labels is ids else labels)


def _numbers(values: Any, where: str) -> np.ndarray:
    """Whole numbers, int64 [n]; a list, an array or a tensor on the CPU. Raises DataError."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} cannot be read: {error}") from None
    if found.ndim != 1 or (found.dtype.kind not in "iub" and found.size):
        what = "text" if found.dtype.kind in "US" else f"{found.ndim} dimensions of {found.dtype}"
        raise DataError(f"{where} is {what}: give a list of whole numbers")
    return found.astype(np.int64)
