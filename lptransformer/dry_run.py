"""`train --dry-run`: what a run would be, before anything is started: its cuts, its FLOPs, its memory.

Stages are built on the meta device, and no process, no run folder and no token set is made.
"""

from __future__ import annotations

import psutil
import torch

from lptransformer import flops, partition
from lptransformer.build import ModelPlan, plan_model
from lptransformer.config import Config, zero_stage
from lptransformer.config_checks import head_in_words, micro_batch_size, state_bytes
from lptransformer.prepare import vocabulary
from lptransformer.progress import table
from lptransformer.rank_memory import RankMemory, precision
from lptransformer.stage_memory import EmptyStages

MIB = 2**20
_COLUMNS = ("weights", "gradients", "optimizer", "copies", "activations", "buckets", "messages", "peak")


def dry_run(config: Config) -> None:
    """Check all that one process can, print the plan of the run and the memory of every pipeline rank.

    Of `engine: deepspeed_pipeline` the stages and FLOPs alone are known: they are those of the engine local.
    Raises UserError where the run could not start. Training text has to be there, but need not be prepared.
    """
    plan = unprepared(config)
    rows = partition.table(plan.stages, plan.costs, head_in_words(config), state_bytes(config))
    table(f"dry run: {config.run.dir} is not touched", list(rows[0]), [list(row.values()) for row in rows])
    print(_flops_in_words(config, plan))
    if config.engine != "local":
        print(
            f"no memory is predicted with {config.at('engine')}: what DeepSpeed's own pipeline keeps is not known; "
            "--engine=local predicts what the same stages take under 1F1B of this program"
        )
        return
    ranks = predicted(config, plan)
    lines = [
        (number, *(f"{getattr(rank, name) / MIB:,.1f}" for name in _COLUMNS), rank.held)
        for number, rank in enumerate(ranks)
    ]
    names = ("pipeline rank", *_COLUMNS, "micro-batches held")
    table("predicted memory of one process, MiB (buckets: ZeRO's)", names, lines)
    print(_machine_in_words(config, max(rank.peak for rank in ranks)))


def unprepared(config: Config) -> ModelPlan:
    """What would be built, of text that need not be prepared."""
    data = config.data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"})
    return plan_model(config, vocabulary(**data), None)


def predicted(config: Config, plan: ModelPlan) -> list[RankMemory]:
    """The memory of a process of every pipeline rank, on this machine."""
    train, parallel = config.train, config.parallel
    how = precision(
        train.dtype,
        config.optimizer,
        config.deepspeed,
        zero_stage=zero_stage(config),
        replicas=parallel.data,
        fused_step=torch.cuda.is_available(),
    )
    stages = EmptyStages(
        plan.config, plan.parts, config.head, dtype=train.dtype, sequence_length=config.data.sequence_length
    )
    return stages.ranks(
        plan.objective,
        plan.stages,
        how,
        micro_batch_size=micro_batch_size(config),
        rounds=train.micro_batches_per_update // parallel.data,
        in_flight=parallel.in_flight,
    )


def _flops_in_words(config: Config, plan: ModelPlan) -> str:
    steps = config.train.steps
    tokens = config.train.micro_batches_per_update * micro_batch_size(config) * config.data.sequence_length
    total = flops.spent(plan.objective, plan.costs, steps, steps).total * tokens
    return f"an update: {tokens} tokens, {total / steps:.3g} FLOPs; {steps} updates: {total:.3g} FLOPs"


def _machine_in_words(config: Config, peak: int) -> str:
    processes = config.parallel.pipeline * config.parallel.data
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        has = (
            f"this machine: {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB each"
        )
        return f"{has}; the largest process takes {peak / 2**30:.2f} GiB, beside what CUDA needs for itself"
    total = psutil.virtual_memory().total
    has = f"this machine: no GPU, {total / 2**30:.1f} GiB of memory"
    return f"{has}; {processes} processes take up to {processes * peak / 2**30:.2f} GiB, beside what libraries need"
