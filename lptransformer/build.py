"""From a configuration to an engine: the one place where the parts are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lptransformer import config as configuration
from lptransformer import cost, family, partition, run_folder
from lptransformer.config import Config
from lptransformer.data import TrainStream
from lptransformer.deepspeed_stage import SpanGroup, TrainedStage, deepspeed_config
from lptransformer.engine import LocalUpdateEngine, Stream, ValidSet
from lptransformer.errors import ConfigError, UserError
from lptransformer.objective import OBJECTIVES
from lptransformer.optimizer import build_lr_scheduler, build_optimizer
from lptransformer.partition import StagePlan
from lptransformer.prepare import Prepared, prepare_all
from lptransformer.processes import check_devices, launched_size, use_fair_share_of_cores
from lptransformer.stage import make_stage
from lptransformer.world import World, join

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def initialize(source: str | Path | dict[str, Any] | Config, overrides: Sequence[str] = ()) -> LocalUpdateEngine:
    """The engine of this process, from a YAML file or a dictionary; training data is prepared where it is missing.

    Every process of the run calls this. Then `engine.train_batch()`, `engine.eval_batch(name)`,
    `engine.save_checkpoint(folder)`, `engine.load_checkpoint(folder)`, and `engine.close()` at the end.
    Raises ConfigError, DataError or ModelError for what the caller can mend.
    """
    return start(source if isinstance(source, Config) else configuration.load(source, overrides))[0]


def start(config: Config) -> tuple[LocalUpdateEngine, Prepared, ModelPlan]:
    """Join the world, prepare the data, build this process's stages."""
    configuration.check_world_size(config, launched_size())
    check_devices(config.parallel.channel, config.parallel.data)
    use_fair_share_of_cores()
    world = join(config.parallel.pipeline, config.parallel.data, config.parallel.timeout_seconds)
    data = prepare_once(config, world)
    plan = plan_model(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id)
    engine = build_engine(config, world, data, plan=plan)

    def describe_run(folder: Path, overwrite: bool) -> None:
        model = plan.config.to_dict()
        run_folder.create(folder, config, model, data.tokenizer_folder, data.folders(), overwrite)

    engine.describe_run = describe_run
    return engine, data, plan


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
    costs = cost.model_costs(parts.block_parameters, parts.hidden_size, parts.vocab_size, config.data.sequence_length)
    options = {"chunks": config.objective.chunks} if config.objective.name == "chunked" else {}
    spans = OBJECTIVES[config.objective.name](hf_config.num_hidden_layers, **options)
    stages = partition.cut(spans, config.parallel.pipeline, costs, config.parallel.partition)
    return ModelPlan(hf_config, parts, costs, stages)


def build_engine(
    config: Config,
    world: World,
    data: Prepared | None = None,
    *,
    stream: Stream | None = None,
    valid: Mapping[str, ValidSet] | None = None,
    vocab_size: int | None = None,
    plan: ModelPlan | None = None,
) -> LocalUpdateEngine:
    """The engine over prepared data, or over a stream and validation sets of the caller's."""
    train = config.train
    if data is not None:
        stream = TrainStream(
            [source.tokens for source in data.train],
            [source.weight for source in data.train],
            seed=train.seed,
            micro_batch_size=train.micro_batch_size,
        )
        valid, vocab_size = data.valid, data.tokenizer.vocab_size
    assert stream is not None and valid is not None and vocab_size is not None
    if plan is None:
        plan = plan_model(config, vocab_size, data.tokenizer.end_of_text_id if data is not None else None)
    zero_stage, bf16 = configuration.zero_stage(config), train.dtype == "bf16"
    ds_config = deepspeed_config(
        config.deepspeed,
        micro_batch_size=train.micro_batch_size,
        zero_stage=zero_stage,
        bf16=bf16,
        grad_clip=train.grad_clip,
    )

    def build(stage_plan: StagePlan, span_group: SpanGroup | None) -> TrainedStage:
        stage = make_stage(
            stage_plan,
            plan.config,
            plan.parts,
            seed=train.seed,
            chunk_tokens=config.head.chunk_tokens,
            head_kind=config.head.kind,
            pretrained=config.model.pretrained,
        ).to(world.device)
        options = config.optimizer
        optimizer = build_optimizer(
            stage.parameters(),
            options.name,
            learning_rate=train.learning_rate,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            momentum=options.momentum,
        )
        lr_scheduler = build_lr_scheduler(optimizer, train.lr_scheduler, train.steps, train.warmup_steps)
        return TrainedStage(stage, optimizer, lr_scheduler, ds_config, train.grad_clip, span_group)

    return LocalUpdateEngine(
        world,
        plan.stages,
        build,
        stream,
        valid,
        hidden_size=plan.parts.hidden_size,
        dtype=DTYPES[train.dtype],
        micro_batch_size=train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        micro_batches_per_update=train.micro_batches_per_update,
        in_flight=config.parallel.in_flight,
        max_skipped_updates=train.max_skipped_updates,
        channel=config.parallel.channel,
    )
