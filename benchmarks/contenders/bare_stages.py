"""No contender: the stages of several contenders by themselves, one after another, for what an ideal execution takes.

Plain torch, no channel and no DeepSpeed engine. Every process runs the stages of its own pipeline rank at the same
time as the others run theirs, so that what the processes share (memory, caches) is shared here too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contenders.face import Spec, Work, stream_of
from contenders.pieces import optimizer_of
from lptransformer.build import plan_model
from lptransformer.gradients import Duty, duties
from lptransformer.head import token_positions
from lptransformer.simulate import StageSeconds
from lptransformer.stage import Stage, make_stage


@dataclass
class Bare:
    """One stage in training by itself."""

    contender: str
    index: int
    stage: Stage
    optimizer: torch.optim.Optimizer
    duty: Duty
    inputs: Tensor
    labels: Tensor
    positions: Tensor | None
    scale: float
    grad_clip: float

    def measure(self) -> StageSeconds:
        """The seconds of every action, for one micro-batch and one update."""
        inputs = self.inputs.detach()
        if self.duty.below:
            inputs.requires_grad_()
        ticks = [time.perf_counter()]
        hidden, loss, _, gradient, pull = self.stage(inputs, self.labels, self.scale, self.positions, self.duty.split)
        ticks.append(time.perf_counter())
        above = torch.zeros_like(hidden)
        for _ in self.duty.pulls:
            assert pull is not None
            pull(above)
        ticks.append(time.perf_counter())
        from_above = gradient is not None or bool(self.duty.above)
        terms = [loss, (hidden * above).sum() if from_above else None]
        torch.stack([term for term in terms if term is not None]).sum().backward()
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
        plan = plan_model(config, work.vocab_size, None)
        batch = stream_of(config, work).batch(0)
        of_stage = duties(plan.objective.usual, plan.stages)
        for stage_plan in plan.stages:
            if stage_plan.pipeline_rank != rank:
                continue
            options: dict[str, Any] = {"seed": config.train.seed, "head": config.head}
            stage = make_stage(stage_plan, plan.config, plan.parts, **options)
            positions, fraction = None, config.head.token_fraction
            if stage_plan.has_head and not stage_plan.is_last and fraction < 1:
                rows, length = batch.input_ids.shape
                positions = token_positions(config.train.seed, stage_plan.last_block, 0, rows, length, fraction)
            hidden = torch.randn(*batch.input_ids.shape, plan.parts.hidden_size)
            found.append(
                Bare(
                    spec.name,
                    stage_plan.index,
                    stage,
                    optimizer_of(config, list(stage.parameters())),
                    of_stage[stage_plan.index],
                    batch.input_ids if stage_plan.is_first else hidden,
                    batch.labels,
                    positions,
                    1 / batch.label_tokens,
                    config.train.grad_clip,
                )
            )
    return found
