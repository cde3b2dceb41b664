"""DeepSpeed data parallel, ZeRO 1: the whole model in every process, as many replicas as there are pipeline ranks.

A replica takes its share of an update's micro-batches; where they are too few to be shared, its share of the rows of
each, so that the global batch is the same.
"""

from __future__ import annotations

import math

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn

from contenders.face import Sleeper, Spec, Work, stream_of
from contenders.pieces import optimizer_of, whole_model
from lptransformer.config.checks import micro_batch_size
from lptransformer.data.token_set import Batch
from lptransformer.models.head import LossBatch
from lptransformer.models.stage import Stage
from lptransformer.training.build import join_world


class _Loss(nn.Module):
    """ids and labels [b, T] to the mean loss."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        scale = 1 / (labels.shape[0] * (labels.shape[1] - 1))
        return self.stage(input_ids, LossBatch(labels, scale)).loss


class DataParallel:
    waited_seconds = None

    def __init__(self, spec: Spec, work: Work, sleeper: Sleeper) -> None:
        assert work.block_seconds is None, "data parallel has no schedule to emulate"
        replicas = work.ranks
        config = spec.config_of(work, "objective.name=backprop")
        parallel = config.parallel.model_copy(update={"pipeline": 1, "data": replicas})
        join_world(config.model_copy(update={"parallel": parallel}))
        whole, rows = work.micro_batches % replicas == 0, micro_batch_size(config)
        assert whole or rows % replicas == 0, f"{rows} rows of a micro-batch cannot be shared by {replicas} replicas"
        self.per_update = work.micro_batches
        self.own = slice(dist.get_rank(), None, replicas) if whole else slice(None)
        self.rows = slice(None) if whole else slice(dist.get_rank(), None, replicas)
        rounds = work.micro_batches // replicas if whole else work.micro_batches
        module = _Loss(whole_model(config, work.vocab_size))
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer_of(config, list(module.parameters())),
            config={
                "train_micro_batch_size_per_gpu": rows if whole else rows // replicas,
                "gradient_accumulation_steps": rounds,
                "gradient_clipping": config.train.grad_clip,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": None,
            },
            dist_init_required=False,
        )
        self.stream, self.done = stream_of(config, work), 0

    def update(self) -> float | None:
        start = self.done * self.per_update
        losses = []
        for batch in [self.stream.batch(index) for index in range(start, start + self.per_update)][self.own]:
            own = Batch(batch.input_ids[self.rows], batch.labels[self.rows])
            loss = self.engine(own.input_ids, own.labels)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.item())
        self.done += 1
        return math.fsum(losses) / len(losses)


def build(spec: Spec, work: Work, sleeper: Sleeper) -> DataParallel:
    return DataParallel(spec, work, sleeper)
