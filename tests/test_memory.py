"""What `plan` says of memory: against the dry run's own count, and by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from lptransformer import activations, footprint, memory, objective
from lptransformer import config as configuration
from lptransformer.build import ModelPlan, plan_model
from lptransformer.config import Config, zero_stage
from lptransformer.cost import model_costs
from lptransformer.empty_model import EmptyModel
from lptransformer.footprint import RankMemory
from lptransformer.memory import ActivationBytes, RankBytes
from lptransformer.partition import cut

BASE: dict[str, Any] = {
    "model": {"family": "llama", "hidden_size": 128, "num_layers": 4, "num_heads": 4},
    "data": {"train": "none.txt"},
}
# Of the peak: activations and logits have most of it, or weights and what belongs to them.
LARGE = ("data.sequence_length=128", "train.micro_batch_size=4", "train.micro_batches_per_update=8")
SMALL = ("data.sequence_length=16", "train.micro_batch_size=1", "train.micro_batches_per_update=8")
V = 512


@functools.cache
def empty(*overrides: str) -> tuple[ModelPlan, EmptyModel, ActivationBytes]:
    config = configuration.load(BASE, overrides)
    plan = plan_model(config, V, None)
    kept = activations.count(
        plan.config,
        plan.parts,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        chunk_tokens=config.head.chunk_tokens,
        dtype=config.train.dtype,
    )
    return plan, EmptyModel(config, plan), kept


def both(model: tuple[str, ...], more: tuple[str, ...] = ()) -> list[tuple[RankBytes, RankMemory]]:
    """For every pipeline rank what `plan` says and what the dry run says; `more` does not change the empty stages."""
    plan, stages, kept = empty(*model)
    config = configuration.load(BASE, [*model, *more])
    found = predicted(config, plan, kept)
    return [(one, stages.predict(config, rank)) for rank, one in enumerate(found)]


def predicted(config: Config, plan: ModelPlan, kept: ActivationBytes) -> list[RankBytes]:
    train = config.train
    return memory.predict(
        plan.objective,
        plan.stages,
        plan.costs,
        kept,
        memory.state_bytes(train.dtype, config.optimizer.name, versions=1),
        micro_batches=train.micro_batches_per_update // config.parallel.data,
        micro_batch_tokens=train.micro_batch_size * config.data.sequence_length,
        chunk_tokens=config.head.chunk_tokens,
        zero_stage=zero_stage(config),
        replicas=config.parallel.data,
        in_flight=config.parallel.in_flight,
        head_blocks=config.head.blocks,
        token_fraction=config.head.token_fraction,
    )


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["states", "activations"])
@pytest.mark.parametrize(("dtype", "zero"), [*(("fp32", z) for z in range(4)), *(("bf16", z) for z in (1, 2, 3))])
def test_plan_and_dry_run_count_the_same(
    dtype: str, zero: int, sizes: tuple[str, ...], ranks: int, replicas: int
) -> None:
    """Weights, optimizer and messages equal; the peak, with gradients and ZeRO's buckets in it, within 5 percent."""
    model = (*sizes, f"train.dtype={dtype}", f"parallel.pipeline={ranks}")
    more = (f"deepspeed.zero_optimization.stage={zero}", f"parallel.data={replicas}")
    for ours, exact in both(model, more):
        assert (ours.weights, ours.optimizer) == pytest.approx((exact.weights, exact.optimizer), rel=1e-6)
        assert (ours.messages, ours.held) == (exact.messages, exact.held)
        assert ours.total == pytest.approx(exact.peak, rel=0.05)
        assert ours.total == pytest.approx(
            ours.weights
            + ours.gradients
            + ours.optimizer
            + ours.copies
            + ours.messages
            + ours.activations
            + ours.logits
        )


OBJECTIVES = {
    "backprop, 4 ranks": ("objective.name=backprop", "parallel.pipeline=4", "model.family=gpt2"),
    "overlapping": ("objective.name=overlapping", "objective.chunks=4", "parallel.pipeline=2"),
    "delayed": ("objective.name=delayed", "parallel.pipeline=2"),
    "hybrid": ("objective.backprop_every=2", "parallel.pipeline=2"),
    "extra blocks, a part of the tokens": ("head.blocks=1", "head.token_fraction=0.25", "parallel.pipeline=2"),
    "SGD": ("optimizer.name=sgd",),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_plan_and_dry_run_count_the_same_for_every_objective(case: str) -> None:
    for ours, exact in both((*LARGE, *OBJECTIVES[case])):
        assert ours.held == exact.held
        assert ours.total == pytest.approx(exact.peak, rel=0.06)


# ---------------------------------------------------------------------------------------------------------- by hand

H, BLOCKS, T = 64, 8, 32
COSTS = model_costs(12 * H * H, H, V, T, embedding_parameters=V * H, norm_parameters=2 * H)
KEPT = ActivationBytes(1e6, 1e4, 2 * T * H * 4, 64 * V * 16, 4)
OPTIONS: dict[str, Any] = {"chunks": 4, "overlap": 1, "own_weight": 0.5, "first_head": False, "trained_blocks": 3}


def ranks_of(name: str, micro_batches: int = 8, ranks: int = 4, **more: Any) -> list[RankBytes]:
    goal = objective.build(BLOCKS, name, **OPTIONS)
    stages = cut(goal, ranks, COSTS)
    states = memory.state_bytes("fp32", versions=1)
    return memory.predict(
        goal,
        stages,
        COSTS,
        KEPT,
        states,
        micro_batches=micro_batches,
        micro_batch_tokens=2 * T,
        chunk_tokens=64,
        **more,
    )


def test_1f1b_keeps_as_many_passes_as_there_are_ranks_above_and_local_updates_one() -> None:
    for name, held in (("backprop", [4, 3, 2, 1]), ("chunked", [1, 1, 1, 1]), ("overlapping", [2, 2, 2, 1])):
        found = ranks_of(name)
        assert [rank.held for rank in found] == held
        assert all(rank.activations >= rank.held * 1e6 for rank in found)


def test_zero_divides_what_it_divides() -> None:
    w = 4 * (2 * 12 * H * H + V * H + V * H + 2 * H)  # embedding, two blocks, head
    parts = []
    for zero in range(4):
        (rank, *_) = ranks_of("chunked", zero_stage=zero, replicas=4)
        parts.append((rank.weights, rank.optimizer))
    # From ZeRO 1 on there is a copy of the own share of the weights, in fp32 too.
    assert parts == [(w, 2 * w), (w, 3 * w / 4), (w, 3 * w / 4), (w / 4, 3 * w / 4)]


def test_only_delayed_gradients_keep_a_second_version() -> None:
    delayed, plain = ranks_of("delayed"), ranks_of("chunked")
    assert [rank.optimizer / rank.weights for rank in delayed] == pytest.approx([3.0] * 4)
    assert [rank.optimizer / rank.weights for rank in plain] == pytest.approx([2.0] * 4)
    assert memory.state_bytes("fp32", versions=1).optimizer == 8


@pytest.mark.parametrize("name", ["backprop", "chunked", "overlapping", "deep_supervision", "last", "delayed"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 40), (3, 40), (8, 40), (8, 3)])
def test_what_repeats_is_counted_once(
    name: str, ranks: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut to a few micro-batches, and to ranks that differ, it says what all of them would."""
    short = ranks_of(name, micro_batches, ranks)
    monkeypatch.setattr(memory, "_furthest", lambda *_: micro_batches)
    monkeypatch.setattr(memory, "_signature", lambda *_: object())
    for one, whole in zip(short, ranks_of(name, micro_batches, ranks), strict=True):
        assert one.held == whole.held
        assert one.total == pytest.approx(whole.total, abs=footprint.TOKEN_BYTES * 2 * T * micro_batches)
        assert one.total >= whole.total


def test_somebody_else_s_program_by_hand() -> None:
    states, options = memory.state_bytes("bf16"), {"kept": 5e6, "logits": 1e6, "messages": 1e3, "gathered": 7e4}

    def of(zero: int, replicas: int = 4, kept: float = 5e6) -> float:
        how = states.precision(zero, replicas, fused_step=True)
        return memory.of_others(1000, 500, how, **{**options, "kept": kept})

    assert of(1) == 2000 + 2000 + 250 * 12 + 1e3 + 6e6 + 2000  # weights, gradients, their bucket; the rest divided
    assert of(3) == 500 + 500 + 250 * 12 + 1e3 + 6e6 + 2000 + 7e4
    # Nothing kept: the step decides, with gradients in fp32 and a temporary of every own weight, and at ZeRO 1 the
    # gradients of the own share once more.
    options["logits"] = 0.0
    assert of(1, kept=0.0) == 2000 + 2000 + 250 * 12 + 1e3 + 250 * 4 + 250 * 4 + 500
