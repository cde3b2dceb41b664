"""What local updates do to a model: their gradients against the true ones, the rank of its states, how exits agree.

At fixed weights, without dropout, in fp32, one group of blocks after another, so that no more than one has to be in
memory: a pass up keeps the hidden states at the borders between groups; on the way down every group computes once more,
and each loss's gradient at its output becomes one at its input, as if nothing had been cut. The terms:

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
from lptransformer.evaluation.trained_model import BlockGroup
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import Head, LossBatch
from lptransformer.models.stage import Stage, StageOutput

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
    groups: Sequence[BlockGroup],
    blueprint: Blueprint,
    phase: Phase,
    batches: Sequence[Batch],
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """The diagnosis of a model with the spans of `phase` on batches without empty rows, one or more.

    Holds the hidden states of all batches at all borders between groups, and of one group at a time the activations of
    a batch and four times the weights. `advance` is called after every batch of every group, up and down.
    """
    label_tokens = sum(batch.label_tokens for batch in batches)
    inputs = _borders(groups, batches, device, advance)
    ends = {plan.index: plan.last_block for plan, _ in groups}  # of the last group of every stage
    below = _Below(phase)
    last: _Last | None = None
    gradients: list[BlockGradient] = []
    ranks: list[Rank] = []
    found: list[Exit] = []
    for plan, read in reversed(groups):
        stage, borders = read(), inputs.pop()
        weights = _weights(stage, blueprint)
        compared = {unit: _Compared() for unit in weights}
        moments = {block: Moments() for block in range(plan.first_block, plan.last_block + 1)}
        exits = torch.zeros(3, dtype=torch.float64)  # sums of: nll, same token, KL
        if stage.head is not None:
            stage.head.requires_grad_(False)  # nobody asks for its weights' gradient, which takes time
            last = last or _Last(plan.last_block, stage.head)
        assert last is not None, "the last group has no head"
        with _watched(stage, blueprint) as (hidden_states, rows):
            for number, batch in enumerate(batches):
                here = batch.to(device)
                labels = here.labels
                states = borders[number].to(device)
                if not plan.is_first:
                    states.requires_grad_()
                known = (here.position_ids, here.document_ids)
                output = stage(states, LossBatch(labels, 1 / label_tokens, None, 1.0, *known))
                true, local = below.gradients(number, plan, states, output, weights, last.block)
                for unit, gradient in local.items():
                    compared[unit].add(true[unit], gradient)
                for block, one in hidden_states.items():
                    moments[block].add(one.flatten(0, 1))
                if stage.head is not None and output.nll_sum is not None:
                    exits[0] += output.nll_sum.item()
                    exits[1:] += last.agreement(number, stage.head, rows[0], labels.flatten())
                del output, true, local  # the graph goes before the next one comes
                advance()
        units = [unit for unit in (None, *moments) if unit in weights]
        gradients[:0] = [BlockGradient(unit, plan.index, *compared[unit].numbers()) for unit in units]
        spectra = [(block, one.singular_values()) for block, one in moments.items()]
        ranks[:0] = [
            Rank(block, plan.index, block == ends[plan.index], effective_rank(singular), stable_rank(singular))
            for block, singular in spectra
        ]
        if stage.head is not None:
            found.insert(0, Exit(plan.index, plan.last_block, *(exits / label_tokens).tolist()))
        del stage, weights, compared  # before the next one comes
    tokens = sum(batch.input_ids.numel() for batch in batches)
    return Diagnosis(tokens, blueprint.parts.hidden_size, gradients, ranks, found)


@torch.no_grad()
def _borders(
    groups: Sequence[BlockGroup], batches: Sequence[Batch], device: torch.device, advance: Callable[[], None]
) -> list[list[Tensor]]:
    """What goes into every group, by batch: input_ids [b, T], then hidden states [b, T, H]. On the CPU."""
    inputs = [[batch.input_ids for batch in batches]]
    for _, read in groups[:-1]:
        stage, above = read(), []
        for states, batch in zip(inputs[-1], batches, strict=True):
            above.append(stage.hidden_states(states.to(device), batch.to(device).position_ids).cpu())
            advance()
        inputs.append(above)
        del stage
    return inputs


# ---- gradients


def _weights(stage: Stage, blueprint: Blueprint) -> dict[int | None, list[nn.Parameter]]:
    """The weights of every block, and of the embedding where it is there."""
    start = f"{blueprint.parts.blocks_in_base}."
    weights: dict[int | None, list[nn.Parameter]] = {}
    for name, weight in stage.body.named_parameters():
        unit = int(name.removeprefix(start).partition(".")[0]) if name.startswith(start) else None
        weights.setdefault(unit, []).append(weight)
    return weights


class _Below:
    """The gradients of the losses of `phase`, and of the last head's, on their way down."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.handed: dict[tuple[int, int], Tensor] = {}  # by head and batch, at the output of the next group, [b, T, H]

    def gradients(
        self,
        batch: int,
        plan: StagePlan,
        inputs: Tensor,
        output: StageOutput,
        weights: Mapping[int | None, list[nn.Parameter]],
        last: int,
    ) -> tuple[Gradients, Gradients]:
        """The true gradients of a group's weights, and the local ones of what the phase trains.

        No graph is cut: autograd walks down to the weights that it is asked for and no further.
        """
        true = self._of_loss(last, batch, plan, inputs, output, weights, on=True)
        local: Gradients = {}
        for span in self.phase.spans:
            if span.last < plan.last_block:
                continue
            trained = range(span.first, span.last + 1)
            shares = {unit: self.phase.weight(span, unit or 0) for unit in weights}
            reached = {unit: weights[unit] for unit, share in shares.items() if share > 0}
            on = any(self.phase.weight(span, block) > 0 for block in trained if block < plan.first_block)
            if not reached and not on:
                continue
            same = span.last == last
            found = true if same else self._of_loss(span.last, batch, plan, inputs, output, reached, on)
            for unit in reached:
                own = [shares[unit] * gradient for gradient in found[unit]]
                local[unit] = [a + b for a, b in zip(local[unit], own, strict=True)] if unit in local else own
        return true, local

    def _of_loss(
        self,
        head: int,
        batch: int,
        plan: StagePlan,
        inputs: Tensor,
        output: StageOutput,
        weights: Mapping[int | None, list[nn.Parameter]],
        on: bool,
    ) -> Gradients:
        """Of the loss of the head after block `head`; with `on` also that at the inputs, for the group below."""
        of, gradient = output.loss, None
        if head > plan.last_block:
            of, gradient = output.hidden_states, self.handed.pop((head, batch)).to(inputs.device)
        assert of is not None, f"no head after block {head}"
        on = on and not plan.is_first
        flat = [weight for of_unit in weights.values() for weight in of_unit] + ([inputs] if on else [])
        # What a loss does not reach, an expert that no token was sent to, has a gradient of zero.
        taken = iter(torch.autograd.grad(of, flat, gradient, retain_graph=True, materialize_grads=True))
        gradients = {unit: [next(taken) for _ in of_unit] for unit, of_unit in weights.items()}
        if on:
            self.handed[head, batch] = next(taken).cpu()
        return gradients


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
def _watched(stage: Stage, blueprint: Blueprint) -> Iterator[tuple[dict[int, Tensor], list[Tensor]]]:
    """Of the last forward pass: hidden states [b, T, H] after every block, the rows [b * T, width] at the readout."""
    hidden_states: dict[int, Tensor] = {}
    rows: list[Tensor] = []

    def keep_output(block: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            hidden_states[block] = (output[0] if isinstance(output, tuple) else output).detach()

        return keep

    def keep_rows(_: nn.Module, args: Any) -> None:
        rows[:] = [args[0].detach()]

    plan, handles = stage.plan, []
    for block in range(plan.first_block, plan.last_block + 1):
        module = stage.body.get_submodule(f"{blueprint.parts.blocks_in_base}.{block}")
        handles.append(module.register_forward_hook(keep_output(block)))
    if stage.head is not None:
        handles.append(stage.head.readout.register_forward_pre_hook(keep_rows))
    try:
        yield hidden_states, rows
    finally:
        for handle in handles:
            handle.remove()


# ---- exits


class _Last:
    """The last exit, which the others are compared with: its readout, and the rows there by batch."""

    def __init__(self, block: int, head: Head) -> None:
        self.block, self.readout = block, head.readout
        self.rows: dict[int, Tensor] = {}

    @torch.no_grad()
    def agreement(self, batch: int, head: Head, rows: Tensor, labels: Tensor) -> Tensor:
        """fp64 [2]: at how many positions with a label an exit's best token is the last one's; the sum of the KL.

        `rows` [tokens, width] at the readout of `head`, `labels` [tokens]; asked of the last exit first. The logits of
        a few rows at a time exist.
        """
        of_last = self.rows.setdefault(batch, rows.cpu()).to(rows.device)
        sums = torch.zeros(2, dtype=torch.float64)
        where = (labels != IGNORE_INDEX).nonzero().flatten()
        for chosen in where.split(self.readout.chunk_tokens):
            wanted = F.log_softmax(self.readout.logits(of_last[chosen]), dim=-1)  # [chosen, V]
            own = F.log_softmax(head.readout.logits(rows[chosen]), dim=-1)
            sums[0] += (own.argmax(dim=-1) == wanted.argmax(dim=-1)).sum().item()
            sums[1] += F.kl_div(own, wanted, reduction="sum", log_target=True).item()
        return sums
