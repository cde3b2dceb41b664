"""What every contender takes and what it gives: the work, its own description, and one update after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lptransformer.config.checks import micro_batch_size
from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.data.token_set import Batch

TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Work:
    """What is the same for all contenders of a case: model, data, micro-batch, global batch, dtype, processes.

    `base` is a configuration of lptransformer. With `block_seconds` the compute is emulated: the forward pass of a
    block is a sleep of so long.
    """

    base: Mapping[str, Any]
    vocab_size: int
    ranks: int
    micro_batches: int
    block_seconds: float | None = None


@dataclass(frozen=True)
class Spec:
    """One contender. `kind` names the module that builds it, `config` what it changes in the configuration of the work,
    `partition` the blocks of its stages in order, `schedule` a class of torch.distributed.pipelining."""

    name: str
    kind: str
    config: tuple[str, ...] = ()
    partition: tuple[int, ...] | None = None
    schedule: str | None = None
    threads: int = 1

    def config_of(self, work: Work, *more: str) -> Config:
        """The checked configuration of this contender at its work."""
        given = [] if self.partition is None else [f"parallel.partition={list(self.partition)}"]
        updates = f"train.micro_batches_per_update={work.micro_batches}"
        timeout = f"parallel.timeout_seconds={TIMEOUT_SECONDS}"
        return load(dict(work.base), [updates, timeout, *self.config, *given, *more])


@dataclass
class Sleeper:
    """Stands in for an accelerator that computes for a given time; counts it."""

    slept_seconds: float = 0.0


class Contender(Protocol):
    """A model in training, spread over the processes of its group."""

    def update(self) -> float | None:
        """Train one update; its mean loss in nats per label token where this process knows it."""

    @property
    def waited_seconds(self) -> float | None:
        """The time spent waiting for other processes so far; None where it is not known."""


Builder = Callable[[Spec, Work, Sleeper], Contender]


@dataclass
class RandomTokens:
    """A few micro-batches of random tokens, over and over: reading data costs nobody anything."""

    rows: int
    sequence_length: int
    vocab_size: int
    kept: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            shape = (self.rows, self.sequence_length)
            ids = torch.randint(0, self.vocab_size, shape, generator=generator)
            self.kept.append(Batch(ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)))

    def batch(self, index: int) -> Batch:
        return self.kept[index % len(self.kept)]

    def label_counts(self, index: int) -> list[int]:
        return [self.sequence_length - 1] * self.rows

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index}

    def index(self, position: Mapping[str, int]) -> int:
        return position["offset"]


def stream_of(config: Config, work: Work) -> RandomTokens:
    return RandomTokens(micro_batch_size(config), config.data.sequence_length, work.vocab_size)


def together(batches: Sequence[Batch]) -> Batch:
    """Several micro-batches as one, row after row."""
    return Batch(torch.cat([batch.input_ids for batch in batches]), torch.cat([batch.labels for batch in batches]))
