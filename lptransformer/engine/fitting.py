"""Before training: the maps of fitted heads, by ridge regression on the pretrained model's own hidden states.

Replica 0 of every pipeline rank runs the model forward in fp32, micro-batch after micro-batch, over the first tokens in
training order. Hidden states go up the ranks as they are, without a codec. What all maps lead to (the input of the
model's last blocks, or the rows behind its norm) travels down once, every rank fits its own maps, and its other
replicas get them. Nothing of it depends on the placement.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from lptransformer.data.token_set import IGNORE_INDEX, Batch
from lptransformer.engine.interface import Stream
from lptransformer.engine.p2p import translate_broken_channel
from lptransformer.engine.process_groups import World, translate_lost_processes
from lptransformer.errors import DataError
from lptransformer.methods.heads import HEADS
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import FittedMap
from lptransformer.models.stage import Stage

FIT_TOKENS = 8192  # at most: an epoch may have fewer


def fit_heads(
    world: World, blueprint: Blueprint, stages: Mapping[int, Stage], stream: Stream, heads: Collection[int]
) -> None:
    """Fit the maps of these heads (the numbers of their stages), where this process's `stages` have them. The stages
    hold the model's weights in fp32. Nothing without fitted heads.

    Every process of the run calls this with the same `heads`. Raises TrainingError when another one has gone.
    """
    depth, options = blueprint.objective.num_blocks, blueprint.head
    if not HEADS[options.kind].fitted:
        return
    # The block whose input is wanted, or the one that would be behind the last. Where a head's own blocks follow its
    # border there is nothing to bridge: the map stays 0.
    goal = depth - options.blocks
    bridged = [plan.last_block + (options.blocks > 0) < goal for plan in blueprint.stages]
    fits = [plan for plan, far in zip(blueprint.stages, bridged, strict=True) if plan.index in heads and far]
    own = {plan.index: _map_of(stages[plan.index]) for plan in fits if plan.index in stages}
    if fits and world.data_rank == 0:
        _fit(world, blueprint, stages, stream, own, goal, fits[0].pipeline_rank)
    if world.data_size > 1:
        with translate_lost_processes():
            for fitted in own.values():
                for weight in fitted.linear.parameters():
                    dist.broadcast(weight.data, 0)


def _fit(
    world: World,
    blueprint: Blueprint,
    stages: Mapping[int, Stage],
    stream: Stream,
    own: Mapping[int, FittedMap],
    goal: int,
    lowest: int,
) -> None:
    """On a first replica. Pipeline ranks from `lowest` up have a map to fit, or hand on what others need for theirs."""
    rank, last = world.pipeline_rank, blueprint.stages[-1]
    holder = next((plan for plan in blueprint.stages if goal <= plan.last_block), last)  # its stage has the goal
    if rank > holder.pipeline_rank:
        return
    below = world.group(f"fit/{rank - 1}-{rank}", 1, 2) if rank > 0 else None
    above = world.group(f"fit/{rank}-{rank + 1}", 0, 2) if rank < holder.pipeline_rank else None
    found: dict[int, list[Tensor]] = {index: [] for index in own}
    reached: list[Tensor] = []
    with torch.no_grad(), translate_broken_channel("of the fit of heads"):
        for batch, counted in _first_tokens(blueprint, stream):
            inputs = batch.input_ids
            if below is not None:
                inputs = torch.empty(blueprint.hidden_shape)
                below.recv([inputs], 0, 0).wait()
            inputs = inputs.to(world.device)
            position_ids = None if batch.position_ids is None else batch.position_ids.to(world.device)
            for index, stage in stages.items():
                if index <= holder.index:
                    inputs, at_goal = _forward(stage, inputs, position_ids, blueprint, goal)
                    reached += [at_goal[counted].cpu()] if at_goal is not None else []
                if index in own:
                    found[index].append(inputs[counted].cpu())
            if above is not None:
                above.send([inputs.cpu()], 1, 0).wait()
        rows = sum(int(counted.sum()) for _, counted in _first_tokens(blueprint, stream))
        wanted = torch.cat(reached) if reached else torch.empty(rows, blueprint.parts.hidden_size)
        if above is not None and rank >= lowest:  # ranks below the lowest head have given it its inputs, and are done
            above.recv([wanted], 1, 0).wait()
        if below is not None and rank > lowest:
            below.send([wanted], 0, 0).wait()
    for index, fitted in own.items():
        fitted.fit(torch.cat(found[index]).to(world.device), wanted.to(world.device))


def _map_of(stage: Stage) -> FittedMap:
    assert stage.head is not None and stage.head.fitted is not None
    return stage.head.fitted


def _forward(
    stage: Stage, inputs: Tensor, position_ids: Tensor | None, blueprint: Blueprint, goal: int
) -> tuple[Tensor, Tensor | None]:
    """The hidden states behind a stage, and those that the maps are to give, where it has them: the input of block
    `goal`, or the rows of the model's own head."""
    plan, at_goal = stage.plan, list[Tensor]()
    if not plan.first_block <= goal <= plan.last_block:
        hidden_states = stage.hidden_states(inputs, position_ids)
        if goal > plan.last_block and plan.is_last:
            assert stage.head is not None
            at_goal.append(stage.head.norm(hidden_states))
        return hidden_states, at_goal[0] if at_goal else None
    block = stage.body.get_submodule(f"{blueprint.parts.blocks_in_base}.{goal}")
    hook = block.register_forward_pre_hook(
        lambda _, args, named: at_goal.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    hidden_states = stage.hidden_states(inputs, position_ids)
    hook.remove()
    return hidden_states, at_goal[0]


def _first_tokens(blueprint: Blueprint, stream: Stream) -> Iterator[tuple[Batch, Tensor]]:
    """The micro-batches of the first FIT_TOKENS tokens, or of the whole first epoch, and which positions count, bool
    [b, T]: all but padding and the first of a window or of an isolated document, where a model sees no context and is
    unlike itself."""
    rows, length = blueprint.micro_batch_size, blueprint.sequence_length
    tokens = math.inf  # of an epoch, once its end is seen
    for number in count():
        done = number * rows * length
        after = stream.position(number + 1)
        if after["epoch"] > 0:
            tokens = ((number + 1) * rows - after["offset"]) // after["epoch"] * length
        if done >= min(tokens, FIT_TOKENS):
            return
        try:
            batch = stream.batch(number)
        except DataError:
            if number == 0:
                raise
            return  # rows without a length have ended; what is wrong with a row is said when it is its turn
        counted = torch.arange(done, done + rows * length).view(rows, length) < min(tokens, FIT_TOKENS)
        labelled = batch.labels != IGNORE_INDEX
        counted[:, 1:] &= labelled.flip(1).cummax(1).values.flip(1)[:, :-1]  # what is behind the last label is padding
        counted[:, 0] = False
        if batch.position_ids is not None:
            counted &= batch.position_ids > 0
        yield batch, counted
