"""What a run takes in memory: predicted from empty stages, against the real engine, against `plan`, and by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import log_allocations
from measured_rank import peak_bytes
from random_tokens import RandomTokens

from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.methods.gradient_flow import duties
from lptransformer.methods.heads import FittedOptions
from lptransformer.methods.objectives import Objective, backprop, chunked
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.models.head import LossBatch
from lptransformer.models.stage import make_stage
from lptransformer.planning import rank_memory
from lptransformer.planning.dry_run import dry_run, predicted
from lptransformer.planning.plan import make
from lptransformer.planning.rank_memory import PassBytes
from lptransformer.planning.stage_memory import EmptyStages
from lptransformer.planning.stage_state import Precision, StageState, StageTensors, precision, stage_state

BASE: dict[str, Any] = {
    "model": {"family": "llama", "hidden_size": 32, "num_layers": 4, "num_heads": 4},
    "data": {"train": "unused", "sequence_length": 32},
    "train": {"micro_batch_size": 4, "micro_batches_per_update": 4},
}
V = 300


def loaded(*overrides: str) -> tuple[Config, Blueprint]:
    config = load(BASE, overrides)
    return config, make_blueprint(config, V, None)


# ---------------------------------------------------------------------------------------------- the real engine

FROZEN = ("train.freeze=[model.embed_tokens.*, '*.mlp.*', lm_head.weight]", "model.hidden_size=64")
UPPER_FROZEN = ("train.freeze=['model.layers.[23].*', model.norm.*, lm_head.*]", "objective.name=backprop")
EXACT = {
    "llama, chunked": (),
    "gpt2, chunked, 2 ranks": ("model.family=gpt2", "parallel.pipeline=2"),
    "gpt2, backprop, 4 ranks": ("model.family=gpt2", "objective.name=backprop", "parallel.pipeline=4"),
    "llama, frozen": FROZEN,
    "llama, recomputed": ("model.num_layers=6", "train.activation_checkpointing=blocks"),
    "llama, one micro-batch": ("objective.chunks=4", "train.micro_batches_per_update=1"),
}
SELECTIVE = ("objective.chunks=4", "train.activation_checkpointing=selective")
ZERO = "deepspeed.zero_optimization"
SMALL_BUCKET = (f"{ZERO}.reduce_bucket_size=20000",)
WIDE = ("model.hidden_size=256", "data.sequence_length=16", "train.micro_batch_size=1")
OFFLOADED = f"{ZERO}.offload_optimizer.device=cpu"
EXACT_TOO = {
    "overlapping": ("objective.name=overlapping", "objective.chunks=4", "parallel.pipeline=2"),
    "delayed": ("objective.name=delayed", "parallel.pipeline=2"),
    "hybrid": ("objective.backprop_every=2", "parallel.pipeline=2"),
    "last": ("objective.name=last", "parallel.pipeline=2"),
    "shared readouts": ("objective.chunks=4", "head.kind=shared", "parallel.pipeline=2"),
    "averaged blocks": ("head.blocks=1", "head.ema_decay=0.9", "parallel.pipeline=2"),
    "low rank, a part of the tokens": ("head.kind=low_rank", "head.rank=8", "head.token_fraction=0.25"),
    "SGD": ("optimizer.name=sgd",),
    **{f"Muon, ZeRO {stage}": ("optimizer.name=muon", f"{ZERO}.stage={stage}", *SMALL_BUCKET) for stage in (0, 1, 2)},
    "Muon, wide": ("optimizer.name=muon", *WIDE, "head.kind=low_rank", "head.rank=8"),
    **{
        f"frozen, ZeRO {stage}": (*FROZEN, f"{ZERO}.stage={stage}", f"{ZERO}.reduce_bucket_size=20000")
        for stage in (1, 2, 3)
    },
    **{
        f"offloaded, {dtype}, ZeRO {stage}": (f"train.dtype={dtype}", f"{ZERO}.stage={stage}", OFFLOADED)
        for dtype, stage in (("bf16", 1), ("fp32", 2), ("bf16", 2), ("fp32", 3))
    },
    "recomputed, overlapping": ("objective.name=overlapping", "parallel.pipeline=2", *SELECTIVE),
    "recomputed, delayed": ("objective.name=delayed", "parallel.pipeline=2", "train.activation_checkpointing=every 2"),
    "delayed, bf16": ("objective.name=delayed", "parallel.pipeline=2", "train.dtype=bf16"),
    "recomputed, ZeRO 3": ("head.blocks=1", f"{ZERO}.stage=3", "train.activation_checkpointing=blocks"),
    "frozen, gradients through": (*UPPER_FROZEN, "parallel.pipeline=2"),
    **{
        f"{dtype}, ZeRO {stage}": (f"train.dtype={dtype}", f"{ZERO}.stage={stage}", f"{ZERO}.reduce_bucket_size=20000")
        for dtype, stage in itertools.product(("fp32", "bf16"), (1, 2, 3))
    },
    "ZeRO 3, much weight": (
        f"{ZERO}.stage=3",
        *WIDE,
    ),
}


def check_against_the_engine(overrides: tuple[str, ...], within: float = 0.01) -> None:
    config, plan = loaded(*overrides)
    for rank, memory in enumerate(predicted(config, plan)):
        assert memory.peak == pytest.approx(peak_bytes(config, plan, rank), rel=within)


@pytest.mark.parametrize("case", EXACT)
def test_predicted_bytes_are_those_of_the_engine(case: str) -> None:
    check_against_the_engine(EXACT[case])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 2])
def test_predicted_bytes_of_fitted_heads_are_those_of_the_engine(blocks: int) -> None:
    """Three heads, in one process and in two: what is frozen is there once in each."""
    for ranks in (1, 2):
        config, _ = loaded("objective.chunks=4", f"parallel.pipeline={ranks}")
        config.head = FittedOptions(kind="fitted", blocks=blocks)  # which a configuration takes of a trained model only
        plan = make_blueprint(config, V, None)
        found = predicted(config, plan)
        for rank, memory in enumerate(found):
            assert memory.peak == pytest.approx(peak_bytes(config, plan, rank), rel=0.01)
        counted = sum(EmptyStages(plan).tensors(stage).buffer_bytes for stage in plan.stages)
        assert sum(memory.copies for memory in found) < counted
        assert predicted(config, plan, alike=True) == found


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT_TOO)
def test_predicted_bytes_are_those_of_the_engine_for_every_objective_and_head(case: str) -> None:
    # At ZeRO 3 all weights count as gathered at once; those that are frozen or computed with again are not.
    check_against_the_engine(EXACT_TOO[case], 0.06 if case in ("frozen, ZeRO 3", "recomputed, ZeRO 3") else 0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pass_of_an_empty_stage_takes_what_a_real_one_takes(family: str) -> None:
    config, plan = loaded(f"model.family={family}")
    stage, duty = plan.stages[1], duties(plan.objective.usual, plan.stages)[1]
    found = EmptyStages(plan).passes(stage, duty, 4)
    real = make_stage(stage, plan, seed=0)
    hidden, labels = torch.randn(4, 32, 32), RandomTokens(4, 32, V).batch(0).labels
    with log_allocations() as log:
        for _ in range(2):
            log.mark("forward")
            output = real(hidden, LossBatch(labels, 1.0))
            log.mark("backward")
            output.loss.backward()
            del output
    kept = log.alive(1) - log.alive(0) - hidden.nbytes
    later = log.peak(3) - log.alive(3)
    measured = (log.peak(0, 1), kept, log.peak(1, 2) - log.alive(1), later)
    assert (found.forward, found.kept, found.first_backward, found.backward) == pytest.approx(measured, abs=256)


# -------------------------------------------------------------------------------------- what `plan` says of the same

DEEP = ("model.num_layers=12", "train.micro_batches_per_update=16")
SMALL = (*DEEP, "data.sequence_length=16", "train.micro_batch_size=1", "model.hidden_size=128")
SAME = {
    "chunked, 2 replicas, ZeRO 2": (*DEEP, "parallel.data=2", f"{ZERO}.stage=2", f"{ZERO}.reduce_bucket_size=9000"),
    "bf16, ZeRO 1": (*DEEP, "train.dtype=bf16", "parallel.pipeline=2"),
    "bf16, ZeRO 3": (*SMALL, "train.dtype=bf16", "parallel.data=2", f"{ZERO}.stage=3"),
    "backprop, 3 ranks": (*DEEP, "model.family=gpt2", "objective.name=backprop", "parallel.pipeline=3"),
    "overlapping": (*DEEP, "objective.name=overlapping", "objective.chunks=3", "parallel.pipeline=3"),
    "delayed": (*DEEP, "objective.name=delayed", "parallel.pipeline=2"),
    "last": (*DEEP, "objective.name=last", "objective.trained_blocks=5"),
    "frozen": (*DEEP, *FROZEN, "objective.name=backprop", "parallel.pipeline=3"),
    "hybrid, extra blocks": (*DEEP, "objective.backprop_every=2", "head.blocks=1", "head.token_fraction=0.25"),
    "shared readouts": (*SMALL, "objective.chunks=3", "head.kind=shared", "parallel.pipeline=3"),
    "averaged blocks": (*SMALL, "objective.chunks=3", "head.blocks=2", "head.ema_decay=0.9", "parallel.pipeline=3"),
}


QUICK = ("delayed", "averaged blocks")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in SAME]
)
def test_plan_and_dry_run_agree_to_the_byte(case: str) -> None:
    """Stages of 4 to 12 blocks, of which `plan` counts three."""
    config, plan = loaded(*SAME[case])
    processes = config.parallel.pipeline * config.parallel.data
    configured = make(config, gpus_per_node=processes, vocab_size=V).configured
    assert configured is not None
    assert [row.memory for row in configured.ranks] == predicted(config, plan)


RECOMPUTED = {
    "blocks": ("model.num_layers=5", "objective.chunks=1"),
    "selective": ("model.num_layers=8", "head.blocks=2"),
    "every 2": ("model.num_layers=7", "objective.chunks=1"),
    "every 3": ("model.num_layers=16", "objective.name=overlapping"),
}


@pytest.mark.parametrize(
    "how", [*(how if how == "every 2" else pytest.param(how, marks=pytest.mark.slow) for how in RECOMPUTED)]
)
def test_recomputed_blocks_are_counted_by_what_repeats(how: str) -> None:
    """As many as repeat, between the first and the last; and less is kept than without."""
    overrides = (*RECOMPUTED[how], "data.sequence_length=16", "model.hidden_size=16")
    config, plan = loaded(*overrides, f"train.activation_checkpointing={how}")
    found = predicted(config, plan)
    assert predicted(config, plan, alike=True) == found
    for rank, kept in zip(found, predicted(*loaded(*overrides)), strict=True):
        assert rank.activations < kept.activations


# ---------------------------------------------------------------------------------------------- arithmetic, by hand


def two_stages(ranks: int) -> list[StagePlan]:
    return [
        StagePlan(0, 0, 0, 0, ranks == 1, True, False, True),
        StagePlan(1, 1, 1, ranks - 1, True, False, True, True),
    ]


FP32 = precision("fp32")
STAGE = StageTensors(trained=True, weights=250, largest=10, decaying=250, buffer_bytes=0)  # 1000 bytes
PASS = PassBytes(forward=130, kept=100, first_backward=1010, backward=40)
STAYS = 1000 + 2000  # weights and their two moments


def test_local_updates_hold_one_pass_and_backprop_as_many_as_there_are_ranks_above() -> None:
    sizes: dict[str, Any] = {"rounds": 4, "micro_batch_tokens": 1, "hidden_bytes": 7, "in_flight": 2}
    both = [STAGE, STAGE], [[PASS, PASS]], FP32
    (local,) = rank_memory.predict(Objective(2, chunked(2, 2)), two_stages(1), *both, **sizes)
    # In the upper stage: gradients of both, its pass with what comes in and goes out, four batches of ids and labels.
    assert local.peak == 2 * STAYS + 2000 + (7 + 7 + 100 + 40) + 4 * 16
    assert (local.held, local.messages) == (1, 0)
    low, high = rank_memory.predict(Objective(2, backprop(2)), two_stages(2), *both, **sizes)
    # Two passes with their outputs, and the gradient that has come down for one of them.
    assert low.peak == STAYS + 1000 + 2 * (100 + 7) + 7 + 40 + 4 * 16 + low.messages
    assert (low.held, high.held) == (2, 1)
    assert (low.messages, high.messages) == (7 * (1 + 2), 7 * (2 + 1))


def test_with_one_micro_batch_no_stage_has_the_gradients_of_those_above() -> None:
    sizes: dict[str, Any] = {"rounds": 1, "micro_batch_tokens": 0, "hidden_bytes": 0, "in_flight": 2}
    big = PassBytes(forward=5000, kept=4900, first_backward=1100, backward=200)
    objective = Objective(2, chunked(2, 2))
    (found,) = rank_memory.predict(objective, two_stages(1), [STAGE, STAGE], [[big, PASS]], FP32, **sizes)
    assert found.peak == 2 * STAYS + 4900 + 1100
    assert (found.gradients, found.activations) == (2000, 5000)


@pytest.mark.parametrize("name", ["backprop", "chunked", "overlapping", "deep_supervision", "last", "delayed"])
@pytest.mark.parametrize(("ranks", "rounds"), [(1, 40), (3, 40), (8, 40), (8, 3)])
def test_what_repeats_is_counted_once(name: str, ranks: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to a few micro-batches it says what all of them would."""
    chunks = "" if name in ("backprop", "last") else "objective.chunks=4"
    options = ["model.num_layers=8", f"objective.name={name}", f"parallel.pipeline={ranks}", chunks]
    _, plan = loaded(*filter(None, options))
    passes = [[PASS] * len(plan.stages) for _ in plan.objective.phases]
    sizes: dict[str, Any] = {"rounds": rounds, "micro_batch_tokens": 3, "hidden_bytes": 7, "in_flight": 2}
    known = plan.objective, plan.stages, [STAGE] * len(plan.stages), passes, FP32
    short = rank_memory.predict(*known, **sizes)
    monkeypatch.setattr(rank_memory, "_furthest", lambda *_: rounds)
    assert short == rank_memory.predict(*known, **sizes)


def test_zero_divides_what_it_divides() -> None:
    stage = StageTensors(trained=True, weights=1000, largest=400, decaying=900, buffer_bytes=8)

    def how(zero_stage: int) -> Precision:
        return Precision(2, 4, 2, 2, 2, bucket=50, zero_stage=zero_stage, replicas=2)

    def of(zero_stage: int) -> StageState:
        return stage_state(stage, how(zero_stage))

    assert (of(1).weights, of(1).gradients, of(1).optimizer) == (2000, 2000, 500 * 12)
    assert (of(2).weights, of(2).gradients, of(2).optimizer) == (2000, 1000, 500 * 12)
    assert (of(3).weights, of(3).gradients, of(3).optimizer) == (1000, 1000, 500 * 12)
    assert {of(zero).bucket for zero in (1, 2, 3)} == {100}
    plain, delayed = stage_state(stage, FP32), stage_state(stage, FP32, delayed=True)
    assert (plain.weights, plain.gradients, plain.optimizer, plain.step) == (4000, 4000, 8000, 3200)
    assert delayed.optimizer == 8000 + 4000, "a second version of the weights"
    assert stage_state(stage, how(2), delayed=True).optimizer == 500 * 12 + 2000, "whole on every replica"
    muon = replace(how(2), on_gpu=True, fused_temporaries=0, muon=True)
    with_matrices = replace(stage, matrices=300, largest_matrix=20)
    assert stage_state(with_matrices, muon).step == 20 * 10 + 500 * 4, "one matrix at a time"
    frozen = stage_state(StageTensors(False, 1000, 400, 900, 0), FP32)
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (4000, 0, 0)


def test_on_a_gpu_an_offloaded_optimizer_is_in_the_host_s_memory() -> None:
    stage = StageTensors(trained=True, weights=1000, largest=400, decaying=900, buffer_bytes=8)

    def of(zero_stage: int, dtype: str = "bf16") -> StageState:
        options = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
        how = precision(dtype, None, options, zero_stage=zero_stage, replicas=2, on_gpu=True)
        return stage_state(stage, how)

    # fp32 weights, their gradients and moments; the copy that new weights come from; what DeepSpeed copies through
    assert of(1).host == of(2).host == 500 * 16 + 500 * 2 + 400 * 2
    assert (of(1).gradients, of(2).gradients, of(3).gradients) == (2000, 500 * 4, 0)
    assert of(3).host == 500 * 16 + 500 * 4, "gradients of micro-batches are added up there"
    assert of(2, "fp32").host == 500 * 16 + 2 * 500 * 4 + 400 * 4 and of(2, "fp32").gradients == 0
    assert (of(2).optimizer, of(3).optimizer, of(2).step) == (400 * 2, 0, 0)


def test_plan_says_what_the_host_has_to_have() -> None:
    config, _ = loaded(f"{ZERO}.stage=2", OFFLOADED)
    plan = make(config, gpu="h100", vocab_size=V)
    assert plan.configured is not None and plan.configured.ranks[0].memory.host > 0
    assert any("offload_optimizer = {'device': 'cpu'}" in one and "host's memory" in one for one in plan.remarks)
    assert not any("host's memory" in one for one in make(config, vocab_size=V).remarks), "all is the host's there"


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("engine", ["local", "deepspeed_pipeline"])
def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    """Of DeepSpeed's own pipeline no memory is predicted."""
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged.\n")
    data = {"train": str(text), "tokenizer": "bytes", "sequence_length": 32, "cache": str(tmp_path / "prepared")}
    overrides = ["parallel.pipeline=2", "objective.name=backprop", f"engine={engine}"]
    dry_run(load({**BASE, "data": data, "run": {"dir": str(tmp_path / "run")}}, overrides))
    said = capsys.readouterr().out
    assert "FLOPs" in said and "the model's own" in said
    assert ("predicted memory" in said) == (engine == "local")
    assert ("engine = 'deepspeed_pipeline' (on the command line): the memory of DeepSpeed's own" in said) == (
        engine != "local"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
