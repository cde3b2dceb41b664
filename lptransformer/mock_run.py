"""One pipeline rank's stages at work in this process, alone: the real engine, and neighbours that only pretend.

What comes from other ranks are messages of zeros under the right headers; what is sent to them goes nowhere. So the
memory of an update can be measured for every pipeline rank, one after another, before a run is started.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lptransformer.allocations import recorded
from lptransformer.build import ModelPlan, build_engine
from lptransformer.channel import HEADER_BYTES, HEADER_INTS, Kind
from lptransformer.config import Config
from lptransformer.engine import LocalUpdateEngine
from lptransformer.loss import IGNORE_INDEX
from lptransformer.passes import empty_stage
from lptransformer.token_set import Batch
from lptransformer.world import World, join, leave

UPDATES = 2  # the optimizer's state is there from the second on


@dataclass(frozen=True)
class RandomTokens:
    """A stream of random tokens; every micro-batch is another, of the same shape."""

    rows: int
    sequence_length: int
    vocab_size: int

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocab_size, (self.rows, self.sequence_length), generator=generator)
        return Batch(ids, F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX))

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index}

    def index(self, position: object) -> int:
        raise AssertionError("a mock run is not resumed")


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
class MockWorld(World):
    """The world of one pipeline rank, without the others. `rounds` are the micro-batches of an update."""

    rounds: int = 1

    def group(self, name: str, rank: int, size: int, backend: str = "gloo") -> Any:
        kinds = {"hidden": Kind.TRAIN, "gradient": Kind.GRADIENT}
        return _Group(kinds.get(name.partition("/")[0]), self.rounds)


def as_one_replica(config: Config) -> Config:
    """The configuration of a mock run: one replica, and no more micro-batches than can be in flight."""
    one, parallel = config.model_copy(deep=True), config.parallel
    one.parallel.data = 1
    rounds = config.train.micro_batches_per_update // parallel.data
    one.train.micro_batches_per_update = min(rounds, parallel.pipeline + 1)
    one.train.steps = max(one.train.steps, UPDATES + 1)
    one.run.trace = None
    return one


def peak_bytes(config: Config, plan: ModelPlan, pipeline_rank: int) -> int:
    """The most that the process of a pipeline rank has in use in an update; `config` is as_one_replica's.

    On a GPU of its memory, else what torch's allocator gave out. DeepSpeed's engines are in it, and message buffers
    where they are in the same memory. Of a hybrid objective each kind of update is run, and the greater peak counts.
    """
    objective = plan.objective
    alone = [replace(objective, usual=phase, backprop=None, every=None, share=0.0) for phase in objective.phases]
    return max(_peak(config, replace(plan, objective=one), pipeline_rank) for one in alone)


def _peak(config: Config, plan: ModelPlan, pipeline_rank: int) -> int:
    assert config.parallel.data == 1
    pipeline, rounds = config.parallel.pipeline, config.train.micro_batches_per_update
    world = join(1, 1, config.parallel.timeout_seconds)
    try:
        mock = MockWorld(pipeline_rank, pipeline, 0, 1, world.device, world.store, world.timeout, rounds=rounds)
        _tell_names_of_copies(config, plan, mock)
        return _on_gpu(config, plan, mock) if world.device.type == "cuda" else _on_cpu(config, plan, mock)
    finally:
        leave(world)
        gc.collect()


def _on_cpu(config: Config, plan: ModelPlan, world: MockWorld) -> int:
    with recorded() as record:
        engine = _engine(config, plan, world)
        for update in range(UPDATES):
            record.mark(str(update))
            engine.train_batch()
        record.mark("end")
    return record.peak(UPDATES - 1, UPDATES)


def _on_gpu(config: Config, plan: ModelPlan, world: MockWorld) -> int:
    before = torch.cuda.memory_allocated(world.device)
    engine = _engine(config, plan, world)
    for _ in range(UPDATES):
        torch.cuda.reset_peak_memory_stats(world.device)
        engine.train_batch()
    return torch.cuda.max_memory_allocated(world.device) - before


def _engine(config: Config, plan: ModelPlan, world: MockWorld) -> LocalUpdateEngine:
    stream = RandomTokens(config.train.micro_batch_size, config.data.sequence_length, plan.parts.vocab_size)
    engine = build_engine(config, world, stream=stream, valid={}, vocab_size=plan.parts.vocab_size, plan=plan)
    assert isinstance(engine, LocalUpdateEngine)
    return engine


def _tell_names_of_copies(config: Config, plan: ModelPlan, world: MockWorld) -> None:
    """What the processes of other pipeline ranks would say about the weights that their heads follow (mirror.py)."""
    for stage in plan.stages:
        if stage.pipeline_rank == world.pipeline_rank or not stage.has_head:
            continue
        head = empty_stage(stage, plan.config, plan.parts, config.head).head
        assert head is not None
        names: dict[int, list[tuple[str, str]]] = {}
        for copy in head.copies:
            source = next(s.index for s in plan.stages if s.first_block <= copy.source_block <= s.last_block)
            names.setdefault(source, []).append((copy.source, copy.target))
        world.store.set(f"copies/{stage.index}", json.dumps(names))
