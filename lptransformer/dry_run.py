"""`train --dry-run`: what a run would be, before anything is started: its cuts, its FLOPs, its memory.

Stages are built on the meta device, and no process, no run folder and no token set is made. With a mock batch each
pipeline rank's stages train for two updates on random tokens, in this process and one rank after another, and the
measured peak stands beside the predicted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from lptransformer import flops, footprint, gradients, partition, passes
from lptransformer.build import DTYPES, ModelPlan, copy_lags, plan_model
from lptransformer.config import Config, zero_stage
from lptransformer.config_checks import head_in_words, state_bytes
from lptransformer.deepspeed_keys import BUCKET_ELEMENTS
from lptransformer.errors import ConfigError
from lptransformer.footprint import PassBytes, Precision, RankMemory, StageTensors
from lptransformer.mock_run import UPDATES, as_one_replica, peak_bytes
from lptransformer.prepare import vocabulary
from lptransformer.progress import table

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
    table(f"dry run: {config.run.dir} is not touched", list(rows[0]), [list(row.values()) for row in rows])
    print(_flops_in_words(config, plan))
    if config.engine != "local":
        print(
            f"no memory is predicted with {config.at('engine')}: what DeepSpeed's own pipeline keeps is not known; "
            "--engine=local predicts what the same stages take under 1F1B of this program"
        )
        return
    model = EmptyModel(config, plan)
    memory = [model.predict(config, rank) for rank in range(config.parallel.pipeline)]
    table("predicted memory of one process, MiB", COLUMNS, [_row(rank, one) for rank, one in enumerate(memory)])
    print(_machine_in_words(config, max(one.peak for one in memory)))
    if mock_batch:
        one = as_one_replica(config)
        rows_of_ranks = []
        for rank in range(config.parallel.pipeline):
            expected, measured = model.predict(one, rank, UPDATES - 1).peak, peak_bytes(one, plan, rank)
            rows_of_ranks.append((rank, _mib(expected), _mib(measured), f"{expected / measured - 1:+.1%}"))
        few = one.train.micro_batches_per_update
        title = f"{UPDATES} mock updates of {few} micro-batches, one replica: peak memory of one process, MiB"
        table(title, ("pipeline rank", "predicted", "measured", "difference"), rows_of_ranks)


class EmptyModel:
    """The stages without memory: what each is made of, and what a micro-batch takes in it."""

    def __init__(self, config: Config, plan: ModelPlan) -> None:
        self.plan = plan
        self.dtype = DTYPES[config.train.dtype]
        self.tensors: dict[int, StageTensors] = {}
        self.copies: dict[int, dict[int, int]] = {}  # [target stage][source stage]: bytes of one version
        self.passes: list[dict[int, PassBytes]] = [{} for _ in plan.objective.phases]
        for phase, of_phase in zip(plan.objective.phases, self.passes, strict=True):
            for stage, duty in zip(plan.stages, gradients.duties(phase, plan.stages), strict=True):
                empty = passes.empty_stage(stage, plan.config, plan.parts, config.head)
                self.tensors[stage.index] = passes.tensors_of(empty, self.dtype)
                self.copies[stage.index] = passes.copies_of(empty, plan.stages)
                of_phase[stage.index] = passes.of_stage(
                    empty,
                    duty,
                    micro_batch_size=config.train.micro_batch_size,
                    sequence_length=config.data.sequence_length,
                    hidden_size=plan.parts.hidden_size,
                    dtype=self.dtype,
                    token_fraction=config.head.token_fraction,
                )

    def predict(self, config: Config, pipeline_rank: int, updates: int | None = None) -> RankMemory:
        """The memory of a process of a pipeline rank, in steady state or after so many updates.

        `config` may have other numbers of replicas and micro-batches than the one that the stages were made with.
        """
        tokens = config.train.micro_batch_size * config.data.sequence_length
        local = [stage.index for stage in self.plan.stages if stage.pipeline_rank == pipeline_rank]
        states = {index: footprint.stage_state(self.tensors[index], precision(config)) for index in local}
        versions = self._versions(config, local, updates)
        states[local[0]] = replace(states[local[0]], copies=states[local[0]].copies + versions)
        return footprint.predict(
            self.plan.objective,
            self.plan.stages,
            pipeline_rank,
            states,
            self.passes,
            rounds=config.train.micro_batches_per_update // config.parallel.data,
            micro_batch_tokens=tokens,
            hidden_bytes=tokens * self.plan.parts.hidden_size * self.dtype.itemsize,
            in_flight=config.parallel.in_flight,
        )

    def _versions(self, config: Config, local: Sequence[int], updates: int | None) -> int:
        """Bytes of copies of weights on their way between stages (mirror.py), in a rank with these stages.

        A rank posts a receive for every version that can be on its way to it. Versions that a rank keeps for itself
        are shared by all heads that follow the same stage; of what it sends to other ranks one is on its way.
        """
        arriving, kept = 0, dict[tuple[int, int], int]()
        for target, lag in copy_lags(config, self.plan).items():
            waiting = math.ceil(lag / config.head.refresh_every)
            for source, size in self.copies[target].items():
                if target in local and source not in local:
                    arriving += size * (waiting + 1)
                elif source in local:
                    here = min(waiting, updates or waiting) if target in local else 1
                    kept[source, size] = max(kept.get((source, size), 0), here)
        return arriving + sum(size * number for (_, size), number in kept.items())


def precision(config: Config) -> Precision:
    """How a run keeps and trains its weights, on this machine."""
    train, zero = config.train, zero_stage(config)
    size = DTYPES[train.dtype].itemsize
    options: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    accumulated = 4 if config.value("deepspeed.data_types.grad_accum_dtype") == "fp32" else size
    adamw = config.optimizer.name == "adamw"
    contiguous = zero > 0 and options.get("contiguous_gradients", True)
    bucket = options.get("reduce_bucket_size")
    return Precision(
        weight_bytes=size,
        gradient_bytes=accumulated if zero > 1 else size,
        master_bytes=max(size, 4),
        moments=2 if adamw else int(config.optimizer.momentum > 0),
        step_temporaries=2 if adamw else 1,
        zero_stage=zero,
        replicas=config.parallel.data,
        versions=int(config.objective.name == "delayed"),
        bucket_elements=(BUCKET_ELEMENTS if bucket == "auto" else bucket) if contiguous else 0,
        buckets=1 + (zero < 3 and bool(options.get("overlap_comm"))),
        fused_step=torch.cuda.is_available(),
    )


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
