"""What may stand in the `deepspeed` section: the keys that DeepSpeed 0.19.8 reads, as plain data.

DeepSpeed silently ignores a misspelt top-level key, and checks the rest only after slow imports, so this table
answers first. A test compares it with the installed DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Types = tuple[type, ...]
_BOOL: Types = (bool,)
_NUMBER: Types = (int, float)  # DeepSpeed reads 5e8 where it needs a whole number
_TEXT: Types = (str,)
_SECTION: Types = (dict,)
_NAMES = {_BOOL: "true or false", _NUMBER: "a number", _TEXT: "text", _SECTION: "a mapping"}


def _keys(names: str, types: Types) -> dict[str, Types]:
    return dict.fromkeys(names.split(), types)


# Handed to every stage's engine as they are.
PASSED: dict[str, Types] = {
    **_keys("zero_optimization data_types comms_logger aio", _SECTION),
    **_keys("flops_profiler timers tensorboard wandb csv_monitor comet", _SECTION),
    **_keys("disable_allgather disable_python_gc dump_state", _BOOL),
    **_keys("wall_clock_breakdown memory_breakdown zero_force_ds_cpu_optimizer", _BOOL),
    **_keys("steps_per_print", _NUMBER),
    **_keys("communication_data_type log_level", _TEXT),
}
_STAGE3 = {
    **_keys("allgather_sequential gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params", _BOOL),
    **_keys("max_live_parameters max_reuse_distance model_persistence_threshold", _NUMBER),
    **_keys("module_granularity_threshold param_persistence_threshold prefetch_bucket_size", _NUMBER),
}
ZERO: dict[str, Types] = {
    **_keys("leaf_module offload_optimizer offload_param zenflow", _SECTION),
    **_keys("allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param", _BOOL),
    **_keys("cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters", _BOOL),
    **_keys("legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear", _BOOL),
    **_keys("overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint", _BOOL),
    **_keys("reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory", _BOOL),
    **_keys("stage3_gather_fp16_weights_on_model_save use_multi_rank_bucket_allreduce", _BOOL),
    **_keys("zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights", _BOOL),
    **_keys("allgather_bucket_size reduce_bucket_size stage sub_group_size zero_hpz_partition_size", _NUMBER),
    **_STAGE3,
    **{f"stage3_{key}": types for key, types in _STAGE3.items()},
}
_OFFLOAD = {**_keys("device nvme_path", _TEXT), **_keys("pin_memory", _BOOL), **_keys("buffer_count", _NUMBER)}
OFFLOAD: dict[str, dict[str, Types]] = {
    "offload_optimizer": {
        **_OFFLOAD,
        **_keys("pipeline_read pipeline_write fast_init super_offload", _BOOL),
        **_keys("ratio cpuadam_cores_perc", _NUMBER),
    },
    "offload_param": {**_OFFLOAD, **_keys("buffer_size max_in_cpu", _NUMBER)},
}
DATA_TYPES: dict[str, Types] = {
    **_keys("grad_accum_dtype param_dtype buffer_dtype", _TEXT),
    "keep_in_fp32_modules": (list, str),
}


def _because(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


# Said by keys of this program.
OURS: dict[str, str] = {
    "optimizer": "optimizer.name and train.learning_rate",
    "scheduler": "train.lr_scheduler",
    "train_batch_size": "train.micro_batch_size x train.micro_batches_per_update",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batches_per_update",
    "gradient_clipping": "train.grad_clip",
    "pipeline": "parallel.pipeline and parallel.partition",
    "data_parallel_size": "parallel.data",
    "vocabulary_size": "data.vocab_size",
    "activation_checkpointing": "train.activation_checkpointing",
    **_because("bf16 bfloat16 fp16 torch_autocast data_types.param_dtype", "train.dtype"),
    **_because("data_efficiency dataloader_drop_last", "the data section"),
    **_because("checkpoint datastates_ckpt", "checkpoint.every"),
}
_SET_HERE = "every stage's engine needs its own value, which is set by itself"
_NOT_HERE = "it does not work with local updates"
_GONE = "DeepSpeed 0.19.8 no longer has it"
_OLD_OFFLOAD = "zero_optimization.offload_optimizer and zero_optimization.offload_param say it"
_ALL_TO_HOST = "what is offloaded goes to the host's memory, all of it"
REFUSED: dict[str, str] = {
    "zero_optimization.compute_grad_norm": "clipping, skipped updates and the display need the gradient norm",
    "zero_optimization.memory_efficient_linear": "true would change matrix products of the whole process; it is off",
    "zero_optimization.round_robin_gradients": "DeepSpeed names the ranges of its flat tensors wrongly then, and "
    "checkpoints go by these names",
    "zero_optimization.legacy_stage1": _GONE,
    **_because("prescale_gradients gradient_predivide_factor", "it is for sums in fp16, and nothing here is in fp16"),
    "data_types.buffer_dtype": "it would round the copies of other stages' weights that heads hold",
    **_because("managed_gradient_accumulation gradient_allreduce_op zero_allow_untested_optimizer", _SET_HERE),
    **_because("tensor_parallel expert_parallel sequence_parallel_size hybrid_engine autotuning compile", _NOT_HERE),
    **_because("seq_parallel_communication_data_type use_data_before_expert_parallelism", _NOT_HERE),
    **_because("weight_quantization", _NOT_HERE),
    **_because("nebula compression_training amp quantize_training sparse_gradients eigenvalue", _GONE),
    **_because("sparse_attention elasticity graph_harvesting curriculum_learning progressive_layer_drop", _GONE),
    **_because("zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather", _GONE),
    **_because("zero_optimization.zeropp_loco_param", _GONE),
    "zero_optimization.zenflow": _NOT_HERE,
    **{f"zero_optimization.{key}": _OLD_OFFLOAD for key in ZERO if key.startswith("cpu_offload")},
    **{
        f"zero_optimization.{table}.{key}": _ALL_TO_HOST
        for table, keys in OFFLOAD.items()
        for key in keys
        if key not in ("device", "pin_memory")
    },
}
FORCED = "zero_force_ds_cpu_optimizer"  # whether an offloaded optimizer is DeepSpeed's own
_COMPILED = {"aio", FORCED} | {f"zero_optimization.{key}" for key in ZERO if key.startswith("zero_quantized")}
TABLES: dict[str, dict[str, Types]] = {
    "": PASSED,
    "zero_optimization.": ZERO,
    **{f"zero_optimization.{table}.": keys for table, keys in OFFLOAD.items()},
    "data_types.": DATA_TYPES,
}


def entries(options: Mapping[str, Any], table: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key of `options` that this module knows about or should know about."""
    for name, value in options.items():
        key = f"{table}{name}"
        yield key, value
        if f"{key}." in TABLES and isinstance(value, dict):
            yield from entries(value, f"{key}.")


def offloads(options: Mapping[str, Any], what: str = "offload_optimizer") -> bool:
    """Whether the optimizer's state is in the host's memory, and steps there (ZeRO-Offload); or a key of OFFLOAD."""
    return (f"zero_optimization.{what}.device", "cpu") in entries(options)


def is_known(key: str) -> bool:
    """Whether DeepSpeed knows (or knew) this dotted key."""
    table, _, name = key.rpartition(".")
    return key in OURS or key in REFUSED or name in TABLES[f"{table}." if table else ""]


def complaint(key: str, value: Any) -> str | None:
    """Why the known dotted key cannot have this value, in words that follow "deepspeed.KEY = VALUE: "; or None."""
    if key in OURS:
        return f"remove it; {OURS[key]} says it"
    if key in REFUSED:
        return f"remove it; {REFUSED[key]}"
    table, _, name = key.rpartition(".")
    types = TABLES[f"{table}." if table else ""][name]
    wrong_bool = isinstance(value, bool) and bool not in types
    auto = value == "auto" and table == "zero_optimization" and name != "stage"  # DeepSpeed takes its default then
    if not auto and (wrong_bool or not isinstance(value, types)):
        return f"must be {_NAMES.get(types, 'a list of names')}"
    if name == "device" and value not in ("cpu", "none"):
        return "must be cpu or none; nothing is offloaded to NVMe"
    return None


def compiled(options: dict[str, Any]) -> list[str]:
    """The dotted keys of `options` for which DeepSpeed builds operators when they are first used."""

    return [key for key, value in entries(options) if key in _COMPILED and value not in (False, "auto", {})]


BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size


def bucket_elements(weights: int) -> int:
    """A bucket for reducing the gradients of `weights` weights: no more than DeepSpeed's default, 2 GB in fp32."""
    return min(weights, BUCKET_ELEMENTS)
