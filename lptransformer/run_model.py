"""A run's model in one process: the stages of a checkpoint, one after another. Without DeepSpeed, without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lptransformer import checkpoint, run_folder
from lptransformer.errors import RunError
from lptransformer.family import Anatomy, anatomy, saved_config
from lptransformer.stage import Stage, load_stage
from lptransformer.token_set import Batch


@dataclass(frozen=True)
class RunModel:
    """All stages in order, in fp32 and evaluation mode; `config` is that of the Hugging Face model."""

    update: int
    config: Any
    parts: Anatomy
    stages: list[Stage]
    device: torch.device

    @property
    def exits(self) -> list[Stage]:
        """The stages that have a head."""
        return [stage for stage in self.stages if stage.head is not None]

    @torch.no_grad()
    def loss_sums(self, batch: Batch) -> list[float]:
        """The sum of the negative log-likelihoods of the labels, in nats, at every exit."""
        inputs, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
        sums = []
        for stage in self.stages:
            inputs, _, loss_sum, *_ = stage(inputs, labels, 1.0)
            if loss_sum is not None:
                sums.append(loss_sum)
        return torch.stack(sums).tolist()

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids [b, T] to the logits of the last exit, fp32 [b, T, V]."""
        hidden_states = input_ids.to(self.device)
        for stage in self.stages:
            hidden_states = stage.hidden_states(hidden_states)
        head = self.stages[-1].head
        assert head is not None
        return head.logits(hidden_states)


def find_update(run: Path, step: int | None = None) -> int:
    """The checkpoint after `step` updates, the newest complete one without. Raises RunError when it is not there."""
    run_folder.read_config(run)
    if step is None:
        return checkpoint.latest(run)
    updates = checkpoint.complete_updates(run)
    if step not in updates:
        there = f"there are those after {', '.join(map(str, updates))} updates" if updates else "there is none"
        raise RunError(f"{run} holds no complete checkpoint after {step} updates (--step): {there}")
    return step


def load(run: Path, update: int, device: torch.device | str = "cpu") -> RunModel:
    """The model of a run after `update` updates, from a complete checkpoint of it.

    Raises RunError where the run folder or the checkpoint is damaged.
    """
    head = run_folder.read_config(run).head
    config = saved_config(run_folder.read_model_config(run))
    parts = anatomy(config)
    stages = []
    for folder in checkpoint.stage_folders(run, update):
        plan, weights = checkpoint.plan_of(folder), checkpoint.read_weights(folder)
        try:
            stage = load_stage(plan, config, parts, weights, head=head)
        except RunError as error:
            raise RunError(f"{folder}: {error}") from None
        stages.append(stage.to(device))
    blocks = [block for stage in stages for block in range(stage.plan.first_block, stage.plan.last_block + 1)]
    if blocks != list(range(config.num_hidden_layers)):
        raise RunError(
            f"{run}: the stages after {update} updates hold the blocks {blocks}, but the model has "
            f"{config.num_hidden_layers} blocks"
        )
    return RunModel(update, config, parts, stages, torch.device(device))
