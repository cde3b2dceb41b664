"""What the plain loop of reference.py gives for a configuration, and the comparison with what the engine gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import reference
import torch
from engine_jobs import Trained, load_config, make_stream
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, get_scheduler

from lptransformer.config import Config
from lptransformer.partition import StagePlan


def whole_model_config(config: Config, vocab_size: int) -> GPT2Config | LlamaConfig:
    model = config.model
    shared = {"vocab_size": vocab_size, "use_cache": False, "tie_word_embeddings": False}
    if model.family == "gpt2":
        dropouts = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_positions=model.max_position_embeddings,
            **dropouts,
            **shared,
        )
    assert model.num_key_value_heads is None and model.intermediate_size is None
    return LlamaConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        intermediate_size=32 * math.ceil(model.hidden_size * 8 / 3 / 32),
        max_position_embeddings=model.max_position_embeddings,
        **shared,
    )


def spans_of(config: Config) -> list[tuple[int, int]]:
    """(first, last) block of every run: as equal as possible with the longer ones first, or the lengths given."""
    depth = config.model.num_layers
    chunks = config.objective.chunks if config.objective.name == "chunked" else depth
    sizes = [depth // chunks + (i < depth % chunks) for i in range(chunks)] if isinstance(chunks, int) else chunks
    return [(sum(sizes[:i]), sum(sizes[: i + 1]) - 1) for i in range(len(sizes))]


def learning_rates(config: Config, updates: int) -> list[float]:
    train = config.train
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    scheduler = get_scheduler(train.lr_scheduler, optimizer, train.warmup_steps, train.steps)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def optimizer_options(config: Config) -> dict[str, Any]:
    options = config.optimizer
    if options.name == "sgd":
        return {"name": "sgd", "weight_decay": options.weight_decay, "momentum": options.momentum}
    betas = (options.beta1, options.beta2)
    return {"name": "adamw", "weight_decay": options.weight_decay, "betas": betas, "eps": options.eps}


@cache
def expected(overrides: tuple[str, ...], updates: int, **formulas: Any) -> reference.Result:
    """The reference's result. `overrides` beyond model, objective, head, optimizer and train change nothing here."""
    config = load_config(overrides)
    stream, train = make_stream(config), config.train
    batches = [stream.batch(index) for index in range(updates * train.micro_batches_per_update)]
    return reference.train(
        whole_model_config(config, stream.vocab_size),
        spans_of(config),
        [(batch.input_ids, batch.labels) for batch in batches],
        train.micro_batches_per_update,
        optimizer_options(config),
        learning_rates(config, updates),
        train.grad_clip,
        train.seed,
        config.head.chunk_tokens,
        **formulas,
    )


# --------------------------------------------------------------------------------------------- the comparison


def reference_name(name: str, plan: StagePlan, base: str) -> str:
    """The name in reference.Result of a stage's tensor. `base`: where the whole model has its blocks."""
    if name.startswith("body."):
        return f"{base}.{name.removeprefix('body.')}"
    if not plan.is_last:
        return f"head.{plan.last_block}.{name.removeprefix('head.')}"
    own_norm = f"{base}.{'ln_f' if base == 'transformer' else 'norm'}"
    return name.replace("head.norm", own_norm).replace("head.readout", "lm_head")


def gather(trained: Sequence[Trained]) -> reference.Result:
    """One result from those of all processes. Replicas, and the stages of one span, must agree bit for bit."""
    base = (
        "transformer" if any("body.h." in name for t in trained for w in t.weights.values() for name in w) else "model"
    )
    updates = len(next(iter(trained[0].reports.values())))
    plans = {index: plan for one in trained for index, plan in one.plans.items()}
    num_spans = 1 + max(plan.span for plan in plans.values())
    result = reference.Result(
        [[0.0] * num_spans for _ in range(updates)], [[-1.0] * num_spans for _ in range(updates)], {}
    )
    for one in trained:
        assert not one.error, one.error
        for index, plan in one.plans.items():
            for update, report in enumerate(one.reports[index]):
                assert (report.update, report.stage, report.skipped) == (update + 1, index, False)
                norms = result.grad_norms[update]
                assert norms[plan.span] in (-1.0, report.grad_norm), f"grad norms of span {plan.span} disagree"
                norms[plan.span] = report.grad_norm
                assert (report.loss_sum is not None) == plan.has_head
                if report.loss_sum is not None:
                    result.losses[update][plan.span] += (
                        report.loss_sum
                    )  # sums of a few numbers of single precision: exact
            for name, tensor in one.weights[index].items():
                key = reference_name(name, plan, base)
                assert torch.equal(result.weights.setdefault(key, tensor), tensor), f"replicas disagree on {key}"
    tokens = trained[0].label_tokens
    result.losses = [[loss / tokens for loss in losses] for losses in result.losses]
    return result


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    """The greatest absolute difference of a tensor's elements, relative to its greatest element."""
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def compare(
    got: reference.Result, wanted: reference.Result, tolerance: float = 0.0, norm_tolerance: float = 0.0
) -> None:
    """Losses and gradient norms of all updates and all final weights are equal: bit for bit where the tolerance is 0,
    otherwise within it, relative, per number and per tensor. Raises AssertionError that names what differs."""

    def close(a: float, b: float, allowed: float) -> bool:
        return a == b if allowed == 0 else abs(a - b) <= allowed * abs(b)

    assert got.weights.keys() == wanted.weights.keys(), sorted(got.weights.keys() ^ wanted.weights.keys())
    different = []
    allowed = {"loss": tolerance, "grad norm": max(tolerance, norm_tolerance)}
    for what, ours, theirs in (("loss", got.losses, wanted.losses), ("grad norm", got.grad_norms, wanted.grad_norms)):
        assert [len(values) for values in ours] == [len(values) for values in theirs]
        for update, values in enumerate(zip(ours, theirs, strict=True), start=1):
            for span, (a, b) in enumerate(zip(*values, strict=True)):
                if not close(a, b, allowed[what]):
                    different.append(f"{what} of span {span} at update {update}: {a} instead of {b}")
    for name, tensor in got.weights.items():
        assert tensor.shape == wanted.weights[name].shape and tensor.dtype == wanted.weights[name].dtype, name
        difference = largest_difference(tensor, wanted.weights[name])
        if not (torch.equal(tensor, wanted.weights[name]) if tolerance == 0 else difference <= tolerance):
            different.append(f"weights {name}: by {difference:.1e}")
    assert not different, f"{len(different)} differences:\n" + "\n".join(different)
