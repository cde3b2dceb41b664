"""Jobs for the workers of the pool: an engine over random tokens, trained for a few updates, and what came of it.

A job runs in every process of a run at once. What it returns is plain data and goes back to the test.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lptransformer.config import load as configuration
from lptransformer.config.schema import Config
from lptransformer.data.token_set import Batch
from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.p2p import Control, Neighbours
from lptransformer.engine.process_groups import join
from lptransformer.errors import TrainingError
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.head import LossBatch, LossTerm
from lptransformer.models.stage import StageOutput
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.metrics import EvaluationReport, StageReport
from lptransformer.run_folder.saved_stage import SavedStep
from lptransformer.training.build import build_engine

VOCAB_SIZE = 64
VALID_LABEL_TOKENS = (30, 30, 18)  # of the validation set's micro-batches: the last one is not full
BASE: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 32, "num_layers": 8, "num_heads": 2},
    "data": {"train": "unused", "sequence_length": 16},
    "optimizer": {"name": "adamw"},
    "parallel": {"timeout_seconds": 60},
    "train": {
        "micro_batch_size": 2,
        "micro_batches_per_update": 4,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "grad_clip": 0.25,
        "steps": 12,
    },
    # At ZeRO 3 DeepSpeed keeps small tensors whole; here all of them are to be partitioned, gathered and released.
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


@dataclass(frozen=True)
class RandomStream:
    """Training micro-batches by number, from seeds. Small ids are frequent, so that there is something to learn."""

    micro_batch_size: int
    sequence_length: int
    vocab_size: int
    labels: tuple[int, ...] = ()  # of micro-batch i the first labels[i % len(labels)]; empty: all

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + index)
        shape = (self.micro_batch_size, self.sequence_length)
        ids = (torch.rand(shape, generator=generator).square() * self.vocab_size).long()
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        for row, count in enumerate(self.label_counts(index)):
            labels[row, count:] = -100
        return Batch(ids, labels)

    def label_counts(self, index: int) -> list[int]:
        full, rows = self.sequence_length - 1, self.micro_batch_size
        left = self.labels[index % len(self.labels)] if self.labels else rows * full
        return [min(full, max(0, left - row * full)) for row in range(rows)]

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index * self.micro_batch_size}

    def index(self, position: Mapping[str, int]) -> int:
        return position["offset"] // self.micro_batch_size


@dataclass(frozen=True)
class RandomValidSet:
    stream: RandomStream

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        assert micro_batch_size == self.stream.micro_batch_size
        for index, label_tokens in enumerate(VALID_LABEL_TOKENS):
            batch = self.stream.batch(10**6 + index)
            batch.labels.view(-1)[label_tokens + 1 :] = -100  # after the first row and its last position
            yield batch


def load_config(overrides: Sequence[str]) -> Config:
    return configuration.load(BASE, overrides)


def make_stream(config: Config, labels: tuple[int, ...] = ()) -> RandomStream:
    vocab_size = config.data.vocab_size if "vocab_size" in config.data.model_fields_set else VOCAB_SIZE
    return RandomStream(config.train.micro_batch_size, config.data.sequence_length, vocab_size, labels)


def open_engine(
    overrides: Sequence[str], labels: tuple[int, ...] = (), resumed: Path | None = None
) -> LocalUpdateEngine:
    """With `resumed` the engine is built for the newest checkpoint there, as `train --resume` does it."""
    config = load_config(overrides)
    use_fair_share_of_cores()
    world = join(config.parallel.pipeline, config.parallel.data, config.parallel.timeout_seconds)
    stream = make_stream(config, labels)
    valid = {"valid": RandomValidSet(make_stream(config))}
    saved = SavedStep(resumed, checkpoint.latest(resumed)) if resumed is not None else None
    blueprint = make_blueprint(config, stream.vocab_size, None)
    engine = build_engine(config, world, blueprint, stream, valid, resumed=saved)
    assert isinstance(engine, LocalUpdateEngine)
    return engine


# --------------------------------------------------------------------------------------------- tampering


@dataclass(frozen=True)
class Tamper:
    """What is done to the forward of one stage; None: at all updates, on all replicas, to all micro-batches."""

    stage: int
    what: str  # a key of TAMPERINGS
    updates: tuple[int, ...] | None = None  # counted from 1, as in the reports
    data_rank: int | None = None
    micro_batches: tuple[int, ...] | None = None  # of the replica, within the update


Forward = Callable[..., StageOutput]  # (inputs, batch, split), as Stage.forward


def _other_labels(forward: Forward, inputs: Tensor, batch: LossBatch, *more: Any) -> StageOutput:
    labels = torch.where(batch.labels == -100, batch.labels, (batch.labels + 7) % VOCAB_SIZE)
    return forward(inputs, batch._replace(labels=labels), *more)


def _sleep(forward: Forward, inputs: Tensor, batch: LossBatch, *more: Any) -> StageOutput:
    time.sleep(0.2)
    return forward(inputs, batch, *more)


def _infinite_loss(forward: Forward, inputs: Tensor, batch: LossBatch, *more: Any) -> StageOutput:
    output = forward(inputs, batch, *more)
    losses = {name: LossTerm(*(torch.inf * loss for loss in term)) for name, term in output.losses.items()}
    assert losses
    return output._replace(losses=losses)


def _infinite_inputs(forward: Forward, inputs: Tensor, batch: LossBatch, *more: Any) -> StageOutput:
    return forward(torch.full_like(inputs, torch.inf), batch, *more)


def _infinite_gradient(forward: Forward, inputs: Tensor, batch: LossBatch, *more: Any) -> StageOutput:
    output = forward(inputs, batch, *more)
    output.hidden_states.register_hook(lambda gradient: gradient * torch.inf)
    return output


TAMPERINGS = {
    "other labels": _other_labels,
    "sleep": _sleep,
    "infinite loss": _infinite_loss,
    "infinite inputs": _infinite_inputs,
    "infinite gradient": _infinite_gradient,
}


def tamper_with(engine: LocalUpdateEngine, tamper: Tamper) -> None:
    stage = engine.local.get(tamper.stage)
    if stage is None or tamper.data_rank not in (None, engine.world.data_rank):
        return
    forward, changed = stage.forward, TAMPERINGS[tamper.what]
    calls: Counter[int] = Counter()

    def tampered(inputs: Tensor, batch: LossBatch, *more: Any) -> StageOutput:
        update = engine.update + 1
        micro_batch = calls[update]
        calls[update] += 1
        if tamper.updates is not None and update not in tamper.updates:
            return forward(inputs, batch, *more)
        if tamper.micro_batches is not None and micro_batch not in tamper.micro_batches:
            return forward(inputs, batch, *more)
        return changed(forward, inputs, batch, *more)

    stage.forward = tampered  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------- training


@dataclass
class Trained:
    """What one process gives back. Dictionaries are by stage, lists by update."""

    pipeline_rank: int
    data_rank: int
    label_tokens: dict[int, int]  # of one update, over all replicas, by stage with a head
    plans: dict[int, StagePlan]
    reports: dict[int, list[StageReport]]
    clip_groups: list[list[tuple[int, ...]]]  # [update of the run]: the stages that clip together
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    history: dict[int, list[Any]] = field(default_factory=dict)  # [weights, optimizer state] from before the first
    evaluations: dict[int, EvaluationReport] = field(default_factory=dict)
    error: str = ""


def train(
    overrides: Sequence[str],
    updates: int,
    *,
    tamper: Tamper | None = None,
    history: bool = False,
    evaluate: bool = False,
    load: Path | None = None,
    save: Path | None = None,
    every_update: Path | None = None,
    labels: tuple[int, ...] = (),
) -> Trained:
    """Build an engine, load, train, save, evaluate. A TrainingError ends it early and is part of what is returned.

    `every_update`: evaluate and save there after each update.
    """
    engine = open_engine(overrides, labels)
    world, stages = engine.world, engine.local
    trained = Trained(
        world.pipeline_rank,
        world.data_rank,
        {index: engine.label_tokens(0, fraction) for index, fraction in engine.blueprint.head_fractions.items()},
        plans={index: stage.plan for index, stage in stages.items()},
        reports={index: [] for index in stages},
        clip_groups=[
            list(engine.blueprint.phases[engine.objective.phase_at(update, engine.blueprint.steps)].clip_groups)
            for update in range(engine.blueprint.steps)
        ],
        history={index: [] for index in stages} if history else {},
    )
    if load is not None:
        engine.load_checkpoint(load)
    if tamper is not None:
        tamper_with(engine, tamper)
    try:
        _remember(engine, trained)
        for _ in range(updates):
            if every_update is not None:
                engine.request(Control.EVALUATE | Control.SAVE)
            for report in own_reports(engine, engine.train_batch().reports):
                trained.reports[report.stage].append(report)
            _remember(engine, trained)
            if every_update is not None:
                engine.eval_batch("valid")
                engine.save_checkpoint(every_update)
    except TrainingError as error:
        trained.error = str(error)
        return trained
    if save is not None:
        engine.save_checkpoint(save)
    if evaluate:
        trained.evaluations = {report.stage: report for report in own_reports(engine, engine.eval_batch("valid"))}
    trained.weights = {index: stage.weights() for index, stage in stages.items()}
    engine.close()
    return trained


def own_reports(engine: LocalUpdateEngine, reports: Sequence[Any]) -> list[Any]:
    """Without those of other processes, which arrive at global rank 0 at any time."""
    return [r for r in reports if r.stage in engine.local and r.data_rank == engine.world.data_rank]


def _remember(engine: LocalUpdateEngine, trained: Trained) -> None:
    for index, states in trained.history.items():
        stage = engine.local[index]
        states.append((stage.weights(), copy.deepcopy(optimizer_tensors(stage))))


def optimizer_tensors(stage: TrainedStage) -> list[Tensor]:
    """Moments and step counts, in a fixed order. ZeRO's optimizer works on the one that it was given."""
    states = stage.optimizer.state.values()
    return [value for state in states for _, value in sorted(state.items()) if isinstance(value, Tensor)]


# --------------------------------------------------------------------------------------------- no barrier


@dataclass
class Ahead:
    """How far pipeline rank 0 got while pipeline rank 1 was held, and what took part."""

    pid: int
    updates_while_held: int
    engine_types: list[str]
    zero_stages: list[int]
    engine_group_sizes: dict[str, int]  # of the groups that DeepSpeed's engines hold
    default_group_size: int
    members: list[int]  # global ranks that took part in a collective of the default group
    collectives: list[tuple[str, int]]  # during training: name, size of its group
    link_sizes: list[int]
    group_calls: set[str]


COLLECTIVES = ["all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter"]
COLLECTIVES += ["reduce_scatter_tensor", "broadcast", "broadcast_object_list", "barrier", "monitored_barrier"]
COLLECTIVES += ["reduce", "gather", "scatter", "all_to_all", "all_to_all_single"]


class CollectiveLog:
    """Logs which collectives of torch.distributed are called, and over how many processes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def __enter__(self) -> CollectiveLog:
        for name, function in self.originals.items():
            setattr(dist, name, self._logged(name, function))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)

    def _logged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
            self.calls.append((name, dist.get_world_size(groups[0] if groups else None)))
            return function(*args, **kwargs)

        return call


class LoggedGroup:
    """Stands for the process group of a channel between two pipeline ranks and logs what is called on it."""

    def __init__(self, group: dist.ProcessGroup, calls: set[str]) -> None:
        self._group, self._calls = group, calls

    def __getattr__(self, name: str) -> Any:
        self._calls.add(name)
        return getattr(self._group, name)


def run_ahead(overrides: Sequence[str], in_flight: int, hold_seconds: float) -> Ahead:
    """Pipeline rank 1 begins to train only when rank 0 has been stuck for `hold_seconds`; then both finish."""
    updates = in_flight + 3
    with CollectiveLog() as log:  # around everything: DeepSpeed looks some of the functions up when it is initialised
        engine = open_engine(overrides)
        world, group_calls = engine.world, set[str]()
        channel = engine.neighbours.above if world.pipeline_rank == 0 else engine.neighbours.below
        assert channel is not None
        channel.link.group = LoggedGroup(channel.link.group, group_calls)
        seen = Ahead(
            os.getpid(),
            updates_while_held=0,
            engine_types=[f"{type(s.engine).__module__}.{type(s.engine).__name__}" for s in engine.local.values()],
            zero_stages=[stage.engine.zero_optimization_stage() for stage in engine.local.values()],
            engine_group_sizes=groups_of(engine),
            default_group_size=dist.get_world_size(),
            members=members_of_the_default_group(world.global_rank),
            collectives=[],
            link_sizes=[group.size() for group in world.groups],
            group_calls=group_calls,
        )
        log.calls.clear()
        if world.pipeline_rank == 1:
            world.store.wait(["release"])
        released = threading.Event()

        def release() -> None:
            released.set()
            world.store.set("release", "")

        timer = threading.Timer(hold_seconds, release)
        for update in range(updates):
            if world.pipeline_rank == 0 and update == in_flight + 1:
                timer.start()
            engine.train_batch()
            if world.pipeline_rank == 0 and not released.is_set():
                seen.updates_while_held += 1
        seen.collectives = list(log.calls)
        engine.close()
    return seen


def members_of_the_default_group(global_rank: int) -> list[int]:
    members = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(members, torch.tensor([global_rank]))
    return [int(member) for member in members]


def groups_of(engine: LocalUpdateEngine) -> dict[str, int]:
    """Every process group that a DeepSpeed engine or its optimizer holds, with its size."""
    sizes = {}
    for stage in engine.local.values():
        for owner in (stage.engine, stage.engine.optimizer):
            for name, value in vars(owner).items():
                for group in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(group, dist.ProcessGroup):
                        sizes[f"{type(owner).__name__}.{name}"] = dist.get_world_size(group)
    return sizes


# --------------------------------------------------------------------------------------------- control, neighbours


def follow_control(
    overrides: Sequence[str], updates: int, requests: Sequence[tuple[int, int, int, Control]]
) -> list[int]:
    """The control after every update. `requests`: (pipeline rank, replica, before which update, what). Above pipeline
    rank 0 a stop is asked for urgently: nothing else counts there."""
    engine = open_engine(overrides)
    world, seen = engine.world, []
    for update in range(1, updates + 1):
        for pipeline_rank, data_rank, when, control in requests:
            if (pipeline_rank, data_rank, when) == (world.pipeline_rank, world.data_rank, update):
                engine.request(control, urgent=pipeline_rank > 0 and bool(control & Control.STOP))
        seen.append(int(engine.train_batch().control))
    engine.close()
    return seen


def lose_a_neighbour(overrides: Sequence[str], lost: int, out: Path, die: bool) -> tuple[str, float]:
    """Train until a pipeline rank goes away: what the others are told, and after how many seconds, also in files."""
    engine = open_engine(overrides)
    rank = engine.world.pipeline_rank
    if rank == lost:
        engine.train_batch()
        if die:
            os._exit(9)
        engine.neighbours = Neighbours()
        engine.world.groups.clear()
        gc.collect()
        return "", 0.0
    started = time.monotonic()
    try:
        while True:
            engine.train_batch()
    except TrainingError as error:
        (out / f"rank-{rank}.txt").write_text(str(error))
        return str(error), time.monotonic() - started
