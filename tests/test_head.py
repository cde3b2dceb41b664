"""The chunked cross-entropy and the heads that share it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lptransformer.head import IGNORE_INDEX, PrivateHead, chunked_cross_entropy

ROWS, HIDDEN, VOCABULARY = 37, 16, 50


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, gradients of hidden and weight, by autograd over a loop."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = hidden.new_zeros(())
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="sum")
    (total * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [ROWS + 1, ROWS, 10, 1])
def test_it_is_the_plain_loop_over_chunks_bit_for_bit(problem: tuple[Tensor, Tensor, Tensor], chunk: int) -> None:
    hidden, weight, labels = problem
    expected = plain(hidden, weight, labels, 1 / 7, chunk)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, total = chunked_cross_entropy(hidden, weight, labels, 1 / 7, chunk)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert torch.equal(total, expected[0]) and torch.equal(loss, expected[0] * (1 / 7))
    assert torch.equal(hidden.grad, expected[1]) and torch.equal(weight.grad, expected[2])


def test_chunks_change_nothing_but_rounding(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels = problem
    whole = plain(hidden.double(), weight.double(), labels, 1.0, ROWS)
    for chunk in (1, 5, ROWS):
        torch.testing.assert_close(plain(hidden.double(), weight.double(), labels, 1.0, chunk), whole)


def test_logits_never_exist_at_once(problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda rows, weight: seen.append(len(rows)) or linear(rows, weight))
    loss, _ = chunked_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, 1.0, 10)
    loss.backward()
    assert sorted(seen) == [7, 10, 10, 10]


def test_without_gradients_none_are_made(
    problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels = problem

    def never(*args: object) -> None:
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(torch.autograd, "grad", never)
    with torch.no_grad():
        loss, total = chunked_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, 0.5, 10)
    assert not loss.requires_grad and torch.equal(loss, total * 0.5)


def test_a_loss_that_is_not_finite_poisons_every_gradient(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels = problem
    hidden[3, 0] = float("nan")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    chunked_cross_entropy(hidden, weight, labels, 1.0, 10)[0].backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isnan().all() and weight.grad.isnan().all()


def test_bf16_computes_the_loss_in_fp32(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels = problem
    low = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    loss, total = chunked_cross_entropy(*low, labels, 1.0, 10)
    loss.backward()
    assert total.dtype == torch.float32 and low[0].grad is not None and low[0].grad.dtype == torch.bfloat16
    expected = F.cross_entropy(F.linear(*(x.detach() for x in low)).float(), labels, reduction="sum")
    torch.testing.assert_close(total, expected)


def test_loss_and_logits_of_a_head_agree(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, _, labels = problem
    readout = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head = PrivateHead(nn.LayerNorm(HIDDEN), readout, chunk_tokens=8)
    assert {name for name, _ in head.named_parameters()} == {"norm.weight", "norm.bias", "readout.weight"}
    _, total = head(hidden[None], labels[None], 1.0)
    logits = head.logits(hidden[None])
    torch.testing.assert_close(total, F.cross_entropy(logits[0], labels, reduction="sum"))
