"""Optimizers and learning-rate schedules: torch's and transformers', chosen by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from lptransformer.config import deepspeed_keys
from lptransformer.config.schema import OptimizerSection, TrainSection

DECAYING = "warmup_stable_decay"  # the schedule of which train.decay_steps says how long it decays


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    options: OptimizerSection,
    learning_rate: float,
    steps: Mapping[nn.Parameter, float | None] | None = None,
    deepspeed: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or SGD. Weights of two and more dimensions decay; norms and biases do not.

    `steps` are those that a resumed optimizer has made with each: other numbers are other groups, because at ZeRO 1 to
    3 there is one count per group. Where the `deepspeed` section offloads it, it steps on the CPU: an AdamW of one pass
    over memory, DeepSpeed's own where the section says so (which is built here if it was not yet), else torch's.
    """
    groups: dict[tuple[bool, float | None], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.dim() < 2, (steps or {}).get(parameter)), []).append(parameter)
    made = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else options.weight_decay}
        for key in sorted(groups, key=lambda key: (key[0], key[1] or 0.0))
    ]
    if options.name == "adamw":
        how: dict[str, Any] = {"lr": learning_rate, "betas": (options.beta1, options.beta2), "eps": options.eps}
        if not deepspeed_keys.offloads(deepspeed or {}):
            return torch.optim.AdamW(made, **how)
        if (deepspeed or {}).get(deepspeed_keys.FORCED):
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # takes seconds

            return DeepSpeedCPUAdam(made, **how)
        return torch.optim.AdamW(made, fused=True, **how)
    assert options.name == "sgd", options.name
    return torch.optim.SGD(made, lr=learning_rate, momentum=options.momentum)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, steps: int) -> LRScheduler:
    """The learning rate of every update, from 0 to `steps`, by transformers' schedule of that name."""
    floor, own = train.min_learning_rate / train.learning_rate, None
    if train.lr_scheduler == "cosine_with_min_lr":
        own = {"min_lr_rate": floor}
    elif train.lr_scheduler == DECAYING:
        own = {"min_lr_ratio": floor, "num_decay_steps": decay_steps(train, steps)}
    return get_scheduler(train.lr_scheduler, optimizer, train.warmup_steps, steps, own)


def decay_steps(train: TrainSection, steps: int) -> int:
    """How many of the last of `steps` updates decay: train.decay_steps, else a tenth, as far as the warm-up leaves
    it."""
    return train.decay_steps or min(max(1, steps // 10), steps - train.warmup_steps)


def learning_rate_after(train: TrainSection, steps: int, updates: int) -> float:
    """The learning rate of the update that follows `updates` others in a run of `steps`."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=train.learning_rate)
    scheduler = build_lr_scheduler(optimizer, train, steps)
    return _rates(scheduler, updates)[0]


def _rates(scheduler: LRScheduler, updates: int) -> list[float]:
    assert isinstance(scheduler, LambdaLR), scheduler
    return [
        float(base * factor(updates)) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]


@contextlib.contextmanager
def as_configured(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, updates: int) -> Iterator[None]:
    """Around what reads an optimizer's state, saved after `updates` updates: its hyperparameters stay those of the
    configuration, which may be others on resume, and the learning rate is that of the schedule there."""
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    rates = _rates(scheduler, updates)
    where = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **where})
    for group, own, rate in zip(optimizer.param_groups, configured, rates, strict=True):
        group.update(own, lr=rate)
