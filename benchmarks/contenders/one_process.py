"""One process: the plain loop of torch."""

from __future__ import annotations

import math

from torch import nn

from contenders.face import Sleeper, Spec, Work, stream_of
from contenders.pieces import label_tokens_of, optimizer_of, whole_model
from lptransformer.models.head import LossBatch


class OneProcess:
    waited_seconds = None

    def __init__(self, spec: Spec, work: Work, sleeper: Sleeper) -> None:
        assert work.block_seconds is None, "one process has no schedule to emulate"
        config = spec.config_of(work, "objective.name=backprop")
        self.stage = whole_model(config, work.vocab_size)
        self.parameters = list(self.stage.parameters())
        self.optimizer = optimizer_of(config, self.parameters)
        self.grad_clip, self.micro_batches = config.train.grad_clip, work.micro_batches
        self.stream, self.done, self.scale = stream_of(config, work), 0, 1 / label_tokens_of(config)

    def update(self) -> float | None:
        losses = []
        for index in range(self.done * self.micro_batches, (self.done + 1) * self.micro_batches):
            batch = self.stream.batch(index)
            loss = self.stage(batch.input_ids, LossBatch(batch.labels, self.scale)).loss
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return math.fsum(losses)


def build(spec: Spec, work: Work, sleeper: Sleeper) -> OneProcess:
    return OneProcess(spec, work, sleeper)
