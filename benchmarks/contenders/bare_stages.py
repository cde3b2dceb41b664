"""No contender: the stages of several contenders by themselves, one after another, for what an ideal execution takes.

Plain torch, no channel and no DeepSpeed engine. Every process runs the stages of its own pipeline rank at the same
time as the others run theirs, so that what the processes share (memory, caches) is shared here too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from contenders.face import Spec, Work, stream_of
from contenders.pieces import optimizer_of
from lptransformer.methods.gradient_flow import Duty
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.head import LossBatch, token_positions
from lptransformer.models.stage import Stage, backward_loss, make_stage
from lptransformer.planning.simulate import StageSeconds


@dataclass
class Bare:
    """One stage in training by itself."""

    contender: str
    index: int
    stage: Stage
    optimizer: torch.optim.Optimizer
    duty: Duty
    inputs: Tensor
    batch: LossBatch
    grad_clip: float

    def measure(self) -> StageSeconds:
        """The seconds of every action, for one micro-batch and one update."""
        inputs = self.inputs.detach()
        if self.duty.below:
            inputs.requires_grad_()
        ticks = [time.perf_counter()]
        output = self.stage(inputs, self.batch, self.duty.split)
        ticks.append(time.perf_counter())
        above = torch.zeros_like(output.hidden_states)
        for _ in self.duty.pulls:
            assert output.pull is not None
            output.pull(above)
        ticks.append(time.perf_counter())
        backward_loss(output, self.duty, [(above, weight) for _, weight in self.duty.above]).backward()
        ticks.append(time.perf_counter())
        nn.utils.clip_grad_norm_(self.stage.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ticks.append(time.perf_counter())
        forward, pulls, backward, update = (after - before for before, after in zip(ticks, ticks[1:], strict=False))
        return StageSeconds(forward, backward, pulls / max(1, len(self.duty.pulls)), update)


def build(specs: Sequence[tuple[Spec, tuple[str, ...]]], work: Work, rank: int) -> list[Bare]:
    """The stages on pipeline rank `rank` of contenders, each with what its kind changes in the configuration."""
    found = []
    for spec, of_kind in specs:
        config = spec.config_of(work, f"parallel.pipeline={work.ranks}", *of_kind)
        blueprint = make_blueprint(config, work.vocab_size, None)
        batch = stream_of(config, work).batch(0)
        of_stage = blueprint.phases[0].duties
        for stage_plan in blueprint.stages:
            if stage_plan.pipeline_rank != rank:
                continue
            stage = make_stage(stage_plan, blueprint, seed=config.train.seed)
            fraction, positions = blueprint.head_fractions.get(stage_plan.index, 1.0), None
            if fraction < 1:
                rows, length = batch.input_ids.shape
                seed, block = config.train.seed, stage_plan.last_block
                positions = token_positions(seed, block, 0, rows, length, fraction)
            hidden = torch.randn(*batch.input_ids.shape, blueprint.parts.hidden_size)
            found.append(
                Bare(
                    spec.name,
                    stage_plan.index,
                    stage,
                    optimizer_of(config, list(stage.parameters())),
                    of_stage[stage_plan.index],
                    batch.input_ids if stage_plan.is_first else hidden,
                    LossBatch(batch.labels, 1 / batch.label_tokens, positions),
                    config.train.grad_clip,
                )
            )
    return found
