"""A trained model in one process: the stages of a run's checkpoint, or of a Hugging Face folder, one after another.
Without DeepSpeed, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lptransformer import hub
from lptransformer.data.token_set import Batch
from lptransformer.errors import ConfigError, ModelError, RunError, UserError
from lptransformer.methods.heads import label
from lptransformer.methods.stages import StagePlan
from lptransformer.models import blueprint as blueprints
from lptransformer.models import exits, hf_config
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import LossBatch
from lptransformer.models.hf_config import saved_config
from lptransformer.models.split import load_piece
from lptransformer.models.stage import Stage, load_stage
from lptransformer.run_folder import checkpoint, layout

OWN, KEPT, LENS = "the model's own", "kept", "logit lens"
WITHOUT_LENGTH = 2048  # the window of models that have no greatest length
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """What is evaluated: a run after some updates, or a model folder (`update` None), at these exits: the block that
    each stands after, what its head is, and the number of its stage, in order. `longest` is the model's length."""

    folder: Path
    update: int | None
    exits: tuple[tuple[int, str, int], ...]
    window: int
    longest: int | None
    dtype: str = "fp32"


def find(
    folder: Path,
    step: int | None = None,
    exit_block: int | None = None,
    dtype: str = "fp32",
    flag: str = "--exit",
) -> Target:
    """What there is to evaluate in a folder; `window` is that of the run, else the model's length.

    Of a model folder without exits kept beside it an exit is its own norm and readout behind a block ("logit lens").
    `flag` is what asked for the exit. Raises UserError: it is neither a run's folder nor a model's, or has no such
    checkpoint or exit.
    """
    if (folder / layout.CONFIG).is_file():
        return _find_in_run(folder, find_update(folder, step), exit_block, dtype, flag)
    hub.refuse_adapter(folder, f"MODEL is {folder}")
    if not (folder / "config.json").is_file():
        nor = "nor a model folder: it has no config.json"
        raise RunError(f"{folder} is no run folder: it has no {layout.CONFIG}; {nor}")
    if step is not None:
        raise UserError(f"--step {step}: {folder} is a model folder, which has no checkpoints")
    config = hf_config.read_config(folder)
    depth, longest = config.num_hidden_layers, getattr(config, "max_position_embeddings", None)
    there = {block: KEPT for block in exits.kept(folder)} | {depth - 1: OWN}
    if exit_block is not None and not 0 <= exit_block < depth:
        raise UserError(f"{flag} {exit_block}: {folder} has {depth} blocks: give 0 to {depth - 1}")
    blocks = sorted(there) if exit_block is None else [exit_block]
    found = tuple((block, there.get(block, LENS), number) for number, block in enumerate(blocks))
    return Target(folder, None, found, longest or WITHOUT_LENGTH, longest, dtype)


def _find_in_run(folder: Path, update: int, exit_block: int | None, dtype: str, flag: str) -> Target:
    config = layout.read_config(folder)
    plans = [checkpoint.plan_of(one) for one in checkpoint.stage_folders(folder, update)]
    of_heads = label(config.head)
    found = [(plan.last_block, OWN if plan.is_last else of_heads, plan.index) for plan in plans if plan.has_head]
    chosen = tuple(one for one in found if exit_block in (None, one[0]))
    if not chosen:
        blocks = ", ".join(str(block) for block, _, _ in found)
        raise UserError(f"{flag} {exit_block}: {folder} has exits after the blocks {blocks} (counted from 0)")
    return Target(folder, update, chosen, config.data.sequence_length, config.model.max_position_embeddings, dtype)


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


def vocabulary(target: Target) -> int:
    """The ids that the model embeds. Raises UserError where its configuration is damaged."""
    if target.update is not None:
        return blueprint_of(target.folder).parts.vocab_size
    size: int = hf_config.read_config(target.folder).vocab_size
    return size


def load_target(target: Target, device: torch.device) -> RunModel:
    """The model up to the last of its exits, with heads there alone."""
    wanted = [block for block, _, _ in target.exits]
    if target.update is not None:
        model = load(target.folder, target.update, device)
        stages = [stage for stage in model.stages if stage.plan.last_block <= wanted[-1]]
    else:
        model = RunModel(0, blueprints.of_folder(target.folder, target.window), [], device)
        firsts = [0, *(block + 1 for block in wanted[:-1])]
        stages = [_stage_of_folder(target, model.blueprint, *place) for place in zip(firsts, wanted, strict=True)]
    for stage in stages:
        stage.head = stage.head if stage.plan.last_block in wanted else None
        stage.to(device, DTYPES[target.dtype]).eval()
    return replace(model, stages=stages)


def _stage_of_folder(target: Target, blueprint: Blueprint, first: int, last: int) -> Stage:
    """Blocks `first` to `last` of a model folder, with the exit behind them."""
    config, parts = blueprint.model_config, blueprint.parts
    kind = next(head for block, head, _ in target.exits if block == last)
    piece = load_piece(target.folder, config, parts, range(first, last + 1), first == 0, kind in (OWN, LENS))
    if kind == KEPT:
        head = exits.read(target.folder, blueprint, last)
    else:
        head = piece.head(blueprint.chunk_tokens, parts.logit_rule)
    plan = StagePlan(0, first, last, 0, True, is_first=first == 0, is_last=kind == OWN, trained=True)
    return Stage(plan, piece.base, head)


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
