"""Emulated compute: stages whose blocks sleep instead of computing. All around them is real.

A block sleeps `block_seconds` in the forward pass, as long for the gradient at its input and as long for the gradient
of its weights, in backward passes that take only one of the two as well. Heads cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lptransformer.training.build
from contenders.face import Sleeper
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import CROSS_ENTROPY, LossBatch, LossTerm
from lptransformer.models.stage import Stage


class _Sleep(torch.autograd.Function):
    """Identity. Sleeps in the forward pass and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleep: Callable[[float], None], forward: float, backward: float) -> Tensor:
        ctx.sleep, ctx.seconds = sleep, backward
        sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.sleep(ctx.seconds)
        return gradients[0], None, None, None


class SleepingBody(nn.Module):
    """In the place of a piece of a model: ids [b, T] or hidden states [b, T, H] to hidden states [b, T, H].

    The path of the gradient to the input and the path to the weights sleep apart, so that a schedule that takes one of
    them pays for one of them. `entrance` is a weight below all blocks: as in a real stage, there is always something
    that needs the gradient at the input.
    """

    def __init__(self, sleeper: Sleeper, seconds: float, hidden_size: int) -> None:
        super().__init__()
        self.sleeper, self.seconds = sleeper, seconds
        self.entrance = nn.Parameter(torch.zeros(hidden_size))
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = (input_ids.unsqueeze(-1) / (1 + input_ids.max())).expand(-1, -1, self.weight.numel())
        x = _Sleep.apply(inputs_embeds + self.entrance, self._sleep, self.seconds, self.seconds)
        weight = _Sleep.apply(self.weight, self._sleep, 0.0, self.seconds)
        return SimpleNamespace(last_hidden_state=x * weight)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            started = time.perf_counter()
            time.sleep(seconds)
            self.sleeper.slept_seconds += time.perf_counter() - started


class CheapHead(nn.Module):
    """In the place of a head: a loss that costs nothing. It has no blocks, and its readout no use for a kernel."""

    copies, blocks = (), None

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full([hidden_size], 0.5))
        self.readout = SimpleNamespace(kernel=None)

    def forward(self, hidden_states: Tensor, batch: LossBatch) -> dict[str, LossTerm]:
        """See lptransformer.models.head.StageLoss."""
        count = int((batch.labels >= 0).sum())
        total = ((hidden_states - self.weight) ** 2).mean() * count
        return {CROSS_ENTROPY: LossTerm(total * batch.scale, total.detach())}

    def cast_copies(self, dtype: torch.dtype) -> None:
        """There are none."""

    def share_frozen(self, held: dict[str, Tensor], device: torch.device) -> None:
        """There is nothing frozen."""


def stages(sleeper: Sleeper, block_seconds: float) -> AbstractContextManager[Any]:
    """While it lasts, lptransformer.training.build makes stages that sleep."""

    def make(plan: StagePlan, blueprint: Blueprint, **options: Any) -> Stage:
        stage = sleeping_stage(plan, blueprint.parts.hidden_size, sleeper, block_seconds)
        stage.body.add_module(blueprint.parts.blocks_in_base, nn.ModuleList())  # asked for its matrices: it has none
        return stage

    return mock.patch.object(lptransformer.training.build, "make_stage", make)


def sleeping_stage(plan: StagePlan, hidden_size: int, sleeper: Sleeper, block_seconds: float) -> Stage:
    """A real stage around a body that sleeps."""
    body = SleepingBody(sleeper, plan.num_blocks * block_seconds, hidden_size)
    return Stage(plan, body, CheapHead(hidden_size) if plan.has_head else None)  # type: ignore[arg-type]
