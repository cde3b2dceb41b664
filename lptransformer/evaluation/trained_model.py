"""A run's model in one process: the stages of a checkpoint, one after another. Without DeepSpeed, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lptransformer.data.token_set import Batch
from lptransformer.errors import ConfigError, ModelError, RunError
from lptransformer.models import blueprint as blueprints
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import LossBatch
from lptransformer.models.hf_config import saved_config
from lptransformer.models.stage import Stage, load_stage
from lptransformer.run_folder import checkpoint, layout


@dataclass(frozen=True)
class RunModel:
    """All stages in order, in fp32 and evaluation mode."""

    update: int
    blueprint: Blueprint
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
            output = stage(inputs, LossBatch(labels, scale=1.0))
            inputs = output.hidden_states
            if output.nll_sum is not None:
                sums.append(output.nll_sum)
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
    layout.read_config(run)
    if step is None:
        return checkpoint.latest(run)
    updates = checkpoint.complete_updates(run)
    if step not in updates:
        there = f"there are those after {', '.join(map(str, updates))} updates" if updates else "there is none"
        raise RunError(f"{run} holds no complete checkpoint after {step} updates (--step): {there}")
    return step


def blueprint_of(run: Path) -> Blueprint:
    """What a run is, from its folder. Raises RunError where that is damaged."""
    try:
        return blueprints.of_model(layout.read_config(run), saved_config(layout.read_model_config(run)))
    except (ModelError, ConfigError) as error:
        raise RunError(f"{run}: its configuration or {layout.MODEL} is damaged: {error}") from None


def load(
    run: Path, update: int, device: torch.device | str = "cpu", advance: Callable[[int], None] = lambda done: None
) -> RunModel:
    """The model of a run after `update` updates, from a complete checkpoint of it; `advance` hears of stages.

    Raises RunError where the run folder or the checkpoint is damaged.
    """
    blueprint = blueprint_of(run)
    num_blocks = blueprint.objective.num_blocks
    stages = []
    for folder in checkpoint.stage_folders(run, update):
        plan, weights = checkpoint.plan_of(folder), checkpoint.read_weights(folder)
        try:
            stage = load_stage(plan, blueprint, weights)
        except RunError as error:
            raise RunError(f"{folder}: {error}") from None
        stages.append(stage.to(device))
        advance(1)
    blocks = [block for stage in stages for block in range(stage.plan.first_block, stage.plan.last_block + 1)]
    if blocks != list(range(num_blocks)):
        raise RunError(
            f"{run}: the stages after {update} updates hold the blocks {blocks}, but the model has {num_blocks} blocks"
        )
    return RunModel(update, blueprint, stages, torch.device(device))
