"""The chunked cross-entropy that all LM heads share, and what a family does to its logits before it.

The logits of a micro-batch, [tokens, vocabulary], never exist at once: the loss and its gradients are taken chunk of
rows by chunk of rows during the forward pass, so the backward pass costs nothing but a scaling and holds no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LogitRule:
    """What some families do to the logits: a factor, a divisor, then a soft cap, cap * tanh(logits / cap).

    Factor and divisor are kept apart because their roundings differ.
    """

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


PLAIN = LogitRule()


def chunk_starts(rows: int, chunk_tokens: int) -> Sequence[int]:
    """The first row of every chunk."""
    return range(0, rows, chunk_tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        chunk_tokens: int,
        rule: LogitRule,
        bias: Tensor | None,
        train_hidden: bool,
        train_weight: bool,
        train_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        starts = chunk_starts(hidden.shape[0], chunk_tokens)
        total_dtype = torch.promote_types(weight.dtype, torch.float32)
        losses: dict[int, Tensor] = {}
        grad_hidden = torch.empty_like(hidden) if train_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        # Last chunk first: the order in which autograd would add up the gradients of the weight.
        for start in reversed(starts):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight, bias).detach().requires_grad_(train_hidden or train_weight)
            with torch.enable_grad():
                exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(rule(exact), labels[rows], ignore_index=IGNORE_INDEX, reduction="sum")
            losses[start] = loss.detach()
            if train_hidden or train_weight:
                (grad_logits,) = torch.autograd.grad(loss, logits, torch.full_like(loss, scale))
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ weight
                if train_weight:
                    product = grad_logits.T @ hidden[rows]
                    if grad_weight is None:  # added up in fp32 where the weight has less
                        grad_weight = product.to(total_dtype) if len(starts) > 1 else product
                    else:
                        grad_weight.add_(product)
                    del product
                if train_bias:
                    summed = grad_logits.sum(0)
                    if grad_bias is None:
                        grad_bias = summed.to(total_dtype) if len(starts) > 1 else summed
                    else:
                        grad_bias.add_(summed)
                del grad_logits  # or it would be there beside the next chunk's
            del logits, exact, loss
        total = losses[0]
        for start in starts[1:]:
            total = total + losses[start]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, total)
        ctx.mark_non_differentiable(total)
        ctx.scale = scale
        return total * scale, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, total = ctx.saved_tensors
        # x - x is 0 for every finite x and NaN otherwise: a loss that is not finite poisons its gradients, so that the
        # gradient norm alone decides whether an update is skipped, on every replica alike and without a host sync. So
        # does a scale that is not: that of an update without a label.
        factor = grads[0] + (total - total) * ctx.scale
        hidden, weight, bias = (None if grad is None else grad * factor.to(grad.dtype) for grad in gradients)
        return hidden, weight, None, None, None, None, bias, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    chunk_tokens: int,
    rule: LogitRule = PLAIN,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `rule(hidden @ weight.T + bias)` against `labels`, summed over rows, without the whole logits.

    hidden [tokens, hidden_size], weight [vocab_size, hidden_size], bias [vocab_size], labels [tokens] int64 with
    IGNORE_INDEX where there is no loss. Returns (sum times `scale`, to be called backward on; sum, for logs), both
    scalars in nats, in fp32 or the higher precision of `hidden`. Logits are cast to that before rule and loss. With
    equal `chunk_tokens`, loss and gradients are bit for bit those of the plain loop over chunks of rows. A gradient
    that is not required (of a weight that is a read-only copy) is not computed.
    """
    trained = (x is not None and torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, bias))
    loss, total = _ChunkedCrossEntropy.apply(hidden, weight, labels, scale, chunk_tokens, rule, bias, *trained)
    return loss, total


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    rule: LogitRule = PLAIN,
    bias: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of every row by itself, [tokens], 0 without a label; arguments as of `chunked_cross_entropy`.

    For evaluation: no gradients.
    """
    losses = []
    for start in chunk_starts(hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = F.linear(hidden[rows], weight, bias)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(rule(exact), labels[rows], ignore_index=IGNORE_INDEX, reduction="none"))
        del logits, exact
    return torch.cat(losses)
