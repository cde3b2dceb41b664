"""One stage under DeepSpeed: a DeepSpeedEngine with ZeRO over the replicas, and the update that belongs to it.

Clipping and skipping are per span, learning rate and counters per stage. What each ZeRO stage does:

    0        plain gradients; clipped here with torch's formula, before the optimizer's step
    1, 2, 3  optimizer state (and gradients, and weights) partitioned; clipped by DeepSpeed's own formula
    bf16     ZeRO 1 to 3 only: fp32 master weights, gradients accumulated in bf16 (ZeRO 2 and 3: in fp32 with
             `deepspeed.data_types.grad_accum_dtype: fp32`)
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lptransformer import checkpoint
from lptransformer.stage import Stage
from lptransformer.world import gather_over_span


def deepspeed_config(
    user: dict[str, Any], *, micro_batch_size: int, zero_stage: int, bf16: bool, grad_clip: float
) -> dict[str, Any]:
    """The DeepSpeed configuration of a stage: the user's section and what the engine decides.

    Every call of `step()` is an update: our schedule owns the accumulation boundary. The loss is scaled by us.
    """
    zero = {**user.get("zero_optimization", {}), "stage": zero_stage, "memory_efficient_linear": False}
    config: dict[str, Any] = {
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        **user,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": grad_clip if zero_stage > 0 else 0.0,
        "zero_optimization": zero,
    }
    if bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


@dataclass
class SpanGroup:
    """The pipeline ranks that one span is laid over (its stages clip and skip together), for one replica."""

    group: dist.ProcessGroup
    size: int


@dataclass(frozen=True)
class Outcome:
    """What an update did. The norm is before clipping, over the span; not finite when the update was skipped."""

    grad_norm: float
    skipped: bool
    learning_rate: float


class TrainedStage:
    """A stage, its DeepSpeedEngine, its learning-rate schedule and its counters."""

    def __init__(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        config: dict[str, Any],
        grad_clip: float,
        span_group: SpanGroup | None,
    ) -> None:
        self.plan = stage.plan
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.grad_clip = grad_clip
        self.span_group = span_group
        self.skipped_in_a_row = 0
        self.waited_seconds = 0.0  # for the gradient norms of the span's other stages
        self._outcome: tuple[float, bool] = (0.0, False)
        self.engine, *_ = deepspeed.initialize(
            model=stage, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.zero_stage: int = self.engine.zero_optimization_stage()
        if span_group is not None:
            tensors = torch.tensor([len(list(stage.parameters()))])
            self._span_tensors = [int(n) for n in gather_over_span(span_group.group, tensors, [1] * span_group.size)]
        if self.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip_or_skip)
        elif span_group is not None:
            self._share_norm_over_span(span_group.size)

    def forward(self, inputs: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See Stage.forward. Not `engine.module(...)`: at ZeRO 3 that goes wrong silently."""
        return self.engine(inputs, labels, scale)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self) -> Outcome:
        """Clip, step, next learning rate; a gradient that is not finite leaves weights and optimizer state alone.

        A skipped update still advances the step and the learning rate.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.engine.step()
        self.lr_scheduler.step()
        if self.zero_stage == 0:
            grad_norm, skipped = self._outcome
        else:
            skipped = bool(self.engine.optimizer.overflow)
            grad_norm = float("nan") if skipped else float(self.engine.optimizer._global_grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return Outcome(grad_norm, skipped, learning_rate)

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """ZeRO 0: between the all-reduce of the gradients and the optimizer's step. No gradient, no step."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters])
        if self.span_group is not None:
            norms = torch.cat(self._over_span(norms, self._span_tensors))
        norm = torch.linalg.vector_norm(norms)
        skipped = not bool(torch.isfinite(norm))
        if skipped:
            for parameter in parameters:
                parameter.grad = None
        elif self.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self._outcome = (norm.item(), skipped)

    def _share_norm_over_span(self, size: int) -> None:
        """ZeRO 1 and 2: the norm that DeepSpeed clips and skips by becomes that of the whole span.

        In bf16 DeepSpeed looks for infinities first, stage by stage, and takes no norm where it finds one: the other
        stages of the span would wait for that norm. The norm finds the same infinities, on all stages alike.
        """
        own_norm = self.engine.optimizer.scaled_global_norm
        self.engine.optimizer.check_overflow = lambda partition_gradients=True: None

        def norm_over_span(norm_type: int = 2) -> Tensor:
            own = own_norm(norm_type).float().reshape(1)
            return combine_grad_norm_groups([norm[0] for norm in self._over_span(own, [1] * size)])

        self.engine.optimizer.scaled_global_norm = norm_over_span

    def _over_span(self, vector: Tensor, sizes: list[int]) -> list[Tensor]:
        assert self.span_group is not None
        started = time.perf_counter()
        vectors = gather_over_span(self.span_group.group, vector, sizes)
        self.waited_seconds += time.perf_counter() - started
        return vectors

    def weights(self) -> dict[str, Tensor]:
        """All tensors under their names in a checkpoint; at ZeRO 3 all replicas call this together."""
        module = self.engine.module
        gathered = (
            deepspeed.zero.GatheredParameters(list(module.parameters()))
            if self.zero_stage == 3
            else contextlib.nullcontext()
        )
        with gathered:
            return {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}

    def save(self, folder: Path, description: dict[str, Any]) -> None:
        """Write the stage's folder; all replicas call this together."""
        first_replica = dist.get_rank() == 0
        if first_replica:
            checkpoint.begin_stage(folder)
        dist.barrier()
        self.engine.save_checkpoint(str(folder / checkpoint.DEEPSPEED), tag="state", save_latest=False)
        weights = self.weights()
        state = {
            **description,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        if first_replica:
            checkpoint.write_stage(folder, weights, state)
        dist.barrier()
        if first_replica:
            checkpoint.finish_stage(folder)

    def load(self, folder: Path) -> None:
        """Continue from a folder that `save` wrote at the same ZeRO stage and number of replicas."""
        self.engine.load_checkpoint(str(folder / checkpoint.DEEPSPEED), tag="state")
        state = checkpoint.read_state(folder)
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for group, learning_rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
