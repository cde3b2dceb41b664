"""A trained model in one process: the stages of a run's checkpoint, or of a Hugging Face folder, one after another.
Without DeepSpeed, without training."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lptransformer import hub
from lptransformer.console import megabytes
from lptransformer.data.token_set import IGNORE_INDEX, Batch
from lptransformer.data.windows import WindowOptions
from lptransformer.errors import ConfigError, ModelError, RunError, UserError
from lptransformer.methods.heads import label
from lptransformer.methods.stages import StagePlan
from lptransformer.models import blueprint as blueprints
from lptransformer.models import exits, hf_config
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.hf_config import saved_config
from lptransformer.models.split import load_piece
from lptransformer.models.stage import Stage, load_stage
from lptransformer.processes import launched_rank, own_memory
from lptransformer.run_folder import checkpoint, layout, saved_stage

OWN, KEPT, LENS = "the model's own", "kept", "logit lens"
GROUP_BYTES = 1 << 30  # the weights of a group of blocks in fp32; one that is larger has one block
WITHOUT_LENGTH = 2048  # the window of models that have no greatest length
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FREE_SHARE = 0.9  # of the free memory is what the weights of a model may take
ByStage = Literal["auto", "always", "never"]


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
    plans = [saved_stage.plan_of(one) for one in saved_stage.folders(folder, update)]
    of_heads = label(config.head)
    found = [(plan.last_block, OWN if plan.is_last else of_heads, plan.index) for plan in plans if plan.has_head]
    chosen = tuple(one for one in found if exit_block in (None, one[0]))
    if not chosen:
        blocks = ", ".join(str(block) for block, _, _ in found)
        raise UserError(f"{flag} {exit_block}: {folder} has exits after the blocks {blocks} (counted from 0)")
    return Target(folder, update, chosen, config.data.sequence_length, config.model.max_position_embeddings, dtype)


class BlockGroup(NamedTuple):
    """Consecutive blocks of a model, with the head behind the last of them where there is one that is wanted; `read`
    gives them: from memory, or each time anew from disk."""

    plan: StagePlan
    read: Callable[[], Stage]


@dataclass(frozen=True)
class RunModel:
    """All stages in order, in evaluation mode."""

    update: int
    blueprint: Blueprint
    stages: list[Stage]
    device: torch.device

    @property
    def exits(self) -> list[Stage]:
        """The stages that have a head."""
        return [stage for stage in self.stages if stage.head is not None]

    @property
    def groups(self) -> list[BlockGroup]:
        """The stages, as what may also come from disk."""
        return [BlockGroup(stage.plan, partial(_same, stage)) for stage in self.stages]

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids [b, T] to the logits of the last exit, fp32 [b, T, V]."""
        hidden_states = input_ids.to(self.device)
        for stage in self.stages:
            hidden_states = stage.hidden_states(hidden_states)
        head = self.stages[-1].head
        assert head is not None
        return head.logits(hidden_states)


def _same(stage: Stage) -> Stage:
    return stage


@torch.no_grad()
def token_nlls(groups: Sequence[BlockGroup], batches: Sequence[Batch], device: torch.device) -> Tensor:
    """The negative log-likelihood of every label of these batches at every exit, in nats: fp32 [exits, labels].

    Group after group: where groups are read from disk, the weights of one of them are in memory at a time, and the
    hidden states of all the batches, which wait on the CPU.
    """
    waiting = [batch.input_ids for batch in batches]
    wait = device if len(batches) == 1 else torch.device("cpu")
    found = []
    for plan, read in groups:
        stage, of_exit = read(), []
        for number, batch in enumerate(batches):
            here = batch.to(device)
            hidden_states = stage.hidden_states(waiting[number].to(device), here.position_ids)
            waiting[number] = hidden_states.to(wait)
            if stage.head is not None:
                nlls = stage.head.token_nlls(hidden_states, here.labels, here.position_ids)
                of_exit.append(nlls[here.labels != IGNORE_INDEX].cpu())
        if plan.has_head:
            found.append(torch.cat(of_exit))
        del stage  # before the next one comes
    return torch.stack(found)


def find_update(run: Path, step: int | None = None) -> int:
    """The checkpoint after `step` updates, the newest complete one without. Raises RunError when it is not there."""
    layout.read_config(run)
    step = checkpoint.latest(run) if step is None else checkpoint.find(run, step)
    layout.refuse_links(run, step)
    return step


def blueprint_of(run: Path) -> Blueprint:
    """What a run is, from its folder. Raises RunError where that is damaged."""
    try:
        return blueprints.of_model(layout.read_config(run), saved_config(layout.read_model_config(run)))
    except (ModelError, ConfigError) as error:
        raise RunError(f"{run}: its configuration or {layout.MODEL} is damaged: {error}") from None


def blueprint_of_target(target: Target) -> Blueprint:
    """Raises RunError or ModelError, as `blueprint_of` and `blueprint.of_folder`."""
    if target.update is None:
        return blueprints.of_folder(target.folder, target.window)
    return blueprint_of(target.folder)


def windowing(target: Target) -> WindowOptions:
    """How documents become windows, as the run was trained; the defaults for a model folder."""
    return WindowOptions() if target.update is None else WindowOptions.of(layout.read_config(target.folder).data)


def vocabulary(target: Target) -> int:
    """The ids that the model embeds. Raises UserError where its configuration is damaged."""
    size: int = config_of(target).vocab_size
    return size


def config_of(target: Target) -> Any:
    """The configuration of the Hugging Face model. Raises UserError where it is damaged."""
    if target.update is not None:
        return blueprint_of(target.folder).model_config
    return hf_config.read_config(target.folder)


def load_target(target: Target, device: torch.device) -> RunModel:
    """The model up to the last of its exits, with heads there alone."""
    blueprint = blueprint_of_target(target)
    stages = [group.read() for group in groups_on_disk(target, blueprint, device)]
    return RunModel(target.update or 0, blueprint, stages, device)


def groups_on_disk(target: Target, blueprint: Blueprint, device: torch.device) -> list[BlockGroup]:
    """The model up to the last of its exits, in groups of blocks of GROUP_BYTES at most, or of one block.

    None of them is in memory. Raises RunError for a damaged run, at once or when one is read.
    """
    kinds = {block: kind for block, kind, _ in target.exits}
    last = max(kinds)
    if target.update is None:
        firsts = [0, *(block + 1 for block in sorted(kinds)[:-1])]
        plans = [
            StagePlan(number, first, block, 0, True, is_first=first == 0, is_last=kinds[block] == OWN, trained=True)
            for number, (first, block) in enumerate(zip(firsts, sorted(kinds), strict=True))
        ]
    else:
        plans = [plan for plan in _plans_of_run(target.folder, target.update, blueprint) if plan.last_block <= last]
        plans = [replace(plan, has_head=plan.has_head and plan.last_block in kinds) for plan in plans]
    return [
        BlockGroup(plan, partial(_read_group, target, blueprint, device, plan))
        for stage in plans
        for plan in _cut(stage, max(1, GROUP_BYTES // (4 * blueprint.parts.block_parameters)))
    ]


def _cut(plan: StagePlan, blocks: int) -> list[StagePlan]:
    """A stage in pieces of so many blocks; its head is behind the last of them."""
    firsts = range(plan.first_block, plan.last_block + 1, blocks)
    lasts = [*(first - 1 for first in firsts[1:]), plan.last_block]
    return [
        replace(
            plan,
            first_block=first,
            last_block=last,
            has_head=plan.has_head and last == plan.last_block,
            is_first=plan.is_first and first == plan.first_block,
            is_last=plan.is_last and last == plan.last_block,
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]


def _read_group(target: Target, blueprint: Blueprint, device: torch.device, plan: StagePlan) -> Stage:
    if target.update is None:
        stage = _stage_of_folder(target, blueprint, plan)
    else:
        stage = _stage_of_run(target.folder, target.update, blueprint, plan)
    dtype = DTYPES[target.dtype]
    for weight in stage.parameters():
        weight.data = weight.data.to(dtype)
    if stage.head is not None:
        stage.head.cast_copies(dtype)
    # Other buffers, such as the rotary embedding's frequencies, stay precise, as in training and in the library.
    return stage.to(device).eval()


def _stage_of_folder(target: Target, blueprint: Blueprint, plan: StagePlan) -> Stage:
    """Blocks of a model folder, with the exit behind them where the plan has one."""
    config, parts = blueprint.model_config, blueprint.parts
    kind = next(kind for block, kind, _ in target.exits if block == plan.last_block) if plan.has_head else None
    blocks = range(plan.first_block, plan.last_block + 1)
    piece = load_piece(target.folder, config, parts, blocks, plan.is_first, kind in (OWN, LENS))
    if kind == KEPT:
        return Stage(plan, piece.base, exits.read(target.folder, blueprint, plan.last_block))
    if kind is None:
        return Stage(plan, piece.base, None)
    return Stage(plan, piece.base, piece.head(blueprint.chunk_tokens, parts.logit_rule))


def goes_by_stage(target: Target, by_stage: ByStage, processes: int = 1, spare: int = 0) -> bool:
    """Whether a group of blocks is read each time it is its turn: as asked, or (auto) where the weights of the whole
    model, `spare` times those of a group more, and a group as it is read, do not fit together into what is free.

    `processes` share what is free here. Says so where nobody asked for it.
    """
    if by_stage != "auto":
        return by_stage == "always"
    blueprint = blueprint_of_target(target)
    plans = [group.plan for group in groups_on_disk(target, blueprint, torch.device("cpu"))]
    counts = [_weights(blueprint, plan) for plan in plans]
    needed = sum(counts) * DTYPES[target.dtype].itemsize + (spare + 1) * max(counts) * torch.float32.itemsize
    free = own_memory()[1] // -(-processes // max(1, torch.cuda.device_count()))
    if needed <= FREE_SHARE * free:
        return False
    if launched_rank() == 0:
        what = f"{target.folder} needs {megabytes(needed)} as a whole ({target.dtype}), and {megabytes(free)} are free"
        print(f"lptransformer: {what}: a group of blocks at a time (--by-stage)", file=sys.stderr, flush=True)
    return True


def _weights(blueprint: Blueprint, plan: StagePlan) -> int:
    """How many weights a group has, from those of a block and a head."""
    costs = blueprint.costs.after(plan.last_block)
    of_head = costs.head_parameters if plan.is_last else costs.auxiliary_parameters + costs.auxiliary_copied
    count = plan.num_blocks * costs.block_parameters + (of_head if plan.has_head else 0)
    return count + (costs.embedding_parameters if plan.is_first else 0)


def load(
    run: Path, update: int, device: torch.device | str = "cpu", advance: Callable[[int], None] = lambda done: None
) -> RunModel:
    """The model of a run after `update` updates, in fp32, from a complete checkpoint of it; `advance` hears of stages.

    Raises RunError where the run folder or the checkpoint is damaged.
    """
    blueprint = blueprint_of(run)
    layout.refuse_links(run, update)
    stages = []
    for plan in _plans_of_run(run, update, blueprint):
        stages.append(_stage_of_run(run, update, blueprint, plan).to(device))
        advance(1)
    return RunModel(update, blueprint, stages, torch.device(device))


def _plans_of_run(run: Path, update: int, blueprint: Blueprint) -> list[StagePlan]:
    plans = [saved_stage.plan_of(folder) for folder in saved_stage.folders(run, update)]
    blocks = [block for plan in plans for block in range(plan.first_block, plan.last_block + 1)]
    if blocks != list(range(blueprint.objective.num_blocks)):
        raise RunError(
            f"{run}: the stages after {update} updates hold the blocks {blocks}, but the model has "
            f"{blueprint.objective.num_blocks} blocks"
        )
    return plans


def _stage_of_run(run: Path, update: int, blueprint: Blueprint, plan: StagePlan) -> Stage:
    """A stage, or of its blocks those of `plan`, of which alone the tensors are read."""
    folder = checkpoint.stage_folder(run, update, plan.index)
    whole = saved_stage.plan_of(folder)
    if plan.has_head:
        saved_stage.check_head(saved_stage.SavedStage(folder), blueprint.head.model_dump())
    of_block = re.compile(rf"body\.{re.escape(blueprint.parts.blocks_in_base)}\.(\d+)\.")

    def wanted(name: str) -> bool:
        if name.startswith("head."):
            return plan.has_head
        found = of_block.match(name)
        block = int(found[1]) if found else whole.first_block
        # What belongs to no block of the stage is for the first ones: the embedding, or what is refused there.
        block = block if whole.first_block <= block <= whole.last_block else whole.first_block
        return plan.first_block <= block <= plan.last_block

    try:
        return load_stage(plan, blueprint, saved_stage.read_weights(folder, wanted))
    except RunError as error:
        raise RunError(f"{folder}: {error}") from None
