"""A stream of random tokens for engines whose speed or memory is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lptransformer.data.token_set import Batch
from lptransformer.models.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class RandomTokens:
    """Every micro-batch is another, of the same shape: [rows, sequence_length]."""

    rows: int
    sequence_length: int
    vocab_size: int

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocab_size, (self.rows, self.sequence_length), generator=generator)
        return Batch(ids, F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX))

    def label_counts(self, index: int) -> list[int]:
        return [self.sequence_length - 1] * self.rows

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index}

    def index(self, position: object) -> int:
        raise AssertionError("what runs on random tokens is not resumed")
