"""The chunked cross-entropy: bit for bit the plain loop, and what a family does to its logits inside it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lptransformer.config.load import load
from lptransformer.errors import ConfigError, OptionError
from lptransformer.models.cross_entropy import (
    IGNORE_INDEX,
    KERNELS,
    PLAIN,
    LogitRule,
    by_liger,
    by_torch,
    check_kernel,
    chunked,
    chunked_cross_entropy,
    kernel,
    missing,
    token_cross_entropy,
)
from lptransformer.training.this_host import check_host

ROWS, HIDDEN, VOCABULARY = 37, 16, 50


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


RULES = [PLAIN, LogitRule(factor=0.3), LogitRule(divisor=7.0), LogitRule(cap=2.0), LogitRule(0.3, 1.0, 2.0)]


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, chunk: int, rule: LogitRule = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, gradients of hidden and weight, by autograd over a loop."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = hidden.new_zeros(())
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = F.linear(rows, weight) * rule.factor / rule.divisor
        if rule.cap is not None:
            logits = rule.cap * torch.tanh(logits / rule.cap)
        total = total + F.cross_entropy(logits, targets, reduction="sum")
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


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scales_and_caps_have_their_gradient(problem: tuple[Tensor, Tensor, Tensor], rule: LogitRule) -> None:
    hidden, weight, labels = problem
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        low = hidden.to(dtype), weight.to(dtype)
        expected = plain(*low, labels, 1 / 7, 10, rule)
        leaves = [tensor.clone().requires_grad_() for tensor in low]
        loss, total = chunked_cross_entropy(*leaves, labels, 1 / 7, 10, rule)
        loss.backward()
        assert total.dtype == dtype
        for found, right in zip((total, *(leaf.grad for leaf in leaves)), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_those_of_finite_differences_in_float64(
    problem: tuple[Tensor, Tensor, Tensor], rule: LogitRule
) -> None:
    hidden, weight, labels = problem
    leaves = [tensor.double().requires_grad_() for tensor in (hidden[:7, :4], weight[:9, :4])]
    labels = torch.arange(7)
    torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, 0.3, 3, rule)[0], leaves)


@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_is_added_before_the_rule_and_has_its_gradient(
    problem: tuple[Tensor, Tensor, Tensor], trained: bool
) -> None:
    hidden, weight, labels = problem
    bias = torch.linspace(-1, 1, VOCABULARY).requires_grad_(trained)
    rule = LogitRule(0.3, 1.0, 2.0)
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    exact = bias.detach().double().requires_grad_()
    logits = rule(F.linear(leaves[0], leaves[1], exact))
    (F.cross_entropy(logits, labels, reduction="sum") / 7).backward()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss, total = chunked_cross_entropy(hidden, weight, labels, 1 / 7, 10, rule, bias)
    loss.backward()
    with torch.no_grad():
        of_tokens = token_cross_entropy(hidden, weight, labels, 10, rule, bias)
    torch.testing.assert_close(of_tokens.sum(), total)
    for found, right in zip((hidden, weight, bias)[: 2 + trained], (*leaves, exact), strict=False):
        torch.testing.assert_close(found.grad, right.grad.float(), rtol=1e-5, atol=1e-6)
    assert (bias.grad is not None) == trained


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_gradient_that_nobody_asks_for_is_not_computed(problem: tuple[Tensor, Tensor, Tensor], frozen: str) -> None:
    hidden, weight, labels = problem
    expected = plain(hidden, weight, labels, 0.5, 10)
    hidden.requires_grad_(frozen != "hidden"), weight.requires_grad_(frozen != "weight")
    with FlopCounterMode(display=False) as counter:
        chunked_cross_entropy(hidden, weight, labels, 0.5, 10)[0].backward()
    assert counter.get_total_flops() == 2 * 2 * ROWS * HIDDEN * VOCABULARY  # of three products
    (found, right), (none, _) = (hidden.grad, expected[1]), (weight.grad, expected[2])
    if frozen == "hidden":
        (none, _), (found, right) = (hidden.grad, expected[1]), (weight.grad, expected[2])
    assert none is None and found is not None and torch.equal(found, right)


def test_logits_never_exist_at_once(problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda rows, *others: seen.append(len(rows)) or linear(rows, *others))
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


# ---------------------------------------------------------------------------------------------- kernels of libraries


def liger(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """In place of Liger-Kernel's function, which runs on GPUs alone: those of its arguments that are used."""
    assert reduction == "sum" and accum_dtype == torch.promote_types(weight.dtype, torch.float32)
    logits = LogitRule(cap=softcap)(F.linear(input, weight, bias))
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")


@pytest.fixture
def with_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # type: ignore[arg-type]
    functional: Any = SimpleNamespace(liger_fused_linear_cross_entropy=liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)


@pytest.mark.parametrize(("name", "rule"), [("torch", PLAIN), ("liger", PLAIN), ("liger", LogitRule(cap=2.0))], ids=str)
@pytest.mark.parametrize("trained", ["hidden weight bias", "hidden", "weight", ""])
@pytest.mark.usefixtures("with_liger")
def test_a_library_s_kernel_gives_what_the_loop_gives(
    problem: tuple[Tensor, Tensor, Tensor], name: str, rule: LogitRule, trained: str
) -> None:
    hidden, weight, labels = problem
    found = {}
    for how in (chunked, KERNELS[name]):
        given = {
            "hidden": hidden.double(),
            "weight": weight.double(),
            "bias": torch.linspace(-1, 1, VOCABULARY).double(),
        }
        for one in trained.split():
            given[one].requires_grad_()
        args = (given["hidden"], given["weight"], labels, 1 / 7, 10, rule, given["bias"], how)
        loss, total = chunked_cross_entropy(*args)
        if trained:
            (2 * loss).backward(retain_graph=True)
            loss.backward()  # as behind a pull
        found[how] = loss.detach(), total, *(one.grad for one in given.values())
    for ours, wanted in zip(found[KERNELS[name]], found[chunked], strict=True):
        assert (ours is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_library_s_loss_that_is_not_finite_poisons_every_gradient(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels = problem
    hidden[3, 0] = float("inf")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    chunked_cross_entropy(hidden, weight, labels, 1.0, 10, kernel=by_torch)[0].backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isnan().all() and weight.grad.isnan().all()


def test_what_auto_means_follows_from_device_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel("auto", PLAIN, "fp32", "cpu") is chunked
    assert kernel("auto", PLAIN, "fp32", "cuda") is by_torch
    assert kernel("auto", PLAIN, "bf16", "cuda") is chunked
    assert kernel("auto", LogitRule(cap=2.0), "fp32", "cuda") is chunked
    assert kernel("liger", PLAIN, "bf16", "cuda") is by_liger
    monkeypatch.delattr(F, "linear_cross_entropy")  # torch 2.11
    assert kernel("auto", PLAIN, "fp32", "cuda") is chunked


def test_what_a_kernel_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernel("liger", LogitRule(cap=2.0))
    for name, rule in (("torch", LogitRule(cap=2.0)), ("torch", LogitRule(divisor=2.0)), ("liger", LogitRule(0.3))):
        with pytest.raises(OptionError, match=f"loss.fused is {name}: .* give auto"):
            check_kernel(name, rule)
    config = {"data": {"train": "unused.txt"}}
    with pytest.raises(ConfigError, match="loss.fused = 'liger' .*: on this host there is no GPU; auto and chunked"):
        check_host(load(config, ["loss.fused=liger"]), 1)
    with monkeypatch.context() as with_gpu:
        with_gpu.setattr(torch.cuda, "is_available", lambda: True)
        assert "its package does not import (ModuleNotFoundError No module named" in missing("liger")
    check_host(load(config, ["loss.fused=torch"]), 1)
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(ConfigError, match="loss.fused = 'torch' .*: on this host torch .* has no linear_cross_entropy"):
        check_host(load(config, ["loss.fused=torch"]), 1)
