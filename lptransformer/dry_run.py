"""`train --dry-run`: what a run would be, before anything is started: its cuts, its FLOPs, its memory.

Stages are built on the meta device, and no process, no run folder and no token set is made. With a mock batch each
pipeline rank's stages train for two updates on random tokens, in this process and one rank after another, and the
measured peak stands beside the predicted one.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from lptransformer import flops, partition
from lptransformer.blueprint import Blueprint as ModelPlan
from lptransformer.blueprint import draw as plan_model
from lptransformer.config import Config
from lptransformer.config_checks import head_in_words, state_bytes
from lptransformer.console import print_table
from lptransformer.empty_model import EmptyModel
from lptransformer.errors import ConfigError
from lptransformer.footprint import RankMemory
from lptransformer.mock_run import UPDATES, as_one_replica, peak_bytes
from lptransformer.prepare import vocabulary

MIB = 2**20


def dry_run(config: Config, mock_batch: bool = False) -> None:
    """Check all that one process can, print the plan of the run and the memory of every pipeline rank.

    Of `engine: deepspeed_pipeline` the stages and FLOPs alone are known: they are those of the engine local.
    Raises UserError where the run could not start. Training text has to be there, but need not be prepared.
    """
    if mock_batch and config.engine != "local":
        raise ConfigError(
            f"--mock-batch with {config.at('engine')}: DeepSpeed's own pipeline is not run in one process"
        )
    data = config.data
    ids = vocabulary(**data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"}))
    plan = plan_model(config, ids, None)
    rows = partition.table(plan.stages, plan.costs, head_in_words(config), state_bytes(config))
    print_table(f"dry run: {config.run.dir} is not touched", list(rows[0]), [list(row.values()) for row in rows])
    print(_flops_in_words(config, plan))
    if config.engine != "local":
        print(
            f"no memory is predicted with {config.at('engine')}: what DeepSpeed's own pipeline keeps is not known; "
            "--engine=local predicts what the same stages take under 1F1B of this program"
        )
        return
    model = EmptyModel(config, plan)
    memory = [model.predict(config, rank) for rank in range(config.parallel.pipeline)]
    print_table("predicted memory of one process, MiB", COLUMNS, [_row(rank, one) for rank, one in enumerate(memory)])
    print(_machine_in_words(config, max(one.peak for one in memory)))
    if mock_batch:
        one = as_one_replica(config)
        rows_of_ranks = []
        for rank in range(config.parallel.pipeline):
            expected, measured = model.predict(one, rank, UPDATES - 1).peak, peak_bytes(one, plan, rank)
            rows_of_ranks.append((rank, _mib(expected), _mib(measured), f"{expected / measured - 1:+.1%}"))
        few = one.train.micro_batches_per_update
        title = f"{UPDATES} mock updates of {few} micro-batches, one replica: peak memory of one process, MiB"
        print_table(title, ("pipeline rank", "predicted", "measured", "difference"), rows_of_ranks)


_KINDS = ("weights", "gradients", "optimizer", "copies", "activations", "ZeRO buckets", "messages")
COLUMNS = ("pipeline rank", *_KINDS, "peak", "micro-batches held")


def _row(rank: int, one: RankMemory) -> tuple[Any, ...]:
    sizes = (
        one.weights,
        one.gradients,
        one.optimizer,
        one.copies,
        one.activations,
        one.buckets,
        one.messages,
        one.peak,
    )
    return (rank, *map(_mib, sizes), one.held)


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f}"


def _flops_in_words(config: Config, plan: ModelPlan) -> str:
    tokens = config.train.micro_batches_per_update * config.train.micro_batch_size * config.data.sequence_length
    mean = flops.spent(plan.objective, plan.costs, config.train.steps, config.train.steps).total / config.train.steps
    trained = f"{config.train.steps} updates: {mean * tokens * config.train.steps:.3g} FLOPs"
    return f"an update: {tokens} tokens, {mean * tokens:.3g} FLOPs; {trained}"


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
