"""What the plain loop of reference.py gives for a configuration, and the comparison with what the engine gave."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import reference
import torch
from engine_jobs import Trained, load_config, make_stream
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, get_scheduler

from lptransformer.config.schema import Config
from lptransformer.methods.stages import StagePlan
from lptransformer.models.head import token_positions


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


def runs_of(config: Config) -> list[tuple[int, int]]:
    """(first, last) block of every run: as equal as possible with the longer ones first, or the lengths given."""
    depth, name = config.model.num_layers, config.objective.name
    chunks = {"greedy": depth, "backprop": 1, "last": 1}.get(name) or config.value("objective.chunks")
    sizes = [depth // chunks + (i < depth % chunks) for i in range(chunks)] if isinstance(chunks, int) else chunks
    return [(sum(sizes[:i]), sum(sizes[: i + 1]) - 1) for i in range(len(sizes))]


def phases_of(config: Config) -> list[reference.Phase]:
    """The usual phase, and that of the global updates, written out from the definitions."""
    options: Any = config.objective
    runs, depth = runs_of(config), config.model.num_layers
    whole = [(0, depth - 1)]
    spans, own_weight = runs, None
    if options.name == "overlapping":
        ends = range(0 if options.first_head else options.overlap, len(runs))
        spans = [(runs[max(0, end - options.overlap)][0], runs[end][1]) for end in ends]
        own_weight = options.own_weight if options.overlap else None
    elif options.name == "last":
        spans = [(depth - options.trained_blocks, depth - 1)]
    elif options.name == "deep_supervision":
        spans = [(0, last) for _, last in runs]
    elif options.name == "delayed":
        spans = whole
    heads_only = [(last + 1, last) for _, last in spans[:-1]]
    return [reference.Phase(spans, own_weight), reference.Phase([*heads_only, *whole])]


def phase_of_update(config: Config, updates: int) -> list[int]:
    """1 where an update is a global one."""
    options, steps = config.objective, config.train.steps
    every = getattr(options, "backprop_every", None) or steps + 1
    share = getattr(options, "backprop_share", 0.0)
    return [int((u + 1) % every == 0 or u >= steps - round(share * steps)) for u in range(updates)]


def learning_rates(config: Config, updates: int) -> list[float]:
    train = config.train
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    floor, own = train.min_learning_rate, {}
    if train.lr_scheduler == "cosine_with_min_lr":
        own = {"min_lr": floor}
    if train.lr_scheduler == "warmup_stable_decay":
        assert train.decay_steps is not None
        own = {"min_lr_ratio": floor / train.learning_rate, "num_decay_steps": train.decay_steps}
    scheduler = get_scheduler(train.lr_scheduler, optimizer, train.warmup_steps, train.steps, own)
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
    adamw = {"name": options.name, "weight_decay": options.weight_decay, "betas": betas, "eps": options.eps}
    return adamw if options.name == "adamw" else adamw | {"momentum": options.momentum}


@cache
def expected(
    overrides: tuple[str, ...], updates: int, labels: tuple[int, ...] = (), **formulas: Any
) -> reference.Result:
    """The reference's result. `overrides` beyond model, objective, head, optimizer and train change nothing here."""
    config = load_config(overrides)
    stream, train = make_stream(config, labels), config.train
    batches = [stream.batch(index) for index in range(updates * train.micro_batches_per_update)]
    return reference.train(
        whole_model_config(config, stream.vocab_size),
        phases_of(config),
        [(batch.input_ids, batch.labels) for batch in batches],
        train.micro_batches_per_update,
        optimizer_options(config),
        learning_rates(config, updates),
        train.grad_clip,
        train.seed,
        config.loss.chunk_tokens,
        phase_of_update=phase_of_update(config, updates),
        delayed=config.objective.name == "delayed",
        heads=head_options(config, labels),
        border=None if config.border.codec == "none" else config.border.codec,
        dtype=torch.float64 if train.dtype == "fp64" else torch.float32,
        frozen=train.freeze,
        **formulas,
    )


# --------------------------------------------------------------------------------------------- the comparison


def head_options(config: Config, labels: tuple[int, ...] = ()) -> reference.HeadOptions:
    """The auxiliary heads in the words of the reference; lags as docs/design.md has them."""
    head, parallel, train = config.head, config.parallel, config.train
    ends = sorted(last for _, last in phases_of(config)[0].spans)
    rounds = train.micro_batches_per_update // parallel.data
    hops = {end: len(ends) - 1 - number if head.kind == "shared" else 1 for number, end in enumerate(ends)}

    def positions(block: int, micro_batch: int) -> Tensor:
        return token_positions(
            train.seed,
            block,
            micro_batch,
            train.micro_batch_size,
            config.data.sequence_length,
            head.token_fraction,
            make_stream(config, labels).batch(micro_batch).labels,
        )

    return reference.HeadOptions(
        readout=head.kind,
        rank=config.value("head.rank") or 0,
        blocks=head.blocks,
        ema_decay=head.ema_decay,
        lags={end: math.ceil(hop * (2 * parallel.in_flight + 1) / rounds) for end, hop in hops.items()},
        refresh_every=head.refresh_every,
        positions=None if head.token_fraction == 1.0 else positions,
    )


def reference_name(name: str, plan: StagePlan, base: str, kind: str) -> str | None:
    """The name in reference.Result of a stage's tensor, None where it holds none (moving averages, copied readouts).

    `base`: where the whole model has its blocks.
    """
    if name.startswith("body."):
        return f"{base}.{name.removeprefix('body.')}"
    if plan.is_last:
        own_norm = f"{base}.{'ln_f' if base == 'transformer' else 'norm'}"
        return name.replace("head.norm", own_norm).replace("head.readout", "lm_head")
    if name.startswith("head.average.") or (kind == "shared" and name == "head.readout.weight"):
        return None
    own = name.removeprefix("head.")
    if extra := re.match(r"blocks\.(?:h|layers)\.(\d+)\.", own):
        own = f"blocks.{int(extra[1]) - plan.last_block - 1}.{own[extra.end() :]}"
    renamed = {"readout.temperature": "temperature"} | ({"readout.weight": "up.weight"} if kind == "low_rank" else {})
    return f"head.{plan.last_block}.{renamed.get(own, own)}"


def gather(trained: Sequence[Trained], head_kind: str = "private") -> reference.Result:
    """One result from those of all processes. Replicas, and the stages that clip together, must agree bit for bit."""
    names = {name for one in trained for weights in one.weights.values() for name in weights}
    base = "transformer" if any(name.startswith("body.h.") for name in names) else "model"
    plans = {index: plan for one in trained for index, plan in one.plans.items()}
    heads = sorted(index for index, plan in plans.items() if plan.has_head)
    updates = len(next(iter(trained[0].reports.values())))
    groups = trained[0].clip_groups[:updates]
    result = reference.Result(
        [[0.0] * len(heads) for _ in groups], [[-1.0] * len(groups[u]) for u in range(len(groups))], {}
    )
    for one in trained:
        assert not one.error, one.error
        for index, plan in one.plans.items():
            for update, report in enumerate(one.reports[index]):
                assert (report.update, report.stage, report.skipped) == (update + 1, index, False)
                for number, members in enumerate(groups[update]):
                    if index in members:
                        norms = result.grad_norms[update]
                        assert norms[number] in (-1.0, report.grad_norm), f"grad norms of {members} disagree"
                        norms[number] = report.grad_norm
                assert (report.loss_sum is not None) == plan.has_head
                if report.loss_sum is not None:  # sums of a few numbers of single precision: exact
                    result.losses[update][heads.index(index)] += report.loss_sum
            for name, tensor in one.weights[index].items():
                key = reference_name(name, plan, base, head_kind)
                if key is None:
                    continue
                if key.endswith(".temperature"):
                    tensor = tensor.squeeze()  # one element in the engine, a scalar in the reference
                assert torch.equal(result.weights.setdefault(key, tensor), tensor), f"replicas disagree on {key}"
    tokens = {index: n for one in trained for index, n in one.label_tokens.items()}
    result.losses = [[loss / tokens[i] for i, loss in zip(heads, losses, strict=True)] for losses in result.losses]
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
