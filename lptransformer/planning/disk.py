"""What the checkpoints of a run take on the disk, before it is started."""

from __future__ import annotations

from dataclasses import dataclass

from lptransformer.config.schema import Config
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.heads import HEADS
from lptransformer.methods.stages import trained_of, weights_of
from lptransformer.models.blueprint import Blueprint


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
    dtype = DTYPES[blueprint.dtype].bytes
    exact = DTYPES[blueprint.dtype].state_bytes  # of what the optimizer keeps
    optimizer = config.optimizer
    tensors = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    of_trained = exact * (tensors + blueprint.objective.delayed)
    of_trained += exact if blueprint.zero_stage == 3 else dtype + (exact if dtype < exact else 0)
    trained = sum(trained_of(stage, blueprint.costs) for stage in blueprint.stages)
    own, copied = map(sum, zip(*(weights_of(stage, blueprint.costs) for stage in blueprint.stages), strict=True))
    frozen = own - trained + (copied if HEADS[blueprint.head.kind].fitted else 0)
    changing = trained * of_trained + (own + copied - trained - frozen) * dtype
    changing += blueprint.tied * blueprint.costs.tied_parameters * dtype  # the matrix has two names
    return CheckpointBytes(changing, frozen * dtype, _many(config))


def _many(config: Config) -> int:
    steps, keep = config.train.steps or 1, config.checkpoint
    saves = {steps, *(range(keep.every, steps, keep.every) if keep.every else ())}
    if keep.keep_last is None:
        return len(saves)
    newest = set(sorted(saves)[-keep.keep_last :])
    older = {save for save in saves - newest if keep.keep_every and save % keep.keep_every == 0}
    return len(newest | older) + (keep.keep_best is not None and len(newest | older) < len(saves))
