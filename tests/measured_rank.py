"""One pipeline rank's stages at work in this process, alone: the real engine, and neighbours that only pretend.

What comes from other ranks are messages of zeros under the right headers; what is sent to them goes nowhere. So the
memory of an update can be measured for every pipeline rank, one after another.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # it registers itself
from allocations import log_allocations
from random_tokens import RandomTokens
from torch import Tensor

from lptransformer.config.schema import Config
from lptransformer.engine.p2p import HEADER_BYTES, HEADER_INTS, Kind
from lptransformer.engine.process_groups import World, join, leave
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.stage import make_stage
from lptransformer.training import build


class _Done:
    """A message that has arrived, or left."""

    def __init__(self, buffer: Tensor | None = None, ints: Sequence[int] = ()) -> None:
        self.buffer, self.ints = buffer, ints

    def wait(self) -> None:
        if self.buffer is not None:
            self.buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(self.ints))


class _Group:
    """A process group whose other members pretend."""

    def __init__(self, kind: Kind | None, rounds: int) -> None:
        self.kind, self.rounds, self.received = kind, rounds, 0

    def send(self, buffers: list[Tensor], peer: int, tag: int) -> _Done:
        return _Done()

    def recv(self, buffers: list[Tensor], peer: int, tag: int) -> _Done:
        if self.kind is None:  # copies of weights have no header
            buffers[0].zero_()
            return _Done()
        ints = [self.kind, *divmod(self.received, self.rounds), 0]
        self.received += 1
        return _Done(buffers[0], ints + [0] * (HEADER_INTS - len(ints)))

    def allgather(self, out: list[list[Tensor]], given: list[Tensor]) -> _Done:
        for tensor in out[0]:
            tensor.copy_(given[0])
        return _Done()


@dataclass
class OneRank(World):
    """The world of one pipeline rank, without the others. `rounds` are the micro-batches of an update."""

    rounds: int = 1

    def group(self, name: str, rank: int, size: int, backend: str = "gloo") -> Any:
        kinds = {"hidden": Kind.TRAIN, "gradient": Kind.GRADIENT}
        return _Group(kinds.get(name.partition("/")[0]), self.rounds)


def peak_bytes(config: Config, plan: Blueprint, pipeline_rank: int) -> int:
    """The most that torch's allocator has given out at once in an update to the process of a pipeline rank.

    DeepSpeed's engines are in it, and message buffers. Of a hybrid objective each kind of update is run, and the
    greater peak counts.
    """
    hybrid = plan.objective
    alone = [
        replace(plan, phases=(one,), objective=replace(hybrid, usual=one.phase, backprop=None, every=None, share=0.0))
        for one in plan.phases
    ]
    return max(_peak(config, one, pipeline_rank) for one in alone)


def _peak(config: Config, plan: Blueprint, pipeline_rank: int) -> int:
    assert config.parallel.data == 1
    pipeline, rounds = config.parallel.pipeline, config.train.micro_batches_per_update
    last = 1 + max(
        plan.copy_lags.values(), default=0
    )  # optimizer state is there from the second update on, copies later
    gc.collect()  # what went later of an engine before this one would count as less than nothing
    stream = RandomTokens(plan.micro_batch_size, plan.sequence_length, plan.parts.vocab_size)
    with _collectives_of_one():
        world = join(1, 1, config.parallel.timeout_seconds)
    try:
        mock = OneRank(pipeline_rank, pipeline, 0, 1, world.device, world.store, world.timeout, rounds=rounds)
        _tell_names_of_copies(config, plan, mock)
        fit, build.fit_heads = build.fit_heads, lambda *_: None  # it would talk to the other ranks
        with log_allocations() as log:
            engine = build.build_engine(config, mock, plan, stream, {})
            for update in range(last + 1):
                log.mark(str(update))
                engine.train_batch()
            log.mark("end")
        return log.peak(last, last + 1)
    finally:
        build.fit_heads = fit
        leave(world)
        gc.collect()


@contextlib.contextmanager
def _collectives_of_one() -> Iterator[None]:
    """Torch's process group for tests, instead of gloo's: with one process both do nothing but copy.

    A thread of gloo's can be the last to let go of a tensor. The profiler does not see that and counts it for ever.
    """
    real = dist.init_process_group
    dist.init_process_group = lambda backend, **options: real("fake", **options)
    try:
        yield
    finally:
        dist.init_process_group = real


def _tell_names_of_copies(config: Config, plan: Blueprint, world: OneRank) -> None:
    """What the processes of other pipeline ranks would say about the weights that their heads follow."""
    for stage in plan.stages:
        if stage.pipeline_rank == world.pipeline_rank or not stage.has_head:
            continue
        with torch.device("meta"):
            head = make_stage(stage, plan, seed=None).head
        assert head is not None
        names: dict[int, list[tuple[str, str]]] = {}
        for copy in head.copies:
            source = next(s.index for s in plan.stages if s.first_block <= copy.source_block <= s.last_block)
            names.setdefault(source, []).append((copy.source, copy.target))
        world.store.set(f"copies/{stage.index}", json.dumps(names))
