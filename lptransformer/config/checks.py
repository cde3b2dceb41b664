"""Checks between keys of the configuration. Every message names the numbers and where they are from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lptransformer.config import deepspeed_keys
from lptransformer.config.schema import ONLY_WITH, Config
from lptransformer.errors import ConfigError, NoMeaningError, OptionError
from lptransformer.methods import objectives, recomputing
from lptransformer.methods.codecs import CODECS
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.gradient_flow import borders_carry_gradients, crossing, flows
from lptransformer.methods.heads import HEADS, followed
from lptransformer.methods.objectives import METHODS, Objective
from lptransformer.methods.stages import StagePlan, cut

FAMILIES = ("gpt2", "llama")


def zero_stage(config: Config) -> int:
    """The ZeRO stage of every engine: deepspeed.zero_optimization.stage. By default 0 in fp32, and in bf16 2, where
    gradients are added up in fp32 (DeepSpeed's own pipeline takes no more than 1)."""
    if (stage := config.value("deepspeed.zero_optimization.stage")) is not None:
        return int(stage)
    return (1 if config.engine == "deepspeed_pipeline" else 2) if DTYPES[config.train.dtype].has_masters else 0


def needs_whole_weights(config: Config) -> bool:
    """Whether ZeRO 3 is refused, whatever the objective and the split: what is compiled, or how the optimizer steps."""
    return config.train.compile or config.optimizer.name in ("muon", "adamw_8bit")


def product_dtype(config: Config) -> str:
    """In what matrix products are computed where there is a GPU: train.dtype, or tf32."""
    return "tf32" if config.train.tf32 else config.train.dtype


def micro_batch_size(config: Config) -> int:
    """train.micro_batch_size, in windows. Raises ConfigError where it is still `auto`."""
    size = config.train.micro_batch_size
    if size == "auto":
        raise ConfigError(
            "train.micro_batch_size is auto: `train` finds the number when a run starts, and nothing else does; give "
            "one here, for example --train.micro_batch_size=8"
        )
    return size


def check(config: Config) -> None:
    """Raises ConfigError for the first contradiction between keys of a resolved configuration."""
    rules = (
        _lone,
        _model,
        _tie,
        _lora,
        _train,
        _optimizer,
        _checkpoint,
        _watched_updates,
        _deepspeed,
        _pipeline_baseline,
    )
    for problem in itertools.chain.from_iterable(rule(config) for rule in rules):
        raise _error(problem)
    check_depth(config, config.model.num_layers, config.model.max_position_embeddings, "")


def check_depth(config: Config, num_layers: int, max_position_embeddings: int | None, origin: str) -> None:
    """Raises ConfigError when a model of this depth and length cannot be cut and fed as the configuration says.

    `max_position_embeddings` is in tokens, None for no limit. `origin` says where the two numbers came from; empty:
    they are those of the configuration.
    """
    layers = f"model.num_layers = {num_layers} ({origin})" if origin else config.at("model.num_layers")
    limit_key = "model.max_position_embeddings"
    limit = f"{limit_key} = {max_position_embeddings} ({origin})" if origin else config.at(limit_key)
    for problem in _depth(config, num_layers, layers):
        raise _error(problem)
    if max_position_embeddings is not None and config.data.sequence_length > max_position_embeddings:
        at = config.at("data.sequence_length")
        raise ConfigError(f"{at} is more than {limit}: give at most {max_position_embeddings}")


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError unless `world_size` (number of processes) is parallel.pipeline x parallel.data."""
    parallel = config.parallel
    needed = parallel.pipeline * parallel.data
    if world_size != needed:
        raise ConfigError(
            f"{world_size} processes were started, but {config.at('parallel.pipeline')} x {config.at('parallel.data')} "
            f"needs {needed}: start `deepspeed --num_gpus {needed} launch/train.py --config CONFIG` (on several nodes: "
            f"{needed} in all) or `python -m lptransformer train CONFIG`, or change parallel"
        )


def _error(problem: str | ConfigError) -> ConfigError:
    return problem if isinstance(problem, ConfigError) else ConfigError(problem)


def _no_meaning(config: Config, keys: str | list[str], *beside: str, why: str = "") -> NoMeaningError:
    """The error for keys that were given beside others, which leave them without meaning."""
    keys = [keys] if isinstance(keys, str) else keys
    named = next((key for key in keys if config.is_typed(key)), keys[0])
    others = " and ".join(config.at(key) for key in beside)
    message = f"{config.at(named)} has no meaning with {others}{why}: remove it (or give null)"
    return NoMeaningError(message, keys, beside)


def _lone(config: Config) -> Iterator[str | ConfigError]:
    """Keys that were given although they have no meaning beside the others."""
    for key, (other, values) in ONLY_WITH.items():
        section, name = key.split(".")
        if name in getattr(config, section).model_fields_set and config.value(other) not in values:
            yield _no_meaning(config, key, other)
    for name, source in config.data.valid.items() if isinstance(config.data.valid, dict) else ():
        if source.weight is not None:
            yield f"{config.at(f'data.valid.{name}.weight')}: validation sets are not mixed; remove the weight"
        if source.valid is not None:
            yield f"{config.at(f'data.valid.{name}.valid')}: of a validation set nothing is held out; remove the key"
    without = [name for name, source in config.data.train.items() if source.weight is None]
    if 0 < len(without) < len(config.data.train):
        yield f"data.train.{without[0]} has no weight and others have one: give every source a weight, or none of them"


def _model(config: Config) -> Iterator[str | ConfigError]:
    model, at = config.model, config.at
    if model.attention.startswith("flash") and config.train.dtype != "bf16":
        yield f"{at('model.attention')} with {at('train.dtype')}: its kernels compute in bf16; give that, or sdpa"
    if model.pretrained is not None:  # its sizes are in its own configuration
        return
    if model.family not in FAMILIES:
        yield f"{at('model.family')}: must be one of {', '.join(FAMILIES)}, or give a folder as model.pretrained"
    heads, groups = model.num_heads, model.num_key_value_heads
    assert heads is not None
    if model.hidden_size % heads:
        yield f"{at('model.hidden_size')} is not a multiple of {at('model.num_heads')}"
    if model.family == "llama" and model.hidden_size // heads % 2:
        yield (
            f"{at('model.hidden_size')} over {at('model.num_heads')} makes heads of width {model.hidden_size // heads}"
            ": rotary positions need an even width"
        )
    if groups is not None and model.family != "llama":
        yield _no_meaning(config, "model.num_key_value_heads", "model.family")
    if groups is not None and heads % groups:
        yield f"{at('model.num_heads')} is not a multiple of {at('model.num_key_value_heads')}"


def _tie(config: Config) -> Iterator[str | ConfigError]:
    """Which keys leave a tied model one matrix; that one stage holds both of its ends is `_one_stage`."""
    if config.model.tie == "keep" and config.model.pretrained is None:
        yield _no_meaning(config, "model.tie", "model.pretrained", why=" (a new model has two matrices)")


def _lora(config: Config) -> Iterator[str | ConfigError]:
    """Adapters stand beside the weights of a pretrained model."""
    given = [f"lora.{key}" for key in ("alpha", "targets") if getattr(config.lora, key) is not None]
    if config.lora.rank is None:
        if given:
            yield _no_meaning(config, given, "lora.rank")
        return
    if config.model.pretrained is None:
        yield _no_meaning(config, ["lora.rank", *given], "model.pretrained", why=" (a new model trains all weights)")
    if config.head.ema_decay is not None:
        yield (
            f"{config.at('head.ema_decay')} with {config.at('lora.rank')}: the blocks that extra blocks follow do not "
            "train, and what is added to them is not followed: remove one of the two"
        )


def _one_stage(config: Config, of_run: Objective) -> Iterator[str]:
    """A matrix has one gradient and one optimizer, so one stage. The placement decides nothing: it is refused."""
    at, parallel = config.at, config.parallel
    if config.model.tie != "keep":
        return
    if len(_stages(of_run)) > 1:
        what = at("objective.chunks" if config.value("objective.chunks") is not None else "objective.name")
        yield (
            f"{at('model.tie')} with {what}: embedding and readout are then in two stages, each with an optimizer of "
            "its own. Give objective.name=backprop, or model.tie=separate"
        )
    elif parallel.pipeline > 1:
        yield (
            f"{at('model.tie')} with {at('parallel.pipeline')}: embedding and readout are then on two pipeline ranks. "
            "Give parallel.pipeline=1, or model.tie=separate"
        )


def _train(config: Config) -> Iterator[str | ConfigError]:
    train, at = config.train, config.at
    if train.compile and zero_stage(config) == 3:
        yield (
            f"{at('train.compile')} with {at('deepspeed.zero_optimization.stage')}: DeepSpeed gathers weights in hooks "
            "around every module, which cut a block's graph into pieces. Use ZeRO 2 or less"
        )
    if train.compile and config.engine == "deepspeed_pipeline":
        yield f"{at('train.compile')} with {at('engine')}: not tried with DeepSpeed's own pipeline; give engine=local"
    if config.loss.fused == "torch" and train.dtype == "bf16":
        yield (
            f"{at('loss.fused')} with {at('train.dtype')}: torch 2.13 gives the sum of a micro-batch's losses in bf16, "
            "of which two digits are right. Give chunked, or liger on a GPU"
        )
    if train.steps is not None and train.epochs is not None:
        typed = config.is_typed("train.steps") and not config.is_typed("train.epochs")
        keys = ("train.epochs", "train.steps") if typed else ("train.steps", "train.epochs")
        yield _no_meaning(config, *keys, why=", which says how long the run is")
    if train.micro_batches_per_update % config.parallel.data:
        yield (
            f"{at('train.micro_batches_per_update')} is not a multiple of {at('parallel.data')}: every replica takes "
            "as many micro-batches of an update"
        )
    if train.steps is not None and train.warmup_steps > train.steps:
        message = f"{at('train.warmup_steps')} is more than {at('train.steps')}"
        yield NoMeaningError(message, ["train.warmup_steps"], ["train.steps"], instead=train.steps)
    if train.warmup_steps and train.lr_scheduler == "constant":
        why = " (constant_with_warmup has one)"
        yield _no_meaning(config, "train.warmup_steps", "train.lr_scheduler", why=why)
    if train.decay_steps is not None and train.steps is not None:
        left = train.steps - train.warmup_steps
        if train.decay_steps > left:
            of = f"{at('train.steps')} with {at('train.warmup_steps')}"
            message = f"{at('train.decay_steps')} is more than is left of {of}: give {left} or less"
            beside = ["train.steps", "train.warmup_steps"]
            yield NoMeaningError(message, ["train.decay_steps"], beside, instead=left or None)
    if train.min_learning_rate > train.learning_rate:
        yield f"{at('train.min_learning_rate')} is more than {at('train.learning_rate')}, the peak"
    if train.tf32 and train.dtype != "fp32":
        yield _no_meaning(config, "train.tf32", "train.dtype", why=f" (products are in {train.dtype} there)")
    if train.micro_batch_size == "auto" and config.engine == "deepspeed_pipeline":
        yield (
            f"train.micro_batch_size = auto with {at('engine')}: the memory of DeepSpeed's own pipeline is not "
            "predicted; give a number"
        )
    if train.eval_every and not config.data.valid_names:
        message = f"{at('train.eval_every')}, but there is nothing to evaluate on: give data.valid, or set it to 0"
        yield NoMeaningError(message, ["train.eval_every"], ["data.valid"])


def _optimizer(config: Config) -> Iterator[str]:
    """What optimizers need that are not torch's plain ones."""
    name, stage = config.at("optimizer.name"), "deepspeed.zero_optimization.stage"
    if config.optimizer.name not in ("muon", "adamw_8bit"):
        return
    if zero_stage(config) == 3 and config.optimizer.name == "muon":
        yield (
            f"{config.at(stage)} with {name}: every matrix is divided among all replicas there, and each would gather "
            "all of them in every step. Use ZeRO 2 or less, or adamw"
        )
    elif zero_stage(config) == 3:
        yield f"{config.at(stage)} with {name}: not tried. Use ZeRO 2 or less, or adamw"
    if config.train.dtype == "fp64":
        yield f"{config.at('train.dtype')} with {name}: it computes in less; give adamw, or sgd"
    if config.engine == "deepspeed_pipeline":
        yield f"{config.at('engine')} with {name}: not tried with DeepSpeed's own pipeline; give engine=local"


def _checkpoint(config: Config) -> Iterator[str | ConfigError]:
    keep, at, names = config.checkpoint, config.at, config.data.valid_names
    for key in ("checkpoint.keep_every", "checkpoint.keep_best"):
        if config.value(key) is not None and keep.keep_last is None:
            yield _no_meaning(config, key, "checkpoint.keep_last", why=", which keeps all")
    if keep.keep_best is not None and keep.keep_best not in names:
        there = ", ".join(names) or "none"
        yield f"{at('checkpoint.keep_best')}: there is no such validation set; there are {there} (data.valid)"
    if config.train.patience is not None and not (names and config.train.eval_every):
        yield _no_meaning(
            config, "train.patience", "train.eval_every", why=" and data.valid: nothing is evaluated before"
        )


def _watched_updates(config: Config) -> Iterator[str | ConfigError]:
    at = config.at
    for key in ("run.trace", "run.profile"):
        if config.value(key) is None:
            continue
        (first, last), what = config.value(key), f"update to {key.partition('.')[2]}"
        if first < 1:
            yield f"{at(key)}: updates are counted from 1; give [1, {last}]"
        if first > last:
            yield f"{at(key)}: the first {what} comes before the last; give [{last}, {first}]"
        if config.train.steps is not None and last > config.train.steps:
            yield NoMeaningError(f"{at(key)}: the last {what} is above {at('train.steps')}", [key], ["train.steps"])
    if config.run.trace is not None and config.engine == "deepspeed_pipeline":
        yield _no_meaning(config, "run.trace", "engine", why=", whose actions are not traced")


def _depth(config: Config, num_layers: int, layers: str) -> Iterator[str | ConfigError]:
    """What objective, heads, borders and placement say together with the number of blocks."""
    at = config.at
    try:
        of_run = objectives.build(num_layers, **config.objective.model_dump())
    except OptionError as error:
        beside = "".join(f" beside {at(key)}" for key in error.beside)
        yield f"{at(error.key)}{beside}: {error.problem} ({layers})"
        return
    yield from _hybrid(config)
    pipeline, partition = config.parallel.pipeline, config.parallel.partition
    if pipeline > num_layers:
        yield f"{at('parallel.pipeline')} is more than {layers}: every pipeline rank needs a block"
    if isinstance(partition, list) and len(partition) != pipeline:
        message = (
            f"{at('parallel.partition')} has {len(partition)} numbers, but {at('parallel.pipeline')}: give {pipeline}"
        )
        yield NoMeaningError(message, ["parallel.partition"], ["parallel.pipeline"])
    if isinstance(partition, list) and sum(partition) != num_layers:
        message = f"{at('parallel.partition')} is {sum(partition)} blocks in all, but {layers}: the two must be equal"
        yield NoMeaningError(message, ["parallel.partition"], ["model.num_layers", "model.pretrained"])
    if config.engine == "deepspeed_pipeline" and not of_run.is_backprop:
        message = f"{at('engine')} with {at('objective.name')}: it trains by backprop alone: set that"
        yield NoMeaningError(message, ["objective.name"], ["engine"], instead="backprop")
    again, key = config.train.activation_checkpointing, "train.activation_checkpointing"
    if again != recomputing.KEPT and not any(recomputing.recomputed(again, block) for block in range(num_layers)):
        yield f"{at(key)} with {layers}: no block would compute anything again; give a smaller number"
    yield from _border(config, of_run)
    yield from _one_stage(config, of_run)
    if zero_stage(config) == 3:
        yield from _zero_3(config, of_run)
    yield from _head(config, of_run, layers)


def _hybrid(config: Config) -> Iterator[ConfigError]:
    options, at, steps = config.objective, config.at, config.train.steps
    if not isinstance(options, objectives.HybridOptions) or steps is None:
        return
    if options.backprop_every is not None and options.backprop_every > steps:
        message = f"{at('objective.backprop_every')} is more than {at('train.steps')}: no update would be a global one"
        yield NoMeaningError(message, ["objective.backprop_every"], ["train.steps"])
    if options.backprop_share > 0 and round(options.backprop_share * steps) == 0:
        message = f"{at('objective.backprop_share')} of {at('train.steps')} is no update: give more, or 0"
        yield NoMeaningError(message, ["objective.backprop_share"], ["train.steps"])


def _hybrid_key(config: Config) -> str | None:
    """The key that asks for global updates."""
    keys = ("objective.backprop_every", "objective.backprop_share")
    return next((key for key in keys if config.value(key)), None)


def _stages(of_run: Objective, pipeline: int = 1, partition: str | list[int] = "balanced") -> list[StagePlan]:
    """Where the stages are cut. What the parts cost moves only borders that carry as many gradients elsewhere."""
    return cut(of_run, pipeline, ModelCosts(1.0, 1.0, 1.0), partition)


def _border(config: Config, of_run: Objective) -> Iterator[ConfigError]:
    """What rounds hidden states stands between chunks, and only where no gradient comes back."""
    at, hidden_size, number_bytes = config.at, config.model.hidden_size, DTYPES[config.train.dtype].bytes
    if config.border.codec == "none":
        return
    if len(of_run.heads) == 1:
        yield _no_meaning(config, "border.codec", "objective.name", why=" (no head but the model's)")
    stages = _stages(of_run)
    borders = [stage.index + 1 for stage in stages if stage.has_head and not stage.is_last]
    for phase in of_run.phases:
        if any(crossing(flows(phase, stages), border) for border in borders):
            what = (phase is of_run.backprop and _hybrid_key(config)) or "objective.name"
            message = f"{at('border.codec')} with {at(what)}: no border that carries a gradient is rounded"
            yield NoMeaningError(message, ["border.codec"], [what])
    if CODECS[config.border.codec].token_bytes(hidden_size, number_bytes) >= hidden_size * number_bytes:
        message = f"{at('border.codec')} saves nothing with {at('train.dtype')}: remove it, or give another"
        yield NoMeaningError(message, ["border.codec"], ["train.dtype"])


def _head(config: Config, of_run: Objective, layers: str) -> Iterator[str | ConfigError]:
    """What the options of auxiliary heads say together, and with the number of blocks."""
    head, at, num_layers = config.head, config.at, of_run.num_blocks
    auxiliary = of_run.heads[:-1]
    fields = type(head).model_fields.items()
    changed = [key for key, field in fields if getattr(head, key) != field.default]
    if changed and not auxiliary:
        keys, why = [f"head.{key}" for key in changed], " (no head but the model's)"
        yield _no_meaning(config, keys, "objective.name", why=why)
    try:
        HEADS[head.kind].check(head, config.model.hidden_size)
    except OptionError as error:
        yield f"{at(error.key)} with {at('model.hidden_size')}: {error.problem}"
    if head.blocks > num_layers:
        yield f"{at('head.blocks')} is more than {layers}: extra blocks are like the model's; give at most {num_layers}"
    if HEADS[head.kind].fitted:
        yield from _fitted(config)
    if head.refresh_every > 1 and followed(head) is None:
        yield _no_meaning(config, "head.refresh_every", "head.kind", "head.ema_decay", why=" (nothing to refresh)")
    if head.ema_decay is None:
        return
    if head.blocks == 0:
        yield _no_meaning(config, "head.ema_decay", "head.blocks", why=" (give 1 or more)")
    top = auxiliary[-1]
    if top + head.blocks >= num_layers:
        yield (
            f"{at('head.ema_decay')} with {at('head.blocks')}: the head after block {top} would follow blocks "
            f"{top + 1} to {top + head.blocks}, but with {layers} the last one is block {num_layers - 1}: give "
            f"head.blocks={num_layers - 1 - top} or less"
        )


def _fitted(config: Config) -> Iterator[str | ConfigError]:
    """A head that is fitted to the weights of a pretrained model: what they leave open."""
    head, at = config.head, config.at
    if config.model.pretrained is None:
        yield (
            f"{at('head.kind')} without model.pretrained: such a head is fitted to a model that has been trained; give "
            "its folder as model.pretrained, or another head.kind"
        )
    if config.model.attention.startswith("flash"):
        yield (
            f"{at('model.attention')} with {at('head.kind')}: heads are fitted in fp32, and its kernels compute in "
            "bf16; give sdpa"
        )
    for key in ("init", "ema_decay"):
        if getattr(head, key) is not None:
            yield _no_meaning(config, f"head.{key}", "head.kind", why=", whose blocks and readout are the model's")
    if head.blocks == 0 and head.trains_blocks:
        yield _no_meaning(config, "head.train_blocks", "head.blocks", why=" (give 1 or more)")


def _zero_3(config: Config, of_run: Objective) -> Iterator[str]:
    """ZeRO 3 needs stages that no gradient leaves."""
    parallel, at = config.parallel, config.at
    stage_at = at("deepspeed.zero_optimization.stage")
    why = "the weights of all micro-batches in flight would stay gathered, so nothing is saved. Use ZeRO 2 or less"
    if borders_carry_gradients(of_run, _stages(of_run)):
        by_itself = any(flows(of_run.usual, _stages(of_run)))
        what = at("objective.name" if by_itself else _hybrid_key(config) or "objective.name")
        yield f"{stage_at} with {what}: gradients go from stage to stage there, and {why}"
    elif borders_carry_gradients(of_run, _stages(of_run, parallel.pipeline, parallel.partition)):
        what = at("objective.chunks" if config.value("objective.chunks") is not None else "objective.name")
        where = at("parallel.partition" if isinstance(parallel.partition, list) else "parallel.pipeline")
        sizes = [span.last - span.first + 1 for span in of_run.usual.spans]
        yield (
            f"{stage_at} with {what} and {where}: runs of {sizes} blocks would cross from one pipeline rank to the "
            f"next, and {why}, or cut at the pipeline ranks (at least {parallel.pipeline} chunks)"
        )


def _deepspeed(config: Config) -> Iterator[str | ConfigError]:
    """What this program cannot do with options that DeepSpeed itself knows."""
    bf16, at = config.train.dtype == "bf16", config.at
    for key, value in deepspeed_keys.entries(config.deepspeed):
        if problem := deepspeed_keys.complaint(key, value):
            yield f"{at(f'deepspeed.{key}')}: {problem}"
    stage_at, stage = at("deepspeed.zero_optimization.stage"), config.value("deepspeed.zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        yield f"{stage_at}: must be 0, 1, 2 or 3"
    if METHODS[config.objective.name].delayed and zero_stage(config) == 3:
        yield f"{stage_at} with {at('objective.name')}: two versions of the weights are kept whole; use ZeRO 2 or less"
    if bf16 and stage == 0:
        yield (
            f"{stage_at} with {at('train.dtype')}: DeepSpeed steps the optimizer once with zero gradients when it is "
            "made, which decays the weights and counts as an update. Use stage 1, 2 or 3"
        )
    if config.train.dtype == "fp64" and zero_stage(config) > 0:
        yield f"{stage_at} with {at('train.dtype')}: fp64 is for checking algebra, at ZeRO 0 only"
    if config.train.dtype == "fp64" and config.parallel.data > 1:
        yield f"{at('parallel.data')} with {at('train.dtype')}: DeepSpeed averages no fp64 gradients; give 1 replica"
    forced = f"deepspeed.{deepspeed_keys.FORCED}"
    if deepspeed_keys.offloads(config.deepspeed):
        offload_at = at("deepspeed.zero_optimization.offload_optimizer")
        if zero_stage(config) == 0:
            yield f"{offload_at} at ZeRO 0, where DeepSpeed offloads nothing: give deepspeed.zero_optimization.stage=2"
        if config.optimizer.name != "adamw":
            yield f"{offload_at} with {at('optimizer.name')}: it is adamw that steps on the host; give that"
        if config.engine == "deepspeed_pipeline":
            yield f"{offload_at} with {at('engine')}: not tried with DeepSpeed's own pipeline; give engine=local"
    elif config.value(forced):
        offload = "deepspeed.zero_optimization.offload_optimizer"
        why = f"{at(forced)} has no meaning with {at(offload)}, which offloads nothing: remove it"
        yield NoMeaningError(why, [forced], [offload])
    overlap = "deepspeed.zero_optimization.overlap_comm"
    if config.value(overlap) is True and zero_stage(config) < 2:
        yield f"{at(overlap)} at ZeRO {zero_stage(config)}: only at ZeRO 2 (3 does it by default); remove it"
    if deepspeed_keys.offloads(config.deepspeed, "offload_param") and zero_stage(config) < 3:
        yield f"{at('deepspeed.zero_optimization.offload_param')}: only at ZeRO 3, whose weights are partitioned"
    key = "deepspeed.data_types.grad_accum_dtype"
    accumulate = config.value(key)
    if accumulate not in (None, "fp32", "bf16") or (accumulate == "bf16" and not bf16):
        yield f"{at(key)} with {at('train.dtype')}: must be fp32{' or bf16' if bf16 else ''}"
    if bf16 and accumulate == "fp32" and zero_stage(config) == 1:
        yield (
            f"{at(key)} with {at('train.dtype')} at ZeRO 1: this optimizer of DeepSpeed does not follow the usual "
            "arithmetic. Set deepspeed.zero_optimization.stage=2 (or 3)"
        )


def _pipeline_baseline(config: Config) -> Iterator[str]:
    """What DeepSpeed's own PipelineEngine cannot do."""
    if config.engine != "deepspeed_pipeline":
        return
    at = config.at
    engine_at, stage_key = at("engine"), "deepspeed.zero_optimization.stage"
    for key in ("train.freeze", "model.tie", "lora.rank"):
        section, name = key.split(".")
        if config.value(key) != type(getattr(config, section)).model_fields[name].default:
            yield f"{engine_at} with {at(key)}: it trains all weights of every stage, untied; give engine=local"
    if zero_stage(config) > 1:
        yield f"{engine_at} with {at(stage_key)}: DeepSpeed's pipelines work with ZeRO 0 and 1 only"
    if config.train.dtype not in ("fp32", "bf16"):
        yield f"{engine_at} with {at('train.dtype')}: must be fp32 or bf16"
    if config.deepspeed.get("wall_clock_breakdown") and not config.deepspeed.get("steps_per_print"):
        yield f"{engine_at} with {at('deepspeed.wall_clock_breakdown')}: give deepspeed.steps_per_print too"
