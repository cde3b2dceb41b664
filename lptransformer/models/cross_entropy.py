"""The chunked cross-entropy that all LM heads share, and what a family does to its logits before it.

The logits of a micro-batch, [tokens, vocabulary], never exist at once: the loss and its gradients are taken chunk of
rows by chunk of rows during the forward pass, so the backward pass costs nothing but a scaling and holds no logits.
A kernel does that (`loss.fused`): the loop below, or a function of a library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lptransformer.errors import OptionError

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


class Asked(NamedTuple):
    """A loss that is asked for: arguments as of `chunked_cross_entropy`, and which gradients are wanted of hidden,
    weight and bias; that of the bias beside that of the weight alone."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float
    chunk_tokens: int
    rule: LogitRule
    trained: tuple[bool, bool, bool]


Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Kernel(Protocol):
    """The sum of the losses in nats, and the gradients of `scale` times that, of hidden, weight and bias where they are
    wanted. It is called without autograd."""

    def __call__(self, asked: Asked) -> Result: ...


def chunked(asked: Asked) -> Result:
    """Torch's own operations in a loop: every rule, dtype and device."""
    hidden, weight, bias, labels, scale, chunk_tokens, rule, (train_hidden, train_weight, train_bias) = asked
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
    return total, grad_hidden, grad_weight, grad_bias


def by_torch(asked: Asked) -> Result:
    """`torch.nn.functional.linear_cross_entropy`: softmax and gradient in the memory of the logits."""
    assert asked.rule == PLAIN, asked.rule
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=asked.chunk_tokens)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        how: dict[str, Any] = {"reduction": "sum", "ignore_index": IGNORE_INDEX, "options": options}
        found: Tensor = F.linear_cross_entropy(hidden, weight, asked.labels, linear_bias=bias, **how)
        return found

    return _differentiated(total, asked)


def by_liger(asked: Asked) -> Result:
    """Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989), which chooses its own chunks; gradients of the
    weight are added up in fp32. It waits for the device, to count the labels."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    assert asked.rule == LogitRule(cap=asked.rule.cap), asked.rule
    added_up_in = torch.promote_types(asked.weight.dtype, torch.float32)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        how: dict[str, Any] = {"reduction": "sum", "ignore_index": IGNORE_INDEX, "softcap": asked.rule.cap}
        given = hidden, weight, asked.labels
        found: Tensor = liger_fused_linear_cross_entropy(*given, bias=bias, accum_dtype=added_up_in, **how)
        return found

    return _differentiated(total, asked)


def _differentiated(total: Callable[[Tensor, Tensor, Tensor | None], Tensor], asked: Asked) -> Result:
    """A library's loss, and its gradients at once: some of them can be taken once only."""
    leaves = [
        one if one is None else one.detach().requires_grad_(wanted)
        for one, wanted in zip(asked[:3], asked.trained, strict=True)
    ]
    with torch.enable_grad():
        loss = total(*leaves)  # type: ignore[arg-type]
    wanted = [one for one in leaves if one is not None and one.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, torch.full_like(loss, asked.scale)) if wanted else ())
    gradients = [next(found) if one is not None and one.requires_grad else None for one in leaves]
    return loss.detach(), *gradients  # type: ignore[return-value]


KERNELS: dict[str, Kernel] = {"chunked": chunked, "torch": by_torch, "liger": by_liger}
AUTO = "auto"


def kernel(name: str, rule: LogitRule, dtype: str, device: str) -> Kernel:
    """What `loss.fused` means: `auto` is torch's function on a GPU in fp32, where torch has it and the family's logits
    are plain, else the loop."""
    if name == AUTO:
        fused = device == "cuda" and dtype == "fp32" and rule == PLAIN and not missing("torch")
        name = "torch" if fused else "chunked"
    return KERNELS[name]


def check_kernel(name: str, rule: LogitRule) -> None:
    """Raises OptionError where a kernel cannot do to the logits what the family does."""
    if name == "torch" and rule != PLAIN:
        raise OptionError("loss.fused", name, f"it takes plain logits, and those of this model have {rule}; give auto")
    if name == "liger" and rule != LogitRule(cap=rule.cap):
        raise OptionError("loss.fused", name, f"it has a soft cap alone, and this model has {rule}; give auto")


def missing(name: str) -> str:
    """What this host lacks for a kernel; empty for nothing."""
    if name == "torch" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)"
    if name == "liger":
        if not torch.cuda.is_available():
            return "there is no GPU"
        try:
            import_module("liger_kernel.transformers.functional")
        except Exception as error:  # it needs triton, which needs a driver
            why = f"{type(error).__name__} {error}".splitlines()[0]
            return f"its package does not import ({why}; pip install --no-deps liger-kernel)"
    return ""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, asked: Asked, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        total, *gradients = kernel(asked)
        ctx.save_for_backward(*gradients, total)
        ctx.mark_non_differentiable(total)
        ctx.scale = asked.scale
        return total * asked.scale, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, total = ctx.saved_tensors
        # x - x is 0 for every finite x and NaN otherwise: a loss that is not finite poisons its gradients, so that the
        # gradient norm alone decides whether an update is skipped, on every replica alike and without a host sync. So
        # does a scale that is not: that of an update without a label.
        factor = grads[0] + (total - total) * ctx.scale
        return *(None if grad is None else grad * factor.to(grad.dtype) for grad in gradients), None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    chunk_tokens: int,
    rule: LogitRule = PLAIN,
    bias: Tensor | None = None,
    kernel: Kernel = chunked,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `rule(hidden @ weight.T + bias)` against `labels`, summed over rows, without the whole logits.

    hidden [tokens, hidden_size], weight [vocab_size, hidden_size], bias [vocab_size], labels [tokens] int64 with
    IGNORE_INDEX where there is no loss. Returns (sum times `scale`, to be called backward on; sum, for logs), both
    scalars in nats, in fp32 or the higher precision of `hidden`. Logits are cast to that before rule and loss. With
    equal `chunk_tokens`, loss and gradients of the kernel `chunked` are bit for bit those of the plain loop over chunks
    of rows. A gradient that is not required (of a weight that is a read-only copy) is not computed.
    """
    given, gradients = (hidden, weight, bias), torch.is_grad_enabled()
    train_hidden, train_weight, train_bias = (gradients and x is not None and x.requires_grad for x in given)
    trained = train_hidden, train_weight, train_bias
    loss, total = _CrossEntropy.apply(*given, Asked(*given, labels, scale, chunk_tokens, rule, trained), kernel)
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
