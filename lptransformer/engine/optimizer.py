"""Optimizers and learning-rate schedules: torch's and transformers', chosen by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lptransformer.config.schema import OptimizerSection


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    options: OptimizerSection,
    learning_rate: float,
    steps: Mapping[nn.Parameter, float | None] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or SGD. Weights of two and more dimensions decay; norms and biases do not.

    `steps` are those that a resumed optimizer has made with each: other numbers are other groups, because at ZeRO 1 to
    3 there is one count per group.
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
        return torch.optim.AdamW(made, lr=learning_rate, betas=(options.beta1, options.beta2), eps=options.eps)
    assert options.name == "sgd", options.name
    return torch.optim.SGD(made, lr=learning_rate, momentum=options.momentum)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, name: str, steps: int, warmup_steps: int) -> LRScheduler:
    """The learning rate of every update, from 0 to `steps`, by transformers' schedule of that name."""
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)


def continue_schedule(scheduler: LRScheduler, updates: int) -> None:
    """The learning rate after so many updates, which depends on nothing else."""
    scheduler.last_epoch = updates - 1
    scheduler._step_count = updates + 1  # else it warns that no step of the optimizer came before
    scheduler.step()


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of every parameter group, all but its parameters: as configured, for `restore` after a load."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore(optimizer: torch.optim.Optimizer, given: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, given, strict=True):
        group.update(values)
