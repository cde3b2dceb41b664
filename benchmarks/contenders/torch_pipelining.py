"""The schedules of torch.distributed.pipelining over gloo: 1F1B, interleaved, and the zero-bubble ones.

1F1B has one stage per pipeline rank, all others two: rank r holds r and ranks + r, and in the schedules whose name has
a V in it, r and 2 ranks - 1 - r.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from contenders import emulated
from contenders.face import Sleeper, Spec, Work, stream_of, together
from contenders.pieces import label_tokens_of, optimizer_of
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.head import CROSS_ENTROPY, LossBatch
from lptransformer.models.stage import Stage, make_stage
from lptransformer.training.build import join_world


def stages_per_rank(schedule: str) -> int:
    return 1 if issubclass(get_schedule_class(schedule), PipelineScheduleSingle) else 2


def rank_of_stage(schedule: str, ranks: int) -> list[int]:
    """The pipeline rank that holds each stage."""
    style = "v" if schedule in ("ZBVZeroBubble", "DualPipeV") else "loop"
    mapping = generate_stage_to_rank_mapping(ranks, ranks * stages_per_rank(schedule), style)
    return [mapping[stage] for stage in sorted(mapping)]


class _Blocks(nn.Module):
    """What PipelineStage calls: inputs to hidden states. The head's weights are the stage's, its loss the loss_fn."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stage.hidden_states(inputs)


class TorchPipeline:
    """One schedule on all pipeline ranks."""

    waited_seconds = None

    def __init__(self, spec: Spec, work: Work, sleeper: Sleeper) -> None:
        assert spec.schedule is not None
        ranks = rank_of_stage(spec.schedule, work.ranks)
        config = spec.config_of(work, f"parallel.pipeline={len(ranks)}", "objective.name=backprop")
        # All pipeline ranks are one world: to it they are what replicas are to ours.
        self.world = join_world(config.model_copy(update={"parallel": _as_replicas(config.parallel, work.ranks)}))
        self.grad_clip, self.micro_batches = config.train.grad_clip, work.micro_batches
        self.stream, self.done = stream_of(config, work), 0
        blueprint = make_blueprint(config, work.vocab_size, None)
        label_tokens = label_tokens_of(config)
        own = [index for index, rank in enumerate(ranks) if rank == dist.get_rank()]
        self.first, self.last = 0 in own, len(ranks) - 1 in own
        modules: dict[int, Stage] = {}
        for index in own:
            if work.block_seconds is None:
                modules[index] = make_stage(blueprint.stages[index], blueprint, seed=config.train.seed)
            else:
                modules[index] = emulated.sleeping_stage(
                    blueprint.stages[index], blueprint.parts.hidden_size, sleeper, work.block_seconds
                )
        self.optimizer = optimizer_of(config, [p for module in modules.values() for p in module.parameters()])

        def loss_fn(hidden_states: Tensor, labels: Tensor) -> Tensor:
            head = modules[len(ranks) - 1].head
            assert head is not None
            return head(hidden_states, LossBatch(labels, 1 / label_tokens))[CROSS_ENTROPY].loss

        stages = [PipelineStage(_Blocks(modules[i]), i, len(ranks), self.world.device) for i in own]
        schedule: Any = get_schedule_class(spec.schedule)
        single = stages_per_rank(spec.schedule) == 1
        self.schedule = schedule(
            stages[0] if single else stages, n_microbatches=work.micro_batches, loss_fn=loss_fn, scale_grads=False
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def update(self) -> float | None:
        start = self.done * self.micro_batches
        batch = together([self.stream.batch(start + i) for i in range(self.micro_batches)])
        losses: list[Tensor] = []
        inputs = (batch.input_ids,) if self.first else ()
        more = {"target": batch.labels, "losses": losses} if self.last else {}
        self.schedule.step(*inputs, return_outputs=False, **more)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        squares = torch.stack([g.norm() for g in gradients]).square().sum().reshape(1)
        dist.all_reduce(squares)
        nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, squares.sqrt()[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return math.fsum(loss.item() for loss in losses) if losses else None


def _as_replicas(parallel: Any, ranks: int) -> Any:
    return parallel.model_copy(update={"pipeline": 1, "data": ranks})


def build(spec: Spec, work: Work, sleeper: Sleeper) -> TorchPipeline:
    return TorchPipeline(spec, work, sleeper)
