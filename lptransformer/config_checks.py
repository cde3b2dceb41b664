"""What several keys of the configuration must say together. Every message names the numbers and where they are from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lptransformer import deepspeed_keys, objective
from lptransformer.config_sections import ONLY_WITH, Config
from lptransformer.errors import ConfigError

FAMILIES = ("gpt2", "llama")


def zero_stage(config: Config) -> int:
    """The ZeRO stage of every engine: deepspeed.zero_optimization.stage, by default 0 in fp32 and 1 in bf16."""
    stage = config.value("deepspeed.zero_optimization.stage")
    return int(config.train.dtype == "bf16") if stage is None else int(stage)


def state_bytes(config: Config) -> int:
    """What a trained weight takes with its gradient and the optimizer's state, before ZeRO divides it."""
    bytes_of = {"fp32": 4, "fp64": 8, "bf16": 4}[config.train.dtype]
    versions = int(config.objective.name == "delayed")
    moments = 2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0)
    weight_and_gradient = 2 + 2 + 4 if config.train.dtype == "bf16" else 2 * bytes_of  # bf16: and a master weight
    return weight_and_gradient + (moments + versions) * bytes_of


def micro_batch_size(config: Config) -> int:
    """train.micro_batch_size, in windows. Raises ConfigError where it is still `auto`."""
    size = config.train.micro_batch_size
    if size == "auto":
        raise ConfigError(
            "train.micro_batch_size is auto: `train` finds the number when a run starts, and nothing else does; give "
            "one here, for example --train.micro_batch_size=8"
        )
    return size


def head_in_words(config: Config) -> str:
    """What an auxiliary head is, for tables."""
    head = config.head
    words = [f"low rank {head.rank}" if head.kind == "low_rank" else head.kind]
    if head.blocks:
        words.append(f"{head.blocks} {'averaged ' if head.ema_decay is not None else ''}blocks")
    if head.token_fraction < 1:
        words.append(f"{head.token_fraction:.0%} of the tokens")
    return ", ".join(words)


def check(config: Config) -> None:
    """Raises ConfigError for the first contradiction between keys of a resolved configuration."""
    rules = (_lone, _model, _train, _trace, _deepspeed, _pipeline_baseline)
    for problem in itertools.chain.from_iterable(rule(config) for rule in rules):
        raise ConfigError(problem)
    check_depth(config, config.model.num_layers, config.model.max_position_embeddings, "")


def check_depth(config: Config, num_layers: int, max_position_embeddings: int | None, origin: str) -> None:
    """Raises ConfigError when a model of this depth and length cannot be cut and fed as the configuration says.

    `max_position_embeddings` is in tokens, None for no limit. `origin` says where the two numbers came from; empty:
    they are those of the configuration.
    """
    layers = f"model.num_layers = {num_layers} ({origin})" if origin else config.at("model.num_layers")
    limit_key = "model.max_position_embeddings"
    limit = f"{limit_key} = {max_position_embeddings} ({origin})" if origin else config.at(limit_key)
    for problem in itertools.chain(_depth(config, num_layers, layers), _head(config, num_layers, layers)):
        raise ConfigError(problem)
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


def _lone(config: Config) -> Iterator[str]:
    """Keys that were given although they have no meaning beside the others."""
    for key, (other, values) in ONLY_WITH.items():
        section, name = key.split(".")
        if name in getattr(config, section).model_fields_set and config.value(other) not in values:
            yield f"{config.at(key)} has no meaning with {config.at(other)}: remove it (or give null)"
    for name, source in config.data.valid.items():
        if source.weight is not None:
            yield f"{config.at(f'data.valid.{name}.weight')}: validation sets are not mixed; remove the weight"
    without = [name for name, source in config.data.train.items() if source.weight is None]
    if 0 < len(without) < len(config.data.train):
        yield f"data.train.{without[0]} has no weight and others have one: give every source a weight, or none of them"


def _model(config: Config) -> Iterator[str]:
    model, at = config.model, config.at
    if model.pretrained is not None:  # its sizes are its own business
        return
    if model.family not in FAMILIES:
        yield f"{at('model.family')}: must be one of {', '.join(FAMILIES)}, or give a folder as model.pretrained"
    heads, groups = model.num_heads, model.num_key_value_heads
    if model.hidden_size % heads:
        yield f"{at('model.hidden_size')} is not a multiple of {at('model.num_heads')}"
    if model.family == "llama" and model.hidden_size // heads % 2:
        yield (
            f"{at('model.hidden_size')} over {at('model.num_heads')} makes heads of width {model.hidden_size // heads}"
            ": rotary positions need an even width"
        )
    if groups is not None and model.family != "llama":
        yield f"{at('model.num_key_value_heads')} has no meaning with {at('model.family')}: remove it"
    if groups is not None and heads % groups:
        yield f"{at('model.num_heads')} is not a multiple of {at('model.num_key_value_heads')}"


def _train(config: Config) -> Iterator[str]:
    train, at = config.train, config.at
    if train.micro_batches_per_update % config.parallel.data:
        yield (
            f"{at('train.micro_batches_per_update')} is not a multiple of {at('parallel.data')}: every replica takes "
            "as many micro-batches of an update"
        )
    if train.warmup_steps > train.steps:
        yield f"{at('train.warmup_steps')} is more than {at('train.steps')}"
    if train.warmup_steps and train.lr_scheduler == "constant":
        yield (
            f"{at('train.warmup_steps')} has no effect with {at('train.lr_scheduler')}: set it to 0, or "
            "train.lr_scheduler=constant_with_warmup"
        )
    hybrid = next((key for key in ("backprop_every", "backprop_share") if getattr(config.objective, key)), None)
    if train.border_dtype and hybrid:
        yield (
            f"{at('train.border_dtype')} with {at(f'objective.{hybrid}')}: a border that carries a gradient is not "
            "rounded. Remove one of them"
        )
    if train.micro_batch_size == "auto" and config.engine == "deepspeed_pipeline":
        yield (
            f"train.micro_batch_size = auto with {at('engine')}: the memory of DeepSpeed's own pipeline is not "
            "predicted; give a number"
        )
    if train.border_dtype == "bf16" == train.dtype:
        yield f"{at('train.border_dtype')} has no meaning with {at('train.dtype')}: remove it, or give int8"
    if train.eval_every and not config.data.valid:
        yield f"{at('train.eval_every')}, but there is nothing to evaluate on: give data.valid, or set it to 0"


def _trace(config: Config) -> Iterator[str]:
    if config.run.trace is None:
        return
    (first, last), at = config.run.trace, config.at
    if first < 1:
        yield f"{at('run.trace')}: updates are counted from 1; give [1, {last}]"
    if first > last:
        yield f"{at('run.trace')}: the first update to record comes before the last; give [{last}, {first}]"
    if last > config.train.steps:
        yield f"{at('run.trace')}: the last update to record is above {at('train.steps')}"
    if config.engine == "deepspeed_pipeline":
        yield f"{at('run.trace')} with {at('engine')}: the actions of DeepSpeed's own pipeline are not recorded"


def _depth(config: Config, num_layers: int, layers: str) -> Iterator[str]:
    at = config.at
    yield from _objective(config, num_layers, layers)
    pipeline, partition = config.parallel.pipeline, config.parallel.partition
    if pipeline > num_layers:
        yield f"{at('parallel.pipeline')} is more than {layers}: every pipeline rank needs a block"
    if isinstance(partition, list) and len(partition) != pipeline:
        yield f"{at('parallel.partition')} has {len(partition)} numbers, but {at('parallel.pipeline')}: give {pipeline}"
    if isinstance(partition, list) and sum(partition) != num_layers:
        yield f"{at('parallel.partition')} is {sum(partition)} blocks in all, but {layers}: the two must be equal"
    if zero_stage(config) == 3:
        yield from _zero_3(config, num_layers)


def _objective(config: Config, num_layers: int, layers: str) -> Iterator[str]:
    """What the objective's options say together with the number of blocks."""
    objective, at = config.objective, config.at
    chunks = objective.chunks
    if objective.name in ("chunked", "overlapping", "deep_supervision", "delayed"):
        if isinstance(chunks, int) and chunks > num_layers:
            yield f"{at('objective.chunks')} is more than {layers}: give at most {num_layers}"
        if isinstance(chunks, list) and sum(chunks) != num_layers:
            yield f"{at('objective.chunks')} is {sum(chunks)} blocks in all, but {layers}: the two must be equal"
    runs = chunks if isinstance(chunks, int) else len(chunks)
    if objective.name == "overlapping" and objective.overlap >= runs:
        yield f"{at('objective.overlap')} is not below the number of runs ({at('objective.chunks')})"
    if objective.backprop_every is not None and objective.backprop_every > config.train.steps:
        yield f"{at('objective.backprop_every')} is more than {at('train.steps')}: no update would be a global one"
    if objective.backprop_share > 0 and round(objective.backprop_share * config.train.steps) == 0:
        yield f"{at('objective.backprop_share')} of {at('train.steps')} is no update: give more, or 0"
    if objective.name == "last" and objective.trained_blocks > num_layers:
        yield f"{at('objective.trained_blocks')} is more than {layers}: give at most {num_layers}"


def _head(config: Config, num_layers: int, layers: str) -> Iterator[str]:
    """What the options of auxiliary heads say together, and with the number of blocks."""
    head, at = config.head, config.at
    auxiliary = objective.build(num_layers, **config.objective.model_dump()).heads[:-1]
    fields = type(head).model_fields.items()
    changed = [key for key, field in fields if key != "chunk_tokens" and getattr(head, key) != field.default]
    if changed and not auxiliary:
        yield (
            f"{at(f'head.{changed[0]}')} has no meaning with {at('objective.name')}: the only head is the model's own. "
            "Remove it (or give null)"
        )
    if head.kind == "low_rank" and head.rank >= config.model.hidden_size:
        yield f"{at('head.rank')} is not below {at('model.hidden_size')}: that is no low rank; use head.kind=private"
    if head.blocks > num_layers:
        yield f"{at('head.blocks')} is more than {layers}: extra blocks are like the model's; give at most {num_layers}"
    if head.refresh_every > 1 and head.kind != "shared" and head.ema_decay is None:
        yield (
            f"{at('head.refresh_every')} has no meaning with {at('head.kind')} and {at('head.ema_decay')}: there is "
            "nothing to refresh. Remove it (or give null)"
        )
    if head.ema_decay is None:
        return
    if head.blocks == 0:
        yield f"{at('head.ema_decay')} has no meaning with {at('head.blocks')}: give head.blocks=1 or more"
    top = auxiliary[-1]
    if top + head.blocks >= num_layers:
        yield (
            f"{at('head.ema_decay')} with {at('head.blocks')}: the head after block {top} would follow blocks "
            f"{top + 1} to {top + head.blocks}, but with {layers} the last one is block {num_layers - 1}: give "
            f"head.blocks={num_layers - 1 - top} or less"
        )


def _zero_3(config: Config, num_layers: int) -> Iterator[str]:
    """ZeRO 3 needs stages that no gradient leaves."""
    objective, parallel, at = config.objective, config.parallel, config.at
    stage_at = at("deepspeed.zero_optimization.stage")
    why = "the weights of all micro-batches in flight would stay gathered, so nothing is saved. Use ZeRO 2 or less"
    several = {"overlapping": objective.overlap > 0, "deep_supervision": True}
    if several.get(objective.name):
        yield f"{stage_at} with {at('objective.name')}: gradients go from stage to stage there, and {why}"
    for key in ("backprop_every", "backprop_share"):
        if getattr(objective, key):
            yield f"{stage_at} with {at(f'objective.{key}')}: gradients go from stage to stage there, and {why}"
    chunks: int | list[int] = objective.chunks
    if objective.name in ("backprop", "delayed"):
        chunks = 1
    elif objective.name == "greedy":
        chunks = num_layers
    elif objective.name == "last":
        chunks = [1] * (num_layers - objective.trained_blocks) + [objective.trained_blocks]
    if isinstance(chunks, int):  # as equal as possible, the longer ones first
        chunks = [num_layers // chunks + (i < num_layers % chunks) for i in range(chunks)]
    crossing = len(chunks) < parallel.pipeline
    if isinstance(parallel.partition, list):
        crossing = not set(itertools.accumulate(parallel.partition)) <= set(itertools.accumulate(chunks))
    if crossing:
        what = at("objective.chunks") if objective.name == "chunked" else at("objective.name")
        where = at("parallel.partition") if isinstance(parallel.partition, list) else at("parallel.pipeline")
        yield (
            f"{stage_at} with {what} and {where}: runs of {chunks} blocks would cross from one pipeline rank to the "
            f"next, and {why}, or cut at the pipeline ranks (at least {parallel.pipeline} chunks)"
        )


def _deepspeed(config: Config) -> Iterator[str]:
    """What this program cannot do with options that DeepSpeed itself knows."""
    bf16, at = config.train.dtype == "bf16", config.at
    for key, value in deepspeed_keys.entries(config.deepspeed):
        if problem := deepspeed_keys.complaint(key, value):
            yield f"{at(f'deepspeed.{key}')}: {problem}"
    stage_at, stage = at("deepspeed.zero_optimization.stage"), config.value("deepspeed.zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        yield f"{stage_at}: must be 0, 1, 2 or 3"
    delayed = config.objective.name == "delayed"
    if delayed and (bf16 or zero_stage(config) > 0):
        what = at("train.dtype") if bf16 else stage_at
        yield f"{what} with {at('objective.name')}: two versions of the weights are kept, in fp32 at ZeRO 0 only"
    if bf16 and stage == 0:
        yield (
            f"{stage_at} with {at('train.dtype')}: DeepSpeed steps the optimizer once with zero gradients when it is "
            "made, which decays the weights and counts as an update. Use stage 1, 2 or 3"
        )
    if config.train.dtype == "fp64" and zero_stage(config) > 0:
        yield f"{stage_at} with {at('train.dtype')}: fp64 is for checking algebra, at ZeRO 0 only"
    if config.train.dtype == "fp64" and config.parallel.data > 1:
        yield f"{at('parallel.data')} with {at('train.dtype')}: DeepSpeed averages no fp64 gradients; give 1 replica"
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
    if config.objective.name != "backprop":
        yield f"{engine_at} with {at('objective.name')}: it trains by backprop alone. Set objective.name=backprop"
    if zero_stage(config) > 1:
        yield f"{engine_at} with {at(stage_key)}: DeepSpeed's pipelines work with ZeRO 0 and 1 only"
    if config.train.dtype not in ("fp32", "bf16"):
        yield f"{engine_at} with {at('train.dtype')}: must be fp32 or bf16"
    if config.deepspeed.get("wall_clock_breakdown") and not config.deepspeed.get("steps_per_print"):
        yield f"{engine_at} with {at('deepspeed.wall_clock_breakdown')}: give deepspeed.steps_per_print too"
