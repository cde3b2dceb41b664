"""Optimizers and learning-rate schedules: torch's and transformers', chosen by name."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn
from torch.optim import _muon
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from lptransformer.config import deepspeed_keys
from lptransformer.config.schema import OptimizerSection, TrainSection
from lptransformer.engine.optimizer_state import Owned

DECAYING = "warmup_stable_decay"  # the schedule of which train.decay_steps says how long it decays


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    options: OptimizerSection,
    learning_rate: float,
    steps: Mapping[nn.Parameter, float | None] | None = None,
    *,
    matrices: Collection[nn.Parameter] = (),
    on_gpu: bool = False,
    deepspeed: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of that name. Weights of two and more dimensions decay; norms and biases do not.

    `steps` are those that a resumed optimizer has made with each: other numbers are other groups, because at ZeRO 1 to
    3 there is one count per group. `matrices` are what Muon steps. `on_gpu`: AdamW in one kernel, wherever the weights
    are now. Where the `deepspeed` section offloads it, it steps on the CPU: an AdamW of one pass over memory,
    DeepSpeed's own where the section says so (which is built here if it was not yet), else torch's.
    """
    by_muon = set(matrices) if options.name == "muon" else set()
    groups: dict[tuple[bool, bool, float | None], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            key = parameter not in by_muon, parameter.dim() < 2, (steps or {}).get(parameter)
            groups.setdefault(key, []).append(parameter)
    made: list[dict[str, Any]] = [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else options.weight_decay}
        for key in sorted(groups, key=lambda key: (*key[:2], key[2] or 0.0))
    ]
    if options.name == "sgd":
        assert options.momentum is not None
        return torch.optim.SGD(made, lr=learning_rate, momentum=options.momentum)
    betas = options.beta1, options.beta2
    if options.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # a package that few have, and slow to import

        in_8_bits: torch.optim.Optimizer = AdamW8bit(made, lr=learning_rate, betas=betas, eps=options.eps)
        return in_8_bits
    offloaded = deepspeed_keys.offloads(deepspeed or {})
    if offloaded and (deepspeed or {}).get(deepspeed_keys.FORCED):
        return DeepSpeedCPUAdam(made, lr=learning_rate, betas=betas, eps=options.eps)
    fused = True if on_gpu or offloaded else None
    adamw = torch.optim.AdamW(made, lr=learning_rate, betas=betas, eps=options.eps, fused=fused)
    if options.name == "adamw":
        return adamw
    assert options.name == "muon" and options.momentum is not None, options
    return Muon(adamw, by_muon, options.momentum)


class Muon(torch.optim.Optimizer):
    """The groups of `matrices` by Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), the others by `adamw`.

    A matrix is stepped as torch.optim.Muon does it with `match_rms_adamw`: its momentum (Nesterov's) is made nearly
    orthogonal, and scaled to the size of a step of AdamW (2502.16982, section 2.2), so one learning rate serves both.

    Under ZeRO 1 and 2 the weights are parts of flat tensors. Momentum needs no whole matrix and is partitioned like
    them; a matrix is made orthogonal by the replica that has it, and by all that share one: at most one for every two
    neighbours, so little is sent.
    """

    def __init__(self, adamw: torch.optim.AdamW, matrices: Collection[nn.Parameter], momentum: float) -> None:
        for group in adamw.param_groups:
            group["matrices"] = [one for one in group["params"] if one in matrices]
            group["momentum"] = momentum
        super().__init__(adamw.param_groups, adamw.defaults)
        self._adamw = adamw  # it has the same groups
        self._owned: dict[nn.Parameter, Owned] = {}
        self._shared: set[nn.Parameter] = set()  # matrices of which several replicas have a part

    def partition(self, pieces: Iterable[Owned]) -> None:
        """Say what this replica owns; all replicas call this together, before the first step."""
        self._owned = {piece.parameter: piece for piece in pieces}
        matrices = [matrix for group in self.param_groups for matrix in group["matrices"]]
        owned = [self._owned.get(matrix) for matrix in matrices]
        parts = [piece is not None and piece.numel < piece.parameter.numel() for piece in owned]
        if dist.get_world_size() > 1 and matrices:
            found = torch.tensor(parts, dtype=torch.int32, device=matrices[0].device)
            dist.all_reduce(found)
            parts = found.tolist()
        self._shared = {matrix for matrix, part in zip(matrices, parts, strict=True) if part}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all groups; DeepSpeed leaves one at a time in `param_groups`."""
        for group in self.param_groups:
            for matrix in group["matrices"]:
                self._step_matrix(matrix, group)
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
        self._adamw.step()

    def _step_matrix(self, matrix: nn.Parameter, group: Mapping[str, Any]) -> None:
        piece, direction = self._owned.get(matrix), None
        if piece is not None and piece.flat.grad is not None:
            state = self.state[piece.flat]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(piece.flat)
            momentum, gradient = piece.of(state["momentum_buffer"]), piece.of(piece.flat.grad)
            momentum.lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(momentum, group["momentum"]).bfloat16()  # as torch does before anything else
        if matrix in self._shared:
            whole = torch.zeros(matrix.numel(), dtype=torch.bfloat16, device=matrix.device)
            if piece is not None and direction is not None:
                whole[piece.start : piece.start + piece.numel] = direction
            dist.all_reduce(whole)  # each number has one owner: nothing is rounded
            direction = whole
        if piece is None or direction is None:
            return
        orthogonal: Tensor = _muon._zeropower_via_newtonschulz(
            direction.view(matrix.shape),
            (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C),
            _muon.DEFAULT_NS_STEPS,
            _muon.EPS,
        )
        weight, rate = piece.of(piece.flat), group["lr"]
        weight.mul_(1 - rate * group["weight_decay"])
        of_piece = orthogonal.reshape(-1)[piece.start : piece.start + piece.numel]
        weight.add_(of_piece, alpha=-_muon._adjust_lr(rate, "match_rms_adamw", matrix.shape))


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
