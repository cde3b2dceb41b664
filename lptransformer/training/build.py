"""From a configuration to an engine: the one place where the parts are put together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lptransformer import hub
from lptransformer.config.checks import check_world_size
from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.data.prepare import Prepared, prepare_all
from lptransformer.data.train_stream import TrainStream
from lptransformer.engine.deepspeed_pipeline import Built, PipelineBaseline
from lptransformer.engine.deepspeed_stage import FrozenStage, TrainedStage, deepspeed_config
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.executor import LocalStage
from lptransformer.engine.fitting import fit_heads
from lptransformer.engine.interface import EngineOptions, Stream, TrainingEngine, ValidSet
from lptransformer.engine.optimizer import build_lr_scheduler, build_optimizer
from lptransformer.engine.process_groups import World, join, translate_lost_processes
from lptransformer.errors import ConfigError
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.heads import HEADS
from lptransformer.methods.stages import StagePlan
from lptransformer.models import blueprint as blueprints
from lptransformer.models import family_check
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.stage import Stage, for_training, make_stage
from lptransformer.processes import launched_size, use_fair_share_of_cores
from lptransformer.run_folder import layout
from lptransformer.training.memory import agreed
from lptransformer.training.this_host import check_host


def initialize(
    source: str | Path | dict[str, Any] | Config, overrides: Sequence[str] = (), *, force: bool = False
) -> TrainingEngine:
    """The engine of this process, from a YAML file or a dictionary; training data is prepared where it is missing.

    Every process of the run calls this. Then `engine.train_batch()`, `engine.eval_batch(name)`,
    `engine.save_checkpoint(folder)`, `engine.load_checkpoint(folder)`, and `engine.close()` at the end.
    With `force` it starts even where the memory is predicted not to do. Raises ConfigError, DataError or ModelError for
    what the caller can mend.
    """
    return start(source if isinstance(source, Config) else load(source, overrides), force=force)[0]


def start(config: Config, resume: bool = False, force: bool = False) -> tuple[TrainingEngine, Prepared, Config]:
    """Join the world, see that the run fits, prepare the data, build this process's stages.

    The configuration that is returned has a number for `train.micro_batch_size: auto`, when `resume` is given that of
    the run folder. With `force` nobody asks whether the run fits.
    """
    check_world_size(config, launched_size())
    check_host(config)
    use_fair_share_of_cores()
    world = join_world(config)
    with translate_lost_processes():
        config = agreed(config, world, resume, force)
        fetch_once(config, world)
        data = prepare_once(config, world)
    blueprint = blueprints.make_blueprint(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id)
    check_isolation(config, blueprint, data)
    stream = TrainStream(
        [source.tokens for source in data.train],
        [source.weight for source in data.train],
        seed=config.train.seed,
        micro_batch_size=blueprint.micro_batch_size,
    )
    engine = build_engine(config, world, blueprint, stream, data.valid, fit=not resume)

    def describe_run(folder: Path, overwrite: bool) -> None:
        model = blueprint.model_config.to_dict()
        layout.create(folder, config, model, data.tokenizer_folder, data.folders(), overwrite)

    engine.describe_run = describe_run
    return engine, data, config


def check_isolation(config: Config, blueprint: Blueprint, data: Prepared) -> None:
    """Raises ConfigError or ModelError where documents are to be kept apart and would not be."""
    sets = [*(one.tokens for one in data.train), *data.valid.values()]
    if not any(tokens.isolated for tokens in sets):
        return
    if config.engine == "deepspeed_pipeline":
        raise ConfigError(
            "engine=deepspeed_pipeline hands no positions through its stages, so documents are not kept apart: use "
            "engine=local, or data.isolate_documents=false"
        )
    family_check.check(blueprint.model_config, apart=True)


def join_world(config: Config) -> World:
    """The world of this process: that of its pipeline rank, or of all where DeepSpeed's own pipeline trains."""
    parallel, together = config.parallel, config.engine == "deepspeed_pipeline"
    return join(parallel.pipeline, parallel.data, parallel.timeout_seconds, together=together)


def fetch_once(config: Config, world: World) -> None:
    """Global rank 0 fetches a model of the hub first; the others take what it took, which their host may have yet to
    fetch. Raises ModelError."""

    def fetched() -> str:
        pretrained_folder(config)
        return json.dumps(hub.commits())

    hub.keep_to(json.loads(world.decided_by_the_first("hub commits", fetched)))


def pretrained_folder(config: Config) -> Path | None:
    """The folder of model.pretrained with its weights, fetched where it is missing. Raises ModelError."""
    pretrained = config.model.pretrained
    return None if pretrained is None else hub.folder(pretrained, config.at("model.pretrained"), weights=True)


def prepare_once(config: Config, world: World) -> Prepared:
    """Global rank 0 prepares first; the others then find what it made (or make it, where they share no disk), from the
    same commits of data sets of the hub."""
    sources = config.data.model_dump()
    embedded = blueprints.embedded(config)

    def prepared() -> str:
        prepare_all(**sources, embedded=embedded)
        return json.dumps(hub.commits())

    hub.keep_to(json.loads(world.decided_by_the_first("prepared", prepared)))
    return prepare_all(**sources, progress=False)


def build_engine(
    config: Config,
    world: World,
    blueprint: Blueprint,
    stream: Stream,
    valid: Mapping[str, ValidSet],
    *,
    fit: bool = True,
) -> TrainingEngine:
    """The engine that the configuration names, over a stream of micro-batches and validation sets.

    Without `fit` fitted heads are left as they are: a checkpoint has their weights.
    """
    train, dtype = config.train, DTYPES[config.train.dtype]
    torch_dtype: torch.dtype = getattr(torch, dtype.name)
    ds_config = deepspeed_config(
        config.deepspeed,
        micro_batch_size=blueprint.micro_batch_size,
        zero_stage=blueprint.zero_stage,
        bf16=train.dtype == "bf16",
        grad_clip=train.grad_clip,
    )

    pretrained = pretrained_folder(config)

    def make(plan: StagePlan) -> Stage:
        stage = for_training(make_stage(plan, blueprint, seed=train.seed, pretrained=pretrained), blueprint)
        return stage.to(world.device)

    def with_optimizer(stage: Stage) -> Built:
        optimizer = build_optimizer(stage.parameters(), config.optimizer, train.learning_rate)
        return stage, optimizer, build_lr_scheduler(optimizer, train.lr_scheduler, train.steps, train.warmup_steps)

    made: dict[int, Stage] = {}  # stages that were made early
    if fit and HEADS[blueprint.head.kind].fitted:
        made = {plan.index: make(plan) for plan in blueprint.stages if plan.pipeline_rank == world.pipeline_rank}
        fit_heads(world, blueprint, made, stream)
    frozen: dict[str, Tensor] = {}  # what heads of this process share

    def build(plan: StagePlan) -> LocalStage:
        stage = made.pop(plan.index) if made else make(plan)
        if train.dtype == "fp64":
            stage.to(torch_dtype)
        if stage.head is not None:
            stage.head.cast_copies(torch_dtype)  # DeepSpeed casts the parameters
            stage.head.share_frozen(frozen)
        if not plan.trained:
            return FrozenStage(stage, torch_dtype)
        return TrainedStage(*with_optimizer(stage), ds_config, train.grad_clip, blueprint.objective.delayed)

    options = EngineOptions(train.max_skipped_updates, config.parallel.channel, config.run.trace)
    if config.engine == "deepspeed_pipeline":
        return PipelineBaseline(
            world,
            blueprint,
            lambda plan: with_optimizer(make(plan)),
            ds_config,
            stream,
            valid,
            options,
            grad_clip=train.grad_clip,
        )
    return LocalUpdateEngine(world, blueprint, build, stream, valid, options)
