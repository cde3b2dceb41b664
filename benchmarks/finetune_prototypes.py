"""Recipes that are tried before they enter the package: a plain loop in torch over two chunks, one after the other.

What is not tried is the package's own: the stages with their fitted heads, the data, the schedule. With no prototype
the loop is the package's `chunked` (or, of one stage, backprop), which a test compares.

- `distilled`: the lower exit learns a mix of the labels and of what the final exit said of the same tokens one update
  before. So the lower chunk trains on a batch one update after it has handed it up, and its first pass is done twice.
  The final exit's rows (behind its norm) come down, as many bytes as a gradient; the head's frozen readout makes the
  distribution of them.
- `lora`: adapters (2106.09685) beside all linear maps of the lower chunk's blocks, at ten times the rate; those blocks
  and the embedding are frozen, head and upper chunk train whole.
- `muon`: `torch.optim.Muon` for matrices of blocks, those of heads too, its step scaled to AdamW's size; AdamW for the
  rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lptransformer.config.epochs import steps
from lptransformer.config.schema import Config
from lptransformer.data.token_set import IGNORE_INDEX, Batch
from lptransformer.data.train_stream import TrainStream
from lptransformer.engine.fitting import fit_heads
from lptransformer.engine.optimizer import build_lr_scheduler, build_optimizer
from lptransformer.engine.process_groups import join, leave
from lptransformer.methods import flops
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.models.head import LossBatch
from lptransformer.models.stage import Stage, for_training, make_stage
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.training.build import prepare_once

DISTILLED, LORA, MUON = "distilled", "lora", "muon"
RANK, ADAPTER_RATE, LABEL_SHARE = 16, 10.0, 0.5
NEWTON_SCHULZ_STEPS = 5  # torch.optim.Muon's


@dataclass(frozen=True)
class Trained:
    """The stages after training, and the optimizers of all of them."""

    stages: list[Stage]
    optimizers: list[torch.optim.Optimizer]


class LowRank(nn.Module):
    """A linear map that stays as it is, plus 2 B A; A [rank, in], B [out, rank]."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as peft does it
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, rows: Tensor) -> Tensor:
        added: Tensor = 2.0 * F.linear(F.linear(rows, self.down), self.up)
        return self.base(rows) + added


def train(config: Config, prototype: str | None) -> Trained:
    """Train by a chunked objective of two chunks, or, without a lower exit, by backprop, in this process."""
    use_fair_share_of_cores()
    world = join(1, 1, config.parallel.timeout_seconds)
    data = prepare_once(config, world)
    blueprint = make_blueprint(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id)
    stream = TrainStream([one.tokens for one in data.train], None, config.train.seed, blueprint.micro_batch_size)
    pretrained, seed = config.model.pretrained, config.train.seed
    stages = [
        for_training(make_stage(plan, blueprint, seed=seed, pretrained=pretrained), blueprint)
        for plan in blueprint.stages
    ]
    auxiliary = [plan.index for plan in blueprint.stages if plan.has_head and not plan.is_last]
    fit_heads(world, blueprint, dict(enumerate(stages)), stream, auxiliary)
    leave(world)
    if prototype == LORA:
        torch.manual_seed(seed)
        adapt(stages[0])
    optimizers = [optimizers_of(stage, config, blueprint, prototype) for stage in stages]
    schedules = [[_schedule(one, config) for one in of_stage] for of_stage in optimizers]

    def update(number: int, loss: Tensor) -> None:
        """Of stage `number`."""
        loss.backward()
        nn.utils.clip_grad_norm_(stages[number].parameters(), config.train.grad_clip)
        for optimizer, schedule in zip(optimizers[number], schedules[number], strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    waiting: tuple[Batch, Tensor] | None = None  # the batch before, and the final exit's rows [b, T, H]
    for index in range(steps(config)):
        batch = stream.batch(index)
        hidden_states = batch.input_ids
        for number, stage in enumerate(stages):
            if prototype == DISTILLED and number == 0:
                with torch.no_grad():
                    hidden_states = stage.hidden_states(hidden_states)
                if waiting is not None:
                    update(0, distilled_loss(stage, *waiting))
                continue
            output = stage(hidden_states, LossBatch(batch.labels, 1.0 / batch.label_tokens))
            hidden_states = output.hidden_states.detach()
            if prototype == DISTILLED:
                assert stage.head is not None
                with torch.no_grad():
                    waiting = batch, stage.head.norm(hidden_states)
            update(number, output.loss)
    if waiting is not None:
        update(0, distilled_loss(stages[0], *waiting))
    return Trained(stages, [one for of_stage in optimizers for one in of_stage])


def adapt(stage: Stage) -> None:
    """Freeze the body of a stage, and give its linear maps adapters."""
    stage.body.requires_grad_(False)
    linear = [(name, one) for name, one in stage.body.named_modules() if isinstance(one, nn.Linear)]
    for name, one in linear:
        stage.body.set_submodule(name, LowRank(one, RANK))


def distilled_loss(stage: Stage, batch: Batch, rows: Tensor) -> Tensor:
    """The cross-entropy, a mean over labels in nats, of the lower exit with a mix of the labels and the distribution
    that the frozen readout makes of the final exit's `rows` [b, T, H]."""
    head = stage.head
    assert head is not None
    labelled, labels = batch.labels != IGNORE_INDEX, batch.labels[batch.labels != IGNORE_INDEX]
    own = head.logits(stage.hidden_states(batch.input_ids))[labelled].log_softmax(-1)
    with torch.no_grad():
        wanted = head.readout.logits(rows)[labelled].softmax(-1)
    soft = -(wanted * own).sum(-1).mean()
    return LABEL_SHARE * F.nll_loss(own, labels) + (1 - LABEL_SHARE) * soft


def optimizers_of(
    stage: Stage, config: Config, blueprint: Blueprint, prototype: str | None
) -> list[torch.optim.Optimizer]:
    """Of what trains in a stage."""
    rate, options = config.train.learning_rate, config.optimizer
    trained = {name: weight for name, weight in stage.named_parameters() if weight.requires_grad}
    apart = _apart(trained, blueprint, prototype)
    rest = build_optimizer([weight for name, weight in trained.items() if name not in apart], options, rate)
    if not apart:
        return [rest]
    weights = [trained[name] for name in apart]
    if prototype == LORA:
        return [build_optimizer(weights, options, ADAPTER_RATE * rate), rest]
    return [torch.optim.Muon(weights, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), rest]


def _apart(trained: dict[str, nn.Parameter], blueprint: Blueprint, prototype: str | None) -> list[str]:
    """The weights that have an optimizer of their own."""
    if prototype == LORA:
        return [name for name in trained if name.endswith((".down", ".up"))]
    if prototype == MUON:
        inside = f"{blueprint.parts.blocks_in_base}."
        return [name for name, weight in trained.items() if inside in name and weight.dim() == 2]
    return []


def _schedule(optimizer: torch.optim.Optimizer, config: Config) -> torch.optim.lr_scheduler.LRScheduler:
    train = config.train
    return build_lr_scheduler(optimizer, train, steps(config))


# ---- what it costs


def of_update(blueprint: Blueprint, prototype: str | None) -> flops.UpdateFlops:
    """FLOPs per token of an update, as methods/flops.py counts them."""
    costs, steps = blueprint.costs, blueprint.steps
    if prototype not in (DISTILLED, LORA):
        spent = flops.spent(blueprint.objective, costs, steps, steps)
        return flops.UpdateFlops(spent.total / steps, spent.serial / steps)
    lower, upper = blueprint.stages
    forward, head = lower.num_blocks * costs.block_flops, costs.after(lower.last_block).head_training_flops(False)
    if prototype == DISTILLED:  # forward once more, and the readout of the rows that come down
        below = 4 * forward + head + costs.head_flops
    else:  # no gradients of the weights but of the adapters
        added = lower.num_blocks * adapter_weights(blueprint)
        below = 2 * forward + 6.0 * added + head
    above = 3 * upper.num_blocks * costs.block_flops + costs.head_training_flops(True)
    return flops.UpdateFlops(below + above, max(below, above))


def adapter_weights(blueprint: Blueprint) -> int:
    """Of a block."""
    with torch.device("meta"):
        stage = make_stage(blueprint.stages[0], blueprint, seed=None)
    block = stage.body.get_submodule(f"{blueprint.parts.blocks_in_base}.0")
    return sum(RANK * sum(one.weight.shape) for one in block.modules() if isinstance(one, nn.Linear))


def muon_flops(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Of the products in one step of Muon, over all its matrices: three of each of the five iterations."""
    total = 0.0
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            for weight in optimizer.param_groups[0]["params"]:
                short, long = sorted(weight.shape)
                total += NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)
    return total
