"""What the checkpoints of a run take on the disk, and their copies in memory, before it is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lptransformer.config.schema import Config
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.heads import HEADS
from lptransformer.methods.stages import StagePlan, trained_of, weights_of
from lptransformer.models.blueprint import Blueprint
from lptransformer.planning.stage_memory import EmptyStages
from lptransformer.planning.stage_state import moments


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of each checkpoint and, once for all, of weights that never change; and how many are there at the end."""

    each: int
    once: int
    many: int

    @property
    def total(self) -> int:
        return self.many * self.each + self.once


def checkpoint_bytes(config: Config, blueprint: Blueprint) -> CheckpointBytes:
    """Headers of files are left out, and copies of weights that are on their way; frozen weights of several heads count
    for each, also where they are the same and share a file. Where train.epochs has not been counted yet, it is one
    checkpoint."""
    stages = _of_stages(config, blueprint)
    each = sum(stage.whole + stage.owned for stage in stages)
    return CheckpointBytes(each, sum(stage.frozen for stage in stages), _many(config))


def host_copies(config: Config, blueprint: Blueprint) -> list[int]:
    """Bytes of the copies that the first replica of every pipeline rank keeps from its first save on."""
    replicas = blueprint.replicas if blueprint.zero_stage > 0 else 1
    found = [0] * (blueprint.stages[-1].pipeline_rank + 1)
    for stage, of_stage in zip(blueprint.stages, _of_stages(config, blueprint), strict=True):
        found[stage.pipeline_rank] += of_stage.whole + -(-of_stage.owned // replicas)
    return found


class _Content(NamedTuple):
    """Bytes of a stage: of whole tensors that change, of what its replicas own, and of frozen tensors."""

    whole: int
    owned: int
    frozen: int


def _of_stages(config: Config, blueprint: Blueprint) -> list[_Content]:
    empty = EmptyStages(blueprint, alike=True)  # counts stages that are alike once
    return [_of_stage(stage, config, blueprint, empty) for stage in blueprint.stages]


def _of_stage(stage: StagePlan, config: Config, blueprint: Blueprint, empty: EmptyStages) -> _Content:
    dtype, exact = DTYPES[blueprint.dtype].bytes, DTYPES[blueprint.dtype].state_bytes
    costs, zero = blueprint.costs, blueprint.zero_stage
    trained, (own, copied) = trained_of(stage, costs), weights_of(stage, costs)
    frozen = own - trained + (copied if HEADS[blueprint.head.kind].fitted else 0)
    tensors = moments(config.optimizer) + (zero == 3 or dtype < exact)
    by_muon = empty.tensors(stage).matrices if config.optimizer.name == "muon" and stage.trained else 0
    owned = (trained * tensors - by_muon) * exact
    owned += trained * dtype * blueprint.objective.delayed
    whole = (own + copied - frozen - (trained if zero == 3 else 0)) * dtype
    return _Content(whole, owned, frozen * dtype)


def _many(config: Config) -> int:
    steps, keep = config.train.steps or 1, config.checkpoint
    saves = {steps, *(range(keep.every, steps, keep.every) if keep.every else ())}
    if keep.keep_last is None:
        return len(saves)
    newest = set(sorted(saves)[-keep.keep_last :])
    older = {save for save in saves - newest if keep.keep_every and save % keep.keep_every == 0}
    return len(newest | older) + (keep.keep_best is not None and len(newest | older) < len(saves))
