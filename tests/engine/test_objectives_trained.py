"""Every objective in the engine, over any number of processes, equals its plain definition in reference.py.

In float64 losses, gradient norms and all weights agree to 1e-10 after several updates with active clipping, which
holds the algebra of pulls, weights and flows; in fp32 bit for bit where sums have one order.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from distributed import Pool
from engine_jobs import Tamper, load_config, open_engine, train
from parity import compare, expected, gather, phases_of
from tiers import full, slow

from lptransformer.engine.p2p import Control
from lptransformer.errors import TrainingError
from lptransformer.methods.stages import StagePlan

UPDATES = 4
SGD = ("optimizer.name=sgd", "optimizer.momentum=0.9", "train.learning_rate=0.5")
CHUNKED = ("objective.chunks=4",)
OVERLAPPING = ("objective.name=overlapping", "objective.chunks=4")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "backprop": ("objective.name=backprop",),
    "overlapping": OVERLAPPING,
    "overlapping, first head": (*OVERLAPPING, "objective.first_head=true"),
    "overlapping, furthest loss": (*OVERLAPPING, "objective.own_weight=0"),
    "overlapping, own loss": (*OVERLAPPING, "objective.own_weight=1", "objective.first_head=true"),
    "overlapping by 2": (*OVERLAPPING, "objective.overlap=2", "objective.own_weight=0.3"),
    "overlapping by 2, first head": (*OVERLAPPING, "objective.overlap=2", "objective.first_head=true"),
    "last": ("objective.name=last", "objective.trained_blocks=3"),
    "deep supervision": ("objective.name=deep_supervision", "objective.chunks=4"),
    "hybrid chunked": ("objective.name=chunked", "objective.chunks=4", "objective.backprop_every=2"),
    "hybrid greedy at the end": ("objective.name=greedy", "objective.backprop_share=0.8"),
    "hybrid overlapping": (*OVERLAPPING, "objective.backprop_every=3"),
    "delayed": ("objective.name=delayed", "objective.chunks=1"),
}


def run(pool: Pool, overrides: tuple[str, ...], updates: int) -> reference.Result:
    """What the engine gives, under the reference's names."""
    config = load_config(overrides)
    return gather(
        pool.run(config.parallel.pipeline * config.parallel.data, train, overrides, updates), config.head.kind
    )


@pytest.mark.parametrize("pipeline", [slow(1), slow(2), 4])
@pytest.mark.parametrize("objective", [slow(one) if one == "backprop" else one for one in OBJECTIVES])
def test_the_algebra_of_every_objective(pool: Pool, objective: str, pipeline: int) -> None:
    overrides = (*OBJECTIVES[objective], *SGD, "train.dtype=fp64", "train.grad_clip=0.05")
    wanted = expected(overrides, UPDATES)
    assert min(norm for norms in wanted.grad_norms for norm in norms) > load_config(overrides).train.grad_clip
    compare(run(pool, (*overrides, f"parallel.pipeline={pipeline}"), UPDATES), wanted, tolerance=1e-10)


HEADS: dict[str, tuple[str, ...]] = {
    "private": (),
    "shared": ("head.kind=shared", "head.refresh_every=2"),
    "low rank": ("head.kind=low_rank", "head.rank=8"),
    "extra blocks": ("head.blocks=1",),
    "a part of the tokens": ("head.token_fraction=0.3",),
    "blocks that follow the next ones": ("head.blocks=2", "head.ema_decay=0.7"),
    "all at once": ("head.kind=shared", "head.blocks=1", "head.ema_decay=0.5", "head.token_fraction=0.5"),
}


def head_cases() -> list[Any]:
    """Head, objective, pipeline ranks."""
    found = []
    for case in product(HEADS, ("chunked", "overlapping"), (1, 2, 4)):
        head, *placed = case
        if placed == ["chunked", 4]:
            found.append(case)
        else:
            every_head = placed in (["chunked", 1], ["overlapping", 2])
            found.append(slow(*case) if every_head or head == "all at once" else full(*case))
    return found


@pytest.mark.parametrize(("head", "objective", "pipeline"), head_cases())
def test_the_algebra_of_every_head(pool: Pool, head: str, objective: str, pipeline: int) -> None:
    """Seven updates: read-only copies come two updates late at their first refresh."""
    settings = (f"objective.name={objective}", "objective.chunks=4", *HEADS[head])
    overrides = (*settings, *SGD, "train.dtype=fp64", "train.grad_clip=0.005")
    wanted = expected(overrides, 7)
    assert min(norm for norms in wanted.grad_norms for norm in norms) > load_config(overrides).train.grad_clip
    compare(run(pool, (*overrides, f"parallel.pipeline={pipeline}"), 7), wanted, tolerance=1e-10)


# --------------------------------------------------------------------------------------------- bit for bit

ONE_ORDER: dict[str, tuple[str, ...]] = {
    "backprop": OBJECTIVES["backprop"],
    "last": OBJECTIVES["last"],
    "delayed": OBJECTIVES["delayed"],
    "hybrid chunked": OBJECTIVES["hybrid chunked"],
    "low rank": (*CHUNKED, *HEADS["low rank"]),
    "extra blocks": (*CHUNKED, *HEADS["extra blocks"]),
    "a part of the tokens": (*CHUNKED, *HEADS["a part of the tokens"]),
    "blocks that follow the next ones": (*CHUNKED, *HEADS["blocks that follow the next ones"]),
    "bf16 from chunk to chunk": (*CHUNKED, "border.codec=bf16"),
    "int8 from chunk to chunk": (*CHUNKED, "border.codec=int8"),
}


@pytest.mark.parametrize("pipeline", [slow(1), 4])
@pytest.mark.parametrize("case", ONE_ORDER)
def test_bit_for_bit_where_sums_have_one_order(pool: Pool, case: str, pipeline: int) -> None:
    """fp32, AdamW, accumulation, active clipping."""
    overrides = (*ONE_ORDER[case], "model.family=llama", "train.grad_clip=0.005")
    wanted = expected(overrides, UPDATES)
    assert min(norm for norms in wanted.grad_norms for norm in norms) > load_config(overrides).train.grad_clip
    compare(run(pool, (*overrides, f"parallel.pipeline={pipeline}"), UPDATES), wanted)


SAME: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "overlapping by 0 is chunked": ((*OVERLAPPING, "objective.overlap=0", "objective.first_head=true"), CHUNKED),
    "greedy is chunked into blocks": (("objective.name=greedy",), ("objective.chunks=8",)),
    "hybrid with every update global is backprop": (
        (*CHUNKED, "objective.backprop_every=1"),
        ("objective.name=backprop",),
    ),
    "hybrid for all of the run is backprop": ((*CHUNKED, "objective.backprop_share=1"), ("objective.name=backprop",)),
    "chunked into one is backprop": (("objective.chunks=1",), ("objective.name=backprop",)),
    "supervision of one head is backprop": (
        ("objective.name=deep_supervision", "objective.chunks=1"),
        ("objective.name=backprop",),
    ),
    "all blocks are the last ones": (
        ("objective.name=last", "objective.trained_blocks=8"),
        ("objective.name=backprop",),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_two_names_of_one_thing_give_the_same_bits(pool: Pool, case: str) -> None:
    first, second = (run(pool, (*overrides, "parallel.pipeline=2"), UPDATES) for overrides in SAME[case])
    compare(first, second)


@pytest.mark.parametrize("stage", [1, slow(2)])
@pytest.mark.parametrize(
    "objective", ["overlapping", slow("hybrid chunked"), slow("deep supervision"), "last", "delayed"]
)
def test_zero_1_and_2_where_borders_carry_gradients(pool: Pool, objective: str, stage: int) -> None:
    """Against ZeRO 0 with the same two replicas, without clipping: sums of two replicas have one order."""
    overrides = (*OBJECTIVES[objective], *SGD, "train.grad_clip=0", "parallel.pipeline=2", "parallel.data=2")
    partitioned = run(pool, (*overrides, f"deepspeed.zero_optimization.stage={stage}"), UPDATES)
    compare(partitioned, run(pool, overrides, UPDATES), tolerance=2e-6)


@pytest.mark.parametrize("stage", [slow(1), slow(2), 3])
@pytest.mark.parametrize("head", ["shared", slow("blocks that follow the next ones")])
def test_copies_with_two_replicas_where_zero_holds_the_weights(pool: Pool, head: str, stage: int) -> None:
    """Against ZeRO 0 with the same replicas, without clipping; seven updates, so that copies were refreshed."""
    overrides = (*CHUNKED, *HEADS[head], *SGD, "train.grad_clip=0", "parallel.pipeline=2", "parallel.data=2")
    partitioned = run(pool, (*overrides, f"deepspeed.zero_optimization.stage={stage}"), 7)
    compare(partitioned, run(pool, overrides, 7), tolerance=2e-6)


def test_delayed_gradients_of_two_replicas(pool: Pool) -> None:
    overrides = (*OBJECTIVES["delayed"], "train.grad_clip=0.05", "parallel.data=2")
    wanted = expected(overrides, UPDATES, replicas=2)
    compare(run(pool, (*overrides, "parallel.pipeline=2"), UPDATES), wanted)


@pytest.mark.parametrize("case", ["delayed", "all at once"])
def test_evaluating_and_saving_in_between_change_nothing(pool: Pool, tmp_path: Path, case: str) -> None:
    """The pipeline drains for it where gradients are delayed, and waits for copies on their way."""
    overrides = (*RESUMED[case], "parallel.pipeline=2")
    plain = pool.run(2, train, overrides, 6)
    disturbed = pool.run(2, partial(train, every_update=tmp_path), overrides, 6)
    for one, other in zip(plain, disturbed, strict=True):
        for index, weights in one.weights.items():
            assert [r.loss_sum for r in one.reports[index]] == [r.loss_sum for r in other.reports[index]]
            assert all(torch.equal(tensor, other.weights[index][name]) for name, tensor in weights.items())


def test_an_evaluation_that_delayed_gradients_were_not_told_of_is_refused(pool: Pool) -> None:
    overrides = (*OBJECTIVES["delayed"], "parallel.pipeline=2")
    below, _ = pool.run(2, evaluate_unasked, overrides)
    assert "engine.request(Control.EVALUATE)" in below


def evaluate_unasked(overrides: tuple[str, ...]) -> str:
    """An evaluation on pipeline rank 0 behind an update that nothing was asked to follow."""
    engine = open_engine(overrides)
    engine.train_batch()
    said = ""
    if engine.world.pipeline_rank == 0:
        try:
            engine.eval_batch("valid")
        except TrainingError as error:
            said = str(error)
    engine.request(Control.STOP)
    engine.train_batch()
    engine.close()
    return said


@pytest.mark.parametrize("objective", ["overlapping", "hybrid chunked", "delayed"])
def test_bf16_does_not_depend_on_the_placement(pool: Pool, objective: str) -> None:
    overrides = (*OBJECTIVES[objective], "train.dtype=bf16", "train.grad_clip=1")
    together, apart = (run(pool, (*overrides, f"parallel.pipeline={ranks}"), UPDATES) for ranks in (1, 2))
    assert {tensor.dtype for tensor in together.weights.values()} == {torch.bfloat16}
    compare(apart, together, tolerance=0.0 if objective == "overlapping" else 1e-2)


# --------------------------------------------------------------------------------------------- the gradient law


def slow_unless(name: str) -> object:
    quick = ("backprop", "overlapping", "overlapping by 2", "last", "deep supervision", "hybrid chunked")
    return name if name in quick else slow(name)


@pytest.mark.parametrize("pipeline", [slow(1), 2])
@pytest.mark.parametrize("objective", [slow_unless(name) for name in OBJECTIVES if "delayed" not in name])
def test_a_head_moves_the_blocks_of_its_span_and_no_others(pool: Pool, objective: str, pipeline: int) -> None:
    """SGD, no clipping, other labels for one head in one update: what its span trains changes, all else is the same
    bit for bit. In hybrid runs the second update, a global one, is looked at too."""
    overrides = (*OBJECTIVES[objective], *SGD, "train.grad_clip=0", "train.warmup_steps=0")
    config = load_config(overrides)
    overrides += (f"parallel.pipeline={pipeline}",)
    every = config.value("objective.backprop_every")
    updates = every or 1
    phase = phases_of(config)[1 if every else 0]
    plain = pool.run(pipeline, train, overrides, updates)
    before = {name: tensor for one in plain for weights in one.weights.values() for name, tensor in weights.items()}
    assert before
    heads = [plan for one in plain for plan in one.plans.values() if plan.has_head]
    for head in heads:
        tamper = Tamper(head.index, "other labels", updates=(updates,))
        changed = pool.run(pipeline, partial(train, tamper=tamper), overrides, updates)
        span = next(span for span in phase.spans if span[1] == head.last_block)
        for one, other in zip(plain, changed, strict=True):
            for index, weights in one.weights.items():
                plan = one.plans[index]
                moved = {name for name in weights if not torch.equal(weights[name], other.weights[index][name])}
                expected_here = {name for name in weights if is_moved(name, plan, head, span, phase)}
                assert moved == expected_here, f"head after block {head.last_block}, stage {index}"


def is_moved(name: str, plan: StagePlan, head: StagePlan, span: tuple[int, int], phase: reference.Phase) -> bool:
    """Whether a tensor of a stage is moved by the loss of a head with this span."""
    if name.startswith("head."):
        return plan.index == head.index
    block = re.match(r"body\.h\.(\d+)\.", name)
    number = int(block[1]) if block else 0  # the embedding goes with the first block
    return span[0] <= number <= span[1] and phase.weight(span, number) > 0


# --------------------------------------------------------------------------------------------- resume


RESUMED = {
    "overlapping": OBJECTIVES["overlapping"],
    "hybrid chunked": OBJECTIVES["hybrid chunked"],
    "delayed": OBJECTIVES["delayed"],
    "delayed, bf16": (*OBJECTIVES["delayed"], "train.dtype=bf16"),
    "last": OBJECTIVES["last"],
    "shared": (*CHUNKED, *HEADS["shared"]),
    "all at once": (*CHUNKED, *HEADS["all at once"]),
}


@pytest.mark.parametrize("pipeline", [slow(1), 2])
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_where_it_was_saved(pool: Pool, tmp_path: Path, case: str, pipeline: int) -> None:
    """Ten updates equal five, saving, loading and five more: with weights of one update before, and versions of
    read-only copies that were on their way."""
    overrides = (*RESUMED[case], f"parallel.pipeline={pipeline}")
    whole = pool.run(pipeline, train, overrides, 10)
    pool.run(pipeline, partial(train, save=tmp_path), overrides, 5)
    rest = pool.run(pipeline, partial(train, load=tmp_path), overrides, 5)
    for one, other in zip(whole, rest, strict=True):
        for index, weights in one.weights.items():
            assert [r.loss_sum for r in one.reports[index][5:]] == [r.loss_sum for r in other.reports[index]]
            for name, tensor in weights.items():
                assert torch.equal(tensor, other.weights[index][name]), name
