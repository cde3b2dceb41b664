"""What the peers that are plain torch are made of: the same optimizer, the same model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lptransformer.config.checks import micro_batch_size
from lptransformer.config.schema import Config
from lptransformer.engine.optimizer import build_optimizer
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.stage import Stage, make_stage


def optimizer_of(config: Config, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(parameters, config.optimizer, config.train.learning_rate)


def label_tokens_of(config: Config) -> int:
    """The label tokens of an update."""
    rows = config.train.micro_batches_per_update * micro_batch_size(config)
    return rows * (config.data.sequence_length - 1)


def whole_model(config: Config, vocab_size: int) -> Stage:
    """The model as one stage, with its own head."""
    blueprint = make_blueprint(config, vocab_size, None)
    (stage,) = blueprint.stages
    return make_stage(stage, blueprint, seed=config.train.seed)
