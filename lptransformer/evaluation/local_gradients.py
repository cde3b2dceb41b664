"""What local updates do to a model: their gradients against the true ones, the rank of its states, how exits agree.

All of it from one pass over some windows, at fixed weights, without dropout, in fp32. The terms:

**True gradient** of a block: that of the last head's loss through the whole model. **Local gradient**: the one that the
objective gives the block, the sum over the spans that contain it, with their weights (methods/spans.py,
`Phase.weight`). Both are of the mean loss over all labels, before clipping. Where a head's loss sees a part of the
positions, all count here: that is its mean over the draws. With delayed gradients both are at the same weights. The
embedding belongs to block 0 but has a line of its own, because it would outweigh the block.

**Effective rank** and **stable rank** of hidden states: those of the matrix [tokens, H] of all positions, centred: the
mean over the tokens is taken off (evaluation/spectrum.py has the definitions).

**Agreement** of an exit with the last one: the share of the positions with a label where both hold the same token to be
the most probable, and the mean of KL(last || exit), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lptransformer.data.token_set import IGNORE_INDEX, Batch
from lptransformer.evaluation.spectrum import Moments, effective_rank, stable_rank
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan
from lptransformer.models.head import CROSS_ENTROPY, LossBatch

Gradients = dict[int | None, list[Tensor]]
"""By block, a tensor for each of its weights; None is the embedding."""


@dataclass(frozen=True)
class BlockGradient:
    """Local against true gradient of a block (None: the embedding), over all its weights.

    `cosine` and `norm_ratio` (norm of the local over that of the true one) are means over the batches; `_of_sum` are
    those of the gradients of all batches together, which have less noise. All None where the objective trains the
    block with no loss; NaN where a gradient is zero or not finite.
    """

    block: int | None
    stage: int
    cosine: float | None = None
    cosine_of_sum: float | None = None
    norm_ratio: float | None = None
    norm_ratio_of_sum: float | None = None


@dataclass(frozen=True)
class Rank:
    """Of the hidden states after a block; NaN where they do not differ or are not finite."""

    block: int
    stage: int
    ends_stage: bool
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class Exit:
    """An exit: its loss (nats per label token), and how it agrees with the last one."""

    stage: int
    last_block: int
    nll_per_token: float
    agreement: float
    kl_from_last: float


@dataclass(frozen=True)
class Diagnosis:
    """Of `tokens` positions; `hidden_size` is the greatest rank that can be."""

    tokens: int
    hidden_size: int
    gradients: list[BlockGradient]
    ranks: list[Rank]
    exits: list[Exit]


def diagnose(
    model: RunModel, phase: Phase, batches: Sequence[Batch], advance: Callable[[], None] = lambda: None
) -> Diagnosis:
    """The diagnosis of `model` with the spans of `phase` on batches without empty rows, one or more.

    Holds the activations of the whole model for one batch, and four times the weights of its blocks. `advance` is
    called after every batch. Heads whose weights need no gradient take less time.
    """
    weights = _weights(model)
    compared = {unit: _Compared() for unit in weights}
    moments = {block: Moments() for block in range(model.blueprint.objective.num_blocks)}
    exits = torch.zeros(len(model.exits), 3, dtype=torch.float64)  # sums of: nll, same token, KL
    label_tokens = sum(batch.label_tokens for batch in batches)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    with _watched(model) as (hidden_states, rows):
        for batch in batches:
            labels = batch.labels.to(model.device)
            losses, sums = _losses(model, batch.input_ids.to(model.device), labels, 1 / label_tokens)
            true, local = _gradients(losses, phase, weights)
            for unit, gradient in local.items():
                compared[unit].add(true[unit], gradient)
            for block, states in hidden_states.items():
                moments[block].add(states.flatten(0, 1))
            exits[:, 0] += torch.tensor(sums, dtype=torch.float64)
            exits[:, 1:] += _agreement(model, rows, labels.flatten())
            del losses, true, local  # the graph goes before the next one comes
            advance()

    plan_of: dict[int, StagePlan] = {}
    for stage in model.stages:
        plan_of |= dict.fromkeys(range(stage.plan.first_block, stage.plan.last_block + 1), stage.plan)
    ranks = []
    for block, one in moments.items():
        singular, plan = one.singular_values(), plan_of[block]
        ends = block == plan.last_block
        ranks.append(Rank(block, plan.index, ends, effective_rank(singular), stable_rank(singular)))
    plans = [stage.plan for stage in model.exits]
    per_token = (exits / label_tokens).tolist()
    return Diagnosis(
        tokens,
        model.blueprint.parts.hidden_size,
        [BlockGradient(unit, plan_of[unit or 0].index, *one.numbers()) for unit, one in compared.items()],
        ranks,
        [Exit(plan.index, plan.last_block, *row) for plan, row in zip(plans, per_token, strict=True)],
    )


# ---- gradients


def _weights(model: RunModel) -> dict[int | None, list[nn.Parameter]]:
    """The weights of the embedding and of every block."""
    start = f"{model.blueprint.parts.blocks_in_base}."
    weights: dict[int | None, list[nn.Parameter]] = {None: []}
    for stage in model.stages:
        for name, weight in stage.body.named_parameters():
            unit = int(name.removeprefix(start).partition(".")[0]) if name.startswith(start) else None
            weights.setdefault(unit, []).append(weight)
    return weights


def _losses(model: RunModel, input_ids: Tensor, labels: Tensor, scale: float) -> tuple[dict[int, Tensor], list[float]]:
    """The scaled loss of every head by its block, all in one graph; the sums of the losses, in nats."""
    inputs, losses, sums = input_ids, {}, []
    for stage in model.stages:
        inputs = stage.hidden_states(inputs)
        if stage.head is not None:
            term = stage.head(inputs, LossBatch(labels, scale))[CROSS_ENTROPY]
            losses[stage.plan.last_block] = term.loss
            sums.append(term.total)
    return losses, torch.stack(sums).tolist()


def _gradients(
    losses: Mapping[int, Tensor], phase: Phase, weights: Mapping[int | None, list[nn.Parameter]]
) -> tuple[Gradients, Gradients]:
    """The true gradients, and the local ones of what the phase trains.

    No graph is cut: autograd walks down to the weights that it is asked for and no further.
    """
    last = max(losses)
    true = _of_loss(losses[last], weights)
    local: Gradients = {}
    for span in phase.spans:
        shares = {unit: phase.weight(span, unit or 0) for unit in weights}
        reached = {unit: weights[unit] for unit, share in shares.items() if share > 0}
        if not reached:
            continue
        found = true if span.last == last else _of_loss(losses[span.last], reached)
        for unit in reached:
            own = [shares[unit] * gradient for gradient in found[unit]]
            local[unit] = [a + b for a, b in zip(local[unit], own, strict=True)] if unit in local else own
    return true, local


def _of_loss(loss: Tensor, weights: Mapping[int | None, list[nn.Parameter]]) -> Gradients:
    flat = [weight for of_unit in weights.values() for weight in of_unit]
    # What a loss does not reach, an expert that no token was sent to, has a gradient of zero.
    gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True, materialize_grads=True))
    return {unit: [next(gradients) for _ in of_unit] for unit, of_unit in weights.items()}


class _Compared:
    """Local against true gradient of one block, batch after batch."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.ratios: list[float] = []
        self.true: list[Tensor] = []
        self.local: list[Tensor] = []

    def add(self, true: list[Tensor], local: list[Tensor]) -> None:
        cosine, ratio = _cosine_and_ratio(true, local)
        self.cosines.append(cosine)
        self.ratios.append(ratio)
        if not self.true:
            self.true, self.local = true, local
            return
        for total, one in zip([*self.true, *self.local], [*true, *local], strict=True):
            total.add_(one)

    def numbers(self) -> tuple[float | None, ...]:
        """Cosine and cosine of the sum, ratio and ratio of the sum."""
        if not self.cosines:
            return (None,) * 4
        cosine, ratio = _cosine_and_ratio(self.true, self.local)
        return (sum(self.cosines) / len(self.cosines), cosine, sum(self.ratios) / len(self.ratios), ratio)


def _cosine_and_ratio(true: list[Tensor], local: list[Tensor]) -> tuple[float, float]:
    def product(a: list[Tensor], b: list[Tensor]) -> float:
        return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))

    of_true, of_local = product(true, true), product(local, local)
    both = math.sqrt(of_true * of_local)
    return (
        product(true, local) / both if both else math.nan,
        math.sqrt(of_local / of_true) if of_true else math.nan,
    )


# ---- hidden states


@contextmanager
def _watched(model: RunModel) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Of the last forward pass: hidden states [b, T, H] after every block, rows [b * T, width] at every readout."""
    hidden_states: dict[int, Tensor] = {}
    rows: dict[int, Tensor] = {}

    def keep_output(block: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            hidden_states[block] = (output[0] if isinstance(output, tuple) else output).detach()

        return keep

    def keep_rows(block: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any) -> None:
            rows[block] = args[0].detach()

        return keep

    handles = []
    for stage in model.stages:
        plan = stage.plan
        for block in range(plan.first_block, plan.last_block + 1):
            module = stage.body.get_submodule(f"{model.blueprint.parts.blocks_in_base}.{block}")
            handles.append(module.register_forward_hook(keep_output(block)))
        if stage.head is not None:
            handles.append(stage.head.readout.register_forward_pre_hook(keep_rows(plan.last_block)))
    try:
        yield hidden_states, rows
    finally:
        for handle in handles:
            handle.remove()


# ---- exits


@torch.no_grad()
def _agreement(model: RunModel, rows: Mapping[int, Tensor], labels: Tensor) -> Tensor:
    """fp64 [exits, 2]: at how many positions with a label an exit's best token is the last one's; the sum of the KL.

    `rows` [tokens, width] of every readout by its block, `labels` [tokens]. The logits of a few rows at a time exist.
    """
    heads = {stage.plan.last_block: stage.head for stage in model.exits if stage.head is not None}
    last = max(heads)
    sums = torch.zeros(len(heads), 2, dtype=torch.float64)
    where = (labels != IGNORE_INDEX).nonzero().flatten()
    for chosen in where.split(heads[last].readout.chunk_tokens):
        wanted = F.log_softmax(heads[last].readout.logits(rows[last][chosen]), dim=-1)  # [chosen, V]
        best = wanted.argmax(dim=-1)
        for number, (block, head) in enumerate(heads.items()):
            own = F.log_softmax(head.readout.logits(rows[block][chosen]), dim=-1)
            sums[number, 0] += (own.argmax(dim=-1) == best).sum().item()
            sums[number, 1] += F.kl_div(own, wanted, reduction="sum", log_target=True).item()
    return sums
