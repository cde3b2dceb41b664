"""A run's stages without memory, and what the processes that hold them take: exact, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lptransformer import footprint, gradients, passes
from lptransformer.build import DTYPES, ModelPlan, copy_lags
from lptransformer.config import Config, zero_stage
from lptransformer.deepspeed_keys import BUCKET_ELEMENTS
from lptransformer.footprint import PassBytes, Precision, RankMemory, StageTensors


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
