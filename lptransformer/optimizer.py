"""Optimizers and learning-rate schedules: torch's and transformers', chosen by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
) -> torch.optim.Optimizer:
    """AdamW or SGD. Weights of two and more dimensions decay; norms and biases do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)
    assert name == "sgd", name
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, name: str, steps: int, warmup_steps: int) -> LRScheduler:
    """The learning rate of every update, from 0 to `steps`, by transformers' schedule of that name."""
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
