"""From a configuration to an engine: the one place where the parts are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lptransformer import config as configuration
from lptransformer import cost, family, partition, run_folder
from lptransformer import objective as objectives
from lptransformer.config import Config
from lptransformer.config_checks import micro_batch_size
from lptransformer.data import TrainStream
from lptransformer.deepspeed_stage import FrozenStage, TrainedStage, deepspeed_config
from lptransformer.engine import LocalUpdateEngine
from lptransformer.errors import ConfigError, UserError
from lptransformer.executor import HeadLoss, LocalStage
from lptransformer.face import Stream, ValidSet
from lptransformer.gradients import copy_lags
from lptransformer.head import token_positions
from lptransformer.objective import Objective
from lptransformer.optimizer import build_lr_scheduler, build_optimizer
from lptransformer.partition import StagePlan
from lptransformer.pipeline_baseline import Built, PipelineBaseline
from lptransformer.prepare import Prepared, prepare_all
from lptransformer.processes import check_devices, launched_size, use_fair_share_of_cores
from lptransformer.stage import DTYPES, Stage, make_stage
from lptransformer.world import World, join

Engine = LocalUpdateEngine | PipelineBaseline


def initialize(source: str | Path | dict[str, Any] | Config, overrides: Sequence[str] = ()) -> Engine:
    """The engine of this process, from a YAML file or a dictionary; training data is prepared where it is missing.

    Every process of the run calls this. Then `engine.train_batch()`, `engine.eval_batch(name)`,
    `engine.save_checkpoint(folder)`, `engine.load_checkpoint(folder)`, and `engine.close()` at the end.
    Raises ConfigError, DataError or ModelError for what the caller can mend.
    """
    return start(source if isinstance(source, Config) else configuration.load(source, overrides))[0]


def start(config: Config) -> tuple[Engine, Prepared, ModelPlan]:
    """Join the world, prepare the data, build this process's stages."""
    micro_batch_size(config)  # refused before processes wait for each other
    configuration.check_world_size(config, launched_size())
    check_devices(config.parallel.channel, config.parallel.data, config.engine)
    use_fair_share_of_cores()
    world = join_world(config)
    data = prepare_once(config, world)
    plan = plan_model(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id)
    engine = build_engine(config, world, data, plan=plan)

    def describe_run(folder: Path, overwrite: bool) -> None:
        model = plan.config.to_dict()
        run_folder.create(folder, config, model, data.tokenizer_folder, data.folders(), overwrite)

    engine.describe_run = describe_run
    return engine, data, plan


def join_world(config: Config) -> World:
    """The world of this process: that of its pipeline rank, or of all where DeepSpeed's own pipeline trains."""
    parallel, together = config.parallel, config.engine == "deepspeed_pipeline"
    return join(parallel.pipeline, parallel.data, parallel.timeout_seconds, together=together)


def prepare_once(config: Config, world: World) -> Prepared:
    """Global rank 0 prepares first; the others then find what it made (or make it, where they share no disk)."""
    first = world.global_rank == 0
    if not first:
        world.store.wait(["prepared"], timedelta(days=2))
        if world.store.get("prepared") == b"failed":
            world.store.queue_push("leaving", "")
            raise SystemExit(UserError.exit_code)  # global rank 0 has said why
    try:
        data = prepare_all(**config.data.model_dump(), progress=first)
    except UserError:
        if first:
            world.store.set("prepared", "failed")
            for _ in range(world.size - 1):  # global rank 0 keeps the store: it goes last
                world.store.queue_pop("leaving", True)
        raise
    if first:
        world.store.set("prepared", "yes")
    return data


@dataclass(frozen=True)
class ModelPlan:
    """What is built, before anything is allocated."""

    config: Any  # of the Hugging Face model
    parts: family.Anatomy
    costs: cost.ModelCosts
    objective: Objective
    stages: list[StagePlan]


def plan_model(config: Config, vocab_size: int, end_of_text_id: int | None) -> ModelPlan:
    """The model's configuration and its stages. Raises ConfigError where tokenizer, model and cuts do not fit."""
    model = config.model
    if model.pretrained is not None:
        hf_config = family.read_config(model.pretrained)
        if vocab_size > hf_config.vocab_size:
            raise ConfigError(
                f"data.tokenizer has {vocab_size} ids and the model in {model.pretrained} (model.pretrained) embeds "
                f"{hf_config.vocab_size}: use that model's own tokenizer"
            )
    else:
        sizes = model.model_dump(exclude={"family", "pretrained", "max_position_embeddings"})
        hf_config = family.new_config(
            model.family,
            **sizes,
            vocab_size=vocab_size,
            max_position_embeddings=model.max_position_embeddings or config.data.sequence_length,
            end_of_text_id=end_of_text_id,
        )
    parts = family.anatomy(hf_config)
    costs = cost.model_costs(
        parts.block_parameters,
        parts.hidden_size,
        parts.vocab_size,
        config.data.sequence_length,
        embedding_parameters=parts.embedding_parameters,
        norm_parameters=parts.norm_parameters,
        **config.head.cost_options(),
    )
    objective = objectives.build(hf_config.num_hidden_layers, **config.objective.model_dump())
    stages = partition.cut(objective, config.parallel.pipeline, costs, config.parallel.partition)
    return ModelPlan(hf_config, parts, costs, objective, stages)


def build_engine(
    config: Config,
    world: World,
    data: Prepared | None = None,
    *,
    stream: Stream | None = None,
    valid: Mapping[str, ValidSet] | None = None,
    vocab_size: int | None = None,
    plan: ModelPlan | None = None,
) -> Engine:
    """The engine over prepared data, or over a stream and validation sets of the caller's."""
    train, windows = config.train, micro_batch_size(config)
    if data is not None:
        stream = TrainStream(
            [source.tokens for source in data.train],
            [source.weight for source in data.train],
            seed=train.seed,
            micro_batch_size=windows,
        )
        valid, vocab_size = data.valid, data.tokenizer.vocab_size
    assert stream is not None and valid is not None and vocab_size is not None
    if plan is None:
        plan = plan_model(config, vocab_size, data.tokenizer.end_of_text_id if data is not None else None)
    zero_stage, bf16 = configuration.zero_stage(config), train.dtype == "bf16"
    ds_config = deepspeed_config(
        config.deepspeed,
        micro_batch_size=windows,
        zero_stage=zero_stage,
        bf16=bf16,
        grad_clip=train.grad_clip,
    )

    def make(stage_plan: StagePlan) -> Stage:
        return make_stage(
            stage_plan,
            plan.config,
            plan.parts,
            seed=train.seed,
            head=config.head,
            pretrained=config.model.pretrained,
        ).to(world.device, torch.float64 if train.dtype == "fp64" else None)

    def with_optimizer(stage: Stage) -> Built:
        optimizer = build_optimizer(stage.parameters(), config.optimizer, train.learning_rate)
        return stage, optimizer, build_lr_scheduler(optimizer, train.lr_scheduler, train.steps, train.warmup_steps)

    def build(stage_plan: StagePlan) -> LocalStage:
        stage = make(stage_plan)
        if not stage_plan.trained:
            return FrozenStage(stage.to(DTYPES[train.dtype]))
        if stage.head is not None:
            stage.head.cast_copies(DTYPES[train.dtype])  # DeepSpeed casts the parameters
        return TrainedStage(*with_optimizer(stage), ds_config, train.grad_clip, plan.objective.delayed)

    if config.engine == "deepspeed_pipeline":
        return PipelineBaseline(
            world,
            plan.stages,
            lambda stage_plan: with_optimizer(make(stage_plan)),
            ds_config,
            stream,
            valid,
            grad_clip=train.grad_clip,
            micro_batch_size=windows,
            sequence_length=config.data.sequence_length,
            micro_batches_per_update=train.micro_batches_per_update,
            max_skipped_updates=train.max_skipped_updates,
        )

    rounds = train.micro_batches_per_update // config.parallel.data
    return LocalUpdateEngine(
        world,
        plan.objective,
        plan.stages,
        build,
        stream,
        valid,
        _head_losses(config, plan),
        copy_lags(plan.stages, config.head.followed, config.parallel.in_flight, rounds),
        _roundings(config, plan),
        hidden_size=plan.parts.hidden_size,
        dtype=DTYPES[train.dtype],
        steps=train.steps,
        micro_batch_size=windows,
        sequence_length=config.data.sequence_length,
        micro_batches_per_update=train.micro_batches_per_update,
        in_flight=config.parallel.in_flight,
        refresh_every=config.head.refresh_every,
        max_skipped_updates=train.max_skipped_updates,
        channel=config.parallel.channel,
        trace=config.run.trace,
    )


def _head_losses(config: Config, plan: ModelPlan) -> dict[int, HeadLoss]:
    """How the loss of every stage's head is taken."""
    train, length, fraction = config.train, config.data.sequence_length, config.head.token_fraction
    windows = micro_batch_size(config)
    rows = train.micro_batches_per_update * windows
    losses = {}
    for stage in plan.stages:
        if stage.is_last or (stage.has_head and fraction == 1.0):
            losses[stage.index] = HeadLoss(rows * (length - 1))
        elif stage.has_head:
            positions = partial(_positions, train.seed, stage.last_block, windows, length, fraction)
            losses[stage.index] = HeadLoss(rows * cost.loss_positions(length, fraction), positions)
    return losses


def _positions(seed: int, block: int, rows: int, length: int, fraction: float, micro_batch: int) -> torch.Tensor:
    return token_positions(seed, block, micro_batch, rows, length, fraction)


def _roundings(config: Config, plan: ModelPlan) -> dict[int, str]:
    """The stages whose output is rounded: those at the end of a chunk, on any placement."""
    kind = config.train.border_dtype
    return {stage.index: kind for stage in plan.stages if kind and stage.has_head and not stage.is_last}
