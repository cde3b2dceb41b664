"""`train.epochs` as a number of updates: `train.steps` once the windows of the training text are counted."""

from __future__ import annotations

import math
from fractions import Fraction

from lptransformer.config.checks import check
from lptransformer.config.schema import BY_DEFAULT, Config
from lptransformer.errors import ConfigError


def steps(config: Config) -> int:
    """train.steps. Raises ConfigError where it is still to follow from train.epochs."""
    if config.train.steps is None:
        raise ConfigError(
            f"{config.at('train.epochs')}: the number of updates is counted where a run (or a sweep) starts and its "
            "text is prepared, and nowhere else; give one here, for example --train.steps=1000"
        )
    return config.train.steps


def with_steps(config: Config, rows: int | None) -> Config:
    """The configuration with train.steps in place of train.epochs, as it is where that is not given.

    An epoch has `rows` windows; None: nobody knows. The last update may see a few more, so that all are seen as often
    as asked. Raises ConfigError where the number contradicts other keys.
    """
    train = config.train
    if train.epochs is None:
        return config
    if rows is None:
        raise ConfigError(f"{config.at('train.epochs')}: train_data has no length: give train.steps in its place")
    assert train.micro_batch_size != "auto", "the size of an update comes first"
    windows = train.micro_batch_size * train.micro_batches_per_update
    counted = config.model_copy(deep=True)
    counted.train.steps = math.ceil(Fraction(str(train.epochs)) * rows / windows)  # 1.1 is 1.1 here
    counted.train.epochs = None
    if counted._origins.get("train.warmup_steps", "").startswith(BY_DEFAULT):  # that of a pretrained model
        counted.train.warmup_steps = min(train.warmup_steps, counted.train.steps)
    what = f"{train.epochs:g} epochs of {rows} windows, {windows} in an update"
    counted._origins["train.steps"] = f"from train.epochs: {what}"
    check(counted)
    return counted
