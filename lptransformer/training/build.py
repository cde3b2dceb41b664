"""From a configuration to an engine: the one place where the parts are put together."""

from __future__ import annotations

import contextlib
import json
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lptransformer import hub
from lptransformer.config import deepspeed_keys
from lptransformer.config.checks import check_world_size
from lptransformer.config.epochs import steps, with_steps
from lptransformer.config.load import load, to_dict
from lptransformer.config.schema import Config
from lptransformer.data import given_rows
from lptransformer.data.prepare import Prepared, prepare_all
from lptransformer.data.tokenizer import SENTENCEPIECE
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.data.train_stream import TrainStream
from lptransformer.engine.deepspeed_pipeline import Built, PipelineBaseline
from lptransformer.engine.deepspeed_stage import FrozenStage, TrainedStage, deepspeed_config
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.executor import LocalStage
from lptransformer.engine.fitting import FIT_TOKENS, fit_heads
from lptransformer.engine.interface import EngineOptions, Stream, TrainingEngine, ValidSet
from lptransformer.engine.optimizer import build_lr_scheduler, build_optimizer
from lptransformer.engine.optimizer_state import saved_steps
from lptransformer.engine.process_groups import World, join, leave, translate_lost_processes
from lptransformer.engine.saving import agreed_step
from lptransformer.errors import ConfigError, DataError, UserError
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.heads import HEADS
from lptransformer.methods.stages import StagePlan
from lptransformer.models import blueprint as blueprints
from lptransformer.models import cross_entropy, family_check
from lptransformer.models.adapters import saved_name
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.hf_config import described
from lptransformer.models.stage import Stage, block_matrices, compile_blocks, for_training, make_stage
from lptransformer.processes import forget_peak_memory, launched_size, use_fair_share_of_cores
from lptransformer.run_folder import layout
from lptransformer.run_folder.saved_stage import SavedStep
from lptransformer.training.memory import Given, agreed
from lptransformer.training.this_host import check_host, missing_build_tools


def initialize(
    source: str | Path | dict[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    train_data: Any = None,
    valid_data: Mapping[str, Any] | None = None,
    model: Any = None,
    force: bool = False,
) -> TrainingEngine:
    """The engine of this process, from a YAML file or a dictionary; training data is prepared where it is missing.

    Every process of the run calls this. Then `engine.train_batch()`, `engine.eval_batch(name)`,
    `engine.save_checkpoint(folder)`, `engine.load_checkpoint(folder)`, and `engine.close()` at the end.

    `train_data` takes the place of data.train: a datasets.Dataset, a list, or any iterable of rows {input_ids, labels},
    the same in every process; labels as in Hugging Face (not shifted, -100 for none; without them the ids). What has a
    length is shuffled in every epoch as text is, an iterable is read in order and resumes by skipping. `valid_data` are
    validation sets of such rows by name, each with a length. `model` takes the place of model.pretrained: a folder,
    OWNER/NAME, or a causal LM of transformers in memory, whose weights are copied.

    With `force` it starts even where the memory is predicted not to do. Raises ConfigError, DataError or ModelError for
    what the caller can mend.
    """
    if valid_data is not None and train_data is None:
        raise ConfigError("valid_data goes with train_data; beside text give data.valid")
    given: dict[str, Any] = {} if train_data is None else {"data.train": "train_data"}
    weights: Mapping[str, Tensor] | None = None
    with leaving_where_refused(), contextlib.ExitStack() as until_the_end:
        if isinstance(model, str | Path):
            given["model.pretrained"] = str(model)
        elif model is not None:
            scratch = until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="lptransformer-"))
            folder, weights = described(model, Path(scratch))
            given["model.pretrained"] = str(folder)
        if not isinstance(source, Config):
            config = load(source, overrides, given=given)
        else:
            config = load(to_dict(source), given=given) if given else source
        if train_data is not None:
            engine = start_on_rows(config, train_data, valid_data or {}, weights, force)
        else:
            if weights is not None and config.data.tokenizer == config.model.pretrained:
                raise ConfigError("model is in memory and has no tokenizer for data.train: give data.tokenizer")
            engine = start(config, force=force, weights=weights)[0]
        # config.json of a model in memory is read until the run has a folder.
        weakref.finalize(engine, until_the_end.pop_all().close)
        return engine


@contextlib.contextmanager
def leaving_where_refused() -> Iterator[None]:
    """A program may mend what was refused and call again; a world that was there before stays."""
    before = torch.distributed.is_initialized()
    try:
        yield
    except UserError:
        if not before:
            leave()
        raise


def start(
    config: Config,
    resume: bool = False,
    force: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    step: int | None = None,
) -> tuple[TrainingEngine, Prepared, Config, int | None]:
    """Join the world, see that the run fits, prepare the data, find what is to be resumed, build this process's stages.

    The configuration that is returned has a number for `train.micro_batch_size: auto`, when `resume` is given that of
    the run folder, and for train.epochs. With `force` nobody asks whether the run fits. `weights` are those of
    model.pretrained where they are in memory. What is resumed goes on after `step` updates, or from the newest
    checkpoint of which all processes find the files whole.
    """
    world = enter(config)
    with translate_lost_processes():
        config = with_cpu_optimizer(agreed(config, world, resume, force), world)
        if weights is None:
            fetch_once(config, world)
        data = prepare_once(config, world)
        config = counted_once(config, world, data.rows_per_epoch)
        blueprint = blueprints.make_blueprint(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id)
        world.decided_by_the_first("isolation", lambda: check_isolation(config, blueprint, data))
    stream = data.stream(config.train.seed, blueprint.micro_batch_size)
    resumed = None
    if resume:
        assert config.run.dir is not None
        with world.starting("found the checkpoint"):
            folder = Path(config.run.dir)
            resumed = SavedStep(folder, agreed_step(world, folder, step))
    engine = build_engine(config, world, blueprint, stream, data.valid, weights, resumed=resumed)

    def describe_run(folder: Path, overwrite: bool) -> None:
        model = blueprint.model_config.to_dict()
        layout.create(folder, config, model, data.tokenizer_folder, data.folders(), overwrite)

    engine.describe_run = describe_run
    return engine, data, config, None if resumed is None else resumed.update


def start_on_rows(
    config: Config,
    train_data: Any,
    valid_data: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None,
    force: bool,
) -> TrainingEngine:
    """`start` on rows that a program has, with the sets of data.valid beside those of `valid_data`.

    The vocabulary is that of a pretrained model; of a new one that of data.tokenizer, else data.vocab_size.
    """
    if not isinstance(config.data.valid, dict):
        raise ConfigError(f"{config.at('data.valid')}: of train_data nothing is held out: give valid_data or files")
    if twice := sorted(valid_data.keys() & config.data.valid.keys()):
        raise ConfigError(f"valid_data and data.valid have both a set {twice[0]}: give one of them another name")
    world = enter(config)
    with translate_lost_processes():
        if weights is None:
            fetch_once(config, world)
        beside = prepare_beside_rows(config, world)
        tokenizer = beside.tokenizer if beside else None
        size = tokenizer.vocab_size if tokenizer else config.data.vocab_size
        end_of_text_id = tokenizer.end_of_text_id if tokenizer else None
        length, vocab_size = config.data.sequence_length, blueprints.embedded(config) or size
        rows = given_rows.sized(train_data, length, vocab_size)
        valid = given_rows.valid_sets(valid_data, length, vocab_size)
        many = None if rows is None else rows.full_rows

        def draw(config: Config) -> Blueprint:
            return blueprints.make_blueprint(config, size, end_of_text_id)

        config = counted_once(agreed(config, world, False, force, Given(draw, many)), world, many)
        config = with_cpu_optimizer(config, world)
        blueprint = draw(config)
        if beside is not None:
            world.decided_by_the_first("isolation", lambda: check_isolation(config, blueprint, beside))
    sizes = {"micro_batch_size": blueprint.micro_batch_size, "micro_batches": blueprint.micro_batches}
    stream: Stream = (
        given_rows.RowsInOrder(train_data, length, vocab_size, **sizes, kept_rows=-(-FIT_TOKENS // length))
        if rows is None
        else TrainStream([rows], None, config.train.seed, blueprint.micro_batch_size)
    )
    check_same_rows(world, stream, many)
    engine = build_engine(config, world, blueprint, stream, {**(beside.valid if beside else {}), **valid}, weights)

    def describe_run(folder: Path, overwrite: bool) -> None:
        model, tokenizer_folder = blueprint.model_config.to_dict(), beside.tokenizer_folder if beside else None
        data = beside.folders() if beside else {"train": {}, "valid": {}}
        layout.create(folder, config, model, tokenizer_folder, data, overwrite)

    engine.describe_run = describe_run
    return engine


def enter(config: Config) -> World:
    """Join the world, when this host can do it."""
    check_world_size(config, launched_size())
    check_host(config)
    use_fair_share_of_cores()
    return join_world(config)


def with_cpu_optimizer(config: Config, world: World) -> Config:
    """Where the optimizer is offloaded, the configuration that says which one it is: as it was given, or by what the
    host of global rank 0 has, which prints it. All processes call this.

    Raises ConfigError where DeepSpeed's own is to be built on a host that has no compiler.
    """
    if not deepspeed_keys.offloads(config.deepspeed):
        return config

    def decide() -> str:
        missing = missing_build_tools([f"deepspeed.{deepspeed_keys.FORCED}"])
        own = config.deepspeed.get(deepspeed_keys.FORCED, not missing)
        name = "DeepSpeedCPUAdam (the first time it is built, for a minute or two)" if own else "torch's fused AdamW"
        why = f"; for DeepSpeedCPUAdam {' and '.join(missing)} not found" if missing and not own else ""
        print(f"the offloaded optimizer is {name}{why}", flush=True)
        return json.dumps(own)

    chosen = config.model_copy(deep=True)
    chosen.deepspeed[deepspeed_keys.FORCED] = json.loads(world.decided_by_the_first("cpu_optimizer", decide))
    chosen._origins.setdefault(f"deepspeed.{deepspeed_keys.FORCED}", "by what the first host has")
    with world.starting("found a compiler"):
        check_host(chosen)
    return chosen


def counted_once(config: Config, world: World, rows: int | None) -> Config:
    """The configuration with a number for train.epochs, of `rows` windows each; global rank 0 says it, or what is
    wrong with it."""
    if config.train.epochs is None:
        return config

    def count() -> str:
        found = with_steps(config, rows)
        print(found.at("train.steps"), flush=True)
        return str(found.train.steps)

    world.decided_by_the_first("steps", count)
    return with_steps(config, rows)


def check_same_rows(world: World, stream: Stream, many: int | None) -> None:
    """Raises DataError, on global rank 0 alone, where processes have other rows, as far as their number and the first
    micro-batch show; later ones are compared as they come (engine/executor)."""
    try:
        own = f"{many} rows {stream.batch(0).digest}"
    except DataError as error:
        own = f"wrong {error}"
    world.store.set(f"rows/{world.global_rank}", own)

    def compare() -> str:
        found = [world.store.get(f"rows/{rank}").decode() for rank in range(world.size)]
        if wrong := next((one for one in found if one.startswith("wrong ")), None):
            raise DataError(wrong.removeprefix("wrong "))
        if other := next((rank for rank, one in enumerate(found) if one != found[0]), None):
            raise DataError(
                f"train_data of process {other} has another first micro-batch, or another number of rows, than that of "
                "process 0: every process must be given the same rows, in the same order"
            )
        return ""

    world.decided_by_the_first("rows", compare)


def check_isolation(config: Config, blueprint: Blueprint, data: Prepared) -> str:
    """Nothing. Raises ConfigError or ModelError where documents are to be kept apart and would not be."""
    sets = [*(one.tokens for one in data.train), *data.valid.values()]
    if not any(tokens.isolated for tokens in sets):
        return ""
    if config.engine == "deepspeed_pipeline":
        raise ConfigError(
            "engine=deepspeed_pipeline hands no positions through its stages, so documents are not kept apart: use "
            "engine=local, or data.isolate_documents=false"
        )
    if blueprint.attention.startswith("flash"):  # transformers gives it no mask, and positions for single windows alone
        raise ConfigError(
            f"{config.at('model.attention')}: its kernels see no mask, so documents of a window are not kept apart: "
            "give sdpa or flex_attention, or data.isolate_documents=false"
        )
    family_check.check(blueprint.model_config, apart=True)
    return ""


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


def prepare_beside_rows(config: Config, world: World) -> Prepared | None:
    """Tokenizer and validation sets beside rows of a program; None where nothing names or needs a tokenizer."""
    data = config.data
    named = data.tokenizer not in (SENTENCEPIECE, config.model.pretrained)
    if not named and not data.valid:
        try:
            load_tokenizer(data.tokenizer)
        except UserError:  # none to be trained, and the model's folder may have none
            return None
    return prepare_once(config, world, rows=True)


def prepare_once(config: Config, world: World, rows: bool = False) -> Prepared:
    """Global rank 0 prepares first; the others then find what it made (or make it, where they share no disk), from the
    same commits of data sets of the hub. With `rows` a program has those of training."""
    sources = config.data.model_dump() | ({"train": None} if rows else {})
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
    weights: Mapping[str, Tensor] | None = None,
    *,
    resumed: SavedStep | None = None,
) -> TrainingEngine:
    """The engine that the configuration names, over a stream of micro-batches and validation sets.

    `weights` are those of model.pretrained where they are in memory. What is to be `resumed` has the weights of heads
    that were fitted before; new ones are fitted to its weights. It says how parameters share counts of steps.
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

    pretrained = pretrained_folder(config) if weights is None else weights
    kernel = cross_entropy.kernel(config.loss.fused, blueprint.parts.logit_rule, train.dtype, world.device.type)

    def make(plan: StagePlan) -> Stage:
        """On the CPU: DeepSpeed casts a stage, and then moves it."""
        stage = for_training(make_stage(plan, blueprint, seed=train.seed, pretrained=pretrained), blueprint)
        if stage.head is not None:
            stage.head.readout.kernel = kernel
        if train.compile:
            compile_blocks(stage, blueprint.parts)
        return stage

    def with_optimizer(stage: Stage) -> Built:
        steps_made = None
        if resumed is not None and blueprint.zero_stage > 0 and not (saved := resumed.seen_by(stage.plan)).older:
            steps_made = saved_steps(stage, saved)
        optimizer = build_optimizer(
            stage.parameters(),
            config.optimizer,
            train.learning_rate,
            steps_made,
            matrices=block_matrices(stage, blueprint.parts),
            on_gpu=world.device.type == "cuda",
            deepspeed=config.deepspeed,
        )
        return stage, optimizer, build_lr_scheduler(optimizer, train, steps(config))

    made: dict[int, Stage] = {}  # stages that were made early
    auxiliary = [plan for plan in blueprint.stages if plan.has_head and not plan.is_last]
    new = [plan.index for plan in auxiliary if resumed is None or resumed.seen_by(plan).head is None]
    if new and HEADS[blueprint.head.kind].fitted:
        local = [plan for plan in blueprint.stages if plan.pipeline_rank == world.pipeline_rank]
        made = {plan.index: make(plan).to(world.device) for plan in local}
        if resumed is not None:
            for stage in made.values():
                resumed.seen_by(stage.plan).fill(stage.state_dict(keep_vars=True), saved_name)
        fit_heads(world, blueprint, made, stream, new)
    frozen: dict[str, Tensor] = {}  # what heads of this process share

    def build(plan: StagePlan) -> LocalStage:
        stage = made.pop(plan.index) if made else make(plan)
        if train.dtype == "fp64":
            stage.to(torch_dtype)
        if stage.head is not None:
            stage.head.cast_copies(torch_dtype)  # DeepSpeed casts the parameters
            stage.head.share_frozen(frozen, world.device)
        if not plan.trained:
            return FrozenStage(stage, torch_dtype, world.device)
        return TrainedStage(*with_optimizer(stage), ds_config, train.grad_clip, blueprint.objective.delayed)

    stop = config.checkpoint.on_error == "stop"
    options = EngineOptions(train.max_skipped_updates, config.parallel.channel, config.run.trace, stop, train.tf32)
    engine: TrainingEngine
    if config.engine == "deepspeed_pipeline":
        engine = PipelineBaseline(
            world,
            blueprint,
            lambda plan: with_optimizer(make(plan).to(world.device)),
            ds_config,
            stream,
            valid,
            options,
            grad_clip=train.grad_clip,
        )
    else:
        engine = LocalUpdateEngine(world, blueprint, build, stream, valid, options)
    forget_peak_memory(world.device)
    return engine
