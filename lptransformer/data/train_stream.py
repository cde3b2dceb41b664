"""The order of training: micro-batch i of a run as a pure function of i, the same in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from lptransformer.data.token_set import Batch, TokenSet, Window, make_batch, require_full_window
from lptransformer.errors import DataError


class RowSet(Protocol):
    """Rows by their number: data/token_set.TokenSet, data/given_rows.GivenRows."""

    @property
    def sequence_length(self) -> int: ...

    @property
    def full_rows(self) -> int:
        """Rows that training uses, 1 or more."""
        ...

    def window(self, index: int) -> Window: ...

    def label_counts(self, rows: Iterable[int]) -> Sequence[int] | np.ndarray: ...


class TrainStream:
    """The micro-batches of a run: `batch(i)` depends on the sets, the weights, the seed and i, and on nothing else.

    Row g of a run (counted from its start) belongs to epoch g // rows_per_epoch and is drawn without replacement
    from it. Without weights an epoch holds every full window once. With weights it holds round(share x rows) windows
    of every set (at least one), which are the next ones of that set's own permutations.
    """

    def __init__(
        self, sets: Sequence[RowSet], weights: Sequence[float | None] | None, seed: int, micro_batch_size: int
    ) -> None:
        """Raises DataError for a token set without a full window. Weights are all numbers above 0, or all None."""
        assert sets and micro_batch_size > 0 and seed >= 0
        assert len({token_set.sequence_length for token_set in sets}) == 1, "sets of different sequence length"
        for token_set in sets:
            if isinstance(token_set, TokenSet):
                require_full_window(token_set)
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
        windows = [self.sets[number].window(row) for number, row in self._rows(index)]
        return make_batch(windows, self.micro_batch_size, self.sets[0].sequence_length)

    def label_counts(self, index: int) -> list[int]:
        """The labels of each row of micro-batch `index`, without reading tokens."""
        return [int(self.sets[number].label_counts([row])[0]) for number, row in self._rows(index)]

    def _rows(self, index: int) -> list[tuple[int, int]]:
        """The rows of micro-batch `index`: (number of the set, row of the set) each."""
        first = index * self.micro_batch_size
        places = range(first, first + self.micro_batch_size)
        found = [self._order(place // self.rows_per_epoch)[place % self.rows_per_epoch] for place in places]
        return [(int(number), int(row)) for number, row in found]

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
    """A permutation of range(length), a function of `key`. NumPy keeps the raw bits of a generator the same forever,
    which it does not promise of its shuffles."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(length), kind="stable")
