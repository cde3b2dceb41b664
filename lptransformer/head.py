"""LM heads, auxiliary and final, and the chunked cross-entropy they share.

The logits of a micro-batch, [tokens, vocabulary], never exist at once: the loss and its gradients are taken chunk of
rows by chunk of rows during the forward pass, so the backward pass costs nothing but a scaling and holds no logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, chunk_tokens: int, train: bool
    ) -> tuple[Tensor, Tensor]:
        starts = range(0, hidden.shape[0], chunk_tokens)
        losses: dict[int, Tensor] = {}
        grad_hidden = torch.empty_like(hidden) if train else None
        grad_weight: Tensor | None = None
        # Last chunk first: the order in which autograd would add up the gradients of the weight.
        for start in reversed(starts):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight).detach().requires_grad_(grad_hidden is not None)
            with torch.enable_grad():
                loss = F.cross_entropy(logits.float(), labels[rows], ignore_index=IGNORE_INDEX, reduction="sum")
            losses[start] = loss.detach()
            if grad_hidden is not None:
                (grad_logits,) = torch.autograd.grad(loss, logits, torch.full_like(loss, scale))
                grad_hidden[rows] = grad_logits @ weight
                product = grad_logits.T @ hidden[rows]
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        total = losses[0]
        for start in starts[1:]:
            total = total + losses[start]
        ctx.save_for_backward(grad_hidden, grad_weight, total)
        ctx.mark_non_differentiable(total)
        return total * scale, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, total = ctx.saved_tensors
        # x - x is 0 for every finite x and NaN otherwise: a loss that is not finite poisons its gradients, so that the
        # gradient norm alone decides whether an update is skipped, on every replica alike and without a host sync.
        factor = (grads[0] + (total - total)).to(grad_hidden.dtype)
        return grad_hidden * factor, grad_weight * factor, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against `labels`, summed over rows, without the whole logits.

    hidden [tokens, hidden_size], weight [vocab_size, hidden_size], labels [tokens] int64 with IGNORE_INDEX where there
    is no loss. Returns (sum times `scale`, to be called backward on; sum, for logs), both fp32 scalars in nats.
    Logits are cast to fp32 before the loss. With equal `chunk_tokens`, loss and gradients are bit for bit those of the
    plain loop over chunks of rows.
    """
    train = torch.is_grad_enabled() and hidden.requires_grad
    loss, total = _ChunkedCrossEntropy.apply(hidden, weight, labels, scale, chunk_tokens, train)
    return loss, total


class Readout(nn.Module):
    """The linear map to the vocabulary and the loss behind it.

    One module with one forward: ZeRO 3 gathers the weight of a module around its forward and backward, so the weight
    must not be used from outside.
    """

    def __init__(self, weight: Tensor, chunk_tokens: int) -> None:
        super().__init__()
        assert isinstance(weight, nn.Parameter)
        self.weight = weight  # [vocab_size, hidden_size]
        self.chunk_tokens = chunk_tokens

    def forward(self, rows: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """rows [tokens, H] and labels [tokens] to (scaled loss, sum of the losses in nats)."""
        return chunked_cross_entropy(rows, self.weight, labels, scale, self.chunk_tokens)


class PrivateHead(nn.Module):
    """Norm and linear readout to the vocabulary, owned and trained by one stage.

    The last stage's head holds the model's own norm and readout; an auxiliary head has the same classes and sizes
    (2012.03837, section 3: an auxiliary network per chunk).
    """

    def __init__(self, norm: nn.Module, readout: nn.Linear, chunk_tokens: int) -> None:
        super().__init__()
        self.norm = norm
        self.readout = Readout(readout.weight, chunk_tokens)

    def forward(self, hidden_states: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """hidden_states [b, T, H] and labels [b, T] to (scaled loss, sum of the losses in nats), scalars."""
        rows = self.norm(hidden_states).flatten(0, 1)  # [b * T, H]
        return self.readout(rows, labels.flatten(), scale)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [b, T, H] to logits [b, T, V]; for evaluation, outside DeepSpeed."""
        return F.linear(self.norm(hidden_states), self.readout.weight)


HEADS = {"private": PrivateHead}
