"""What a run takes in memory: predicted from empty stages, against the real engine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lptransformer import config as configuration
from lptransformer import footprint
from lptransformer.__main__ import parser
from lptransformer.allocations import recorded
from lptransformer.build import plan_model
from lptransformer.dry_run import dry_run
from lptransformer.empty_model import EmptyModel
from lptransformer.footprint import PassBytes, Precision, StageState, StageTensors, stage_state
from lptransformer.gradients import duties
from lptransformer.launcher import run
from lptransformer.mock_run import RandomTokens, as_one_replica, peak_bytes
from lptransformer.objective import Objective, backprop, chunked
from lptransformer.partition import StagePlan
from lptransformer.passes import empty_stage, of_stage
from lptransformer.stage import make_stage

BASE: dict[str, Any] = {
    "model": {"family": "llama", "hidden_size": 32, "num_layers": 4, "num_heads": 4},
    "data": {"train": "unused", "sequence_length": 32},
    "train": {"micro_batch_size": 4, "micro_batches_per_update": 4},
}


def compare(*overrides: str) -> list[tuple[int, int]]:
    """(predicted, measured) peak of every pipeline rank, in a mock run."""
    config = configuration.load(BASE, overrides)
    plan = plan_model(config, 300, None)
    one = as_one_replica(config)
    model = EmptyModel(config, plan)
    ranks = range(config.parallel.pipeline)
    return [(model.predict(one, rank, updates=1).peak, peak_bytes(one, plan, rank)) for rank in ranks]


CASES = {
    "llama, chunked": (),
    "gpt2, chunked, 2 ranks": ("model.family=gpt2", "parallel.pipeline=2"),
    "gpt2, backprop, 4 ranks": ("model.family=gpt2", "objective.name=backprop", "parallel.pipeline=4"),
    "llama, one micro-batch": ("objective.chunks=4", "train.micro_batches_per_update=1"),
}
MORE = {
    "overlapping": ("objective.name=overlapping", "objective.chunks=4", "parallel.pipeline=2"),
    "delayed": ("objective.name=delayed", "parallel.pipeline=2"),
    "hybrid": ("objective.backprop_every=2", "parallel.pipeline=2"),
    "last": ("objective.name=last", "parallel.pipeline=2"),
    "shared readouts": ("objective.chunks=4", "head.kind=shared", "parallel.pipeline=2"),
    "averaged blocks": ("head.blocks=1", "head.ema_decay=0.9", "parallel.pipeline=2"),
    "low rank, a part of the tokens": ("head.kind=low_rank", "head.rank=8", "head.token_fraction=0.25"),
    "SGD": ("optimizer.name=sgd",),
    **{
        f"{dtype}, ZeRO {stage}": (
            f"train.dtype={dtype}",
            f"deepspeed.zero_optimization.stage={stage}",
            "deepspeed.zero_optimization.reduce_bucket_size=20000",
        )
        for dtype, stage in itertools.product(("fp32", "bf16"), (1, 2, 3))
    },
    "ZeRO 3, much weight": (
        "deepspeed.zero_optimization.stage=3",
        "model.hidden_size=256",
        "data.sequence_length=16",
        "train.micro_batch_size=1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_those_of_the_engine(case: str) -> None:
    for predicted, measured in compare(*CASES[case]):
        assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_predicted_bytes_are_within_a_tenth_for_every_objective_and_head(case: str) -> None:
    for predicted, measured in compare(*MORE[case]):
        assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pass_of_an_empty_stage_takes_what_a_real_one_takes(family: str) -> None:
    config = configuration.load(BASE, [f"model.family={family}"])
    plan = plan_model(config, 300, None)
    stage, duty = plan.stages[1], duties(plan.objective.usual, plan.stages)[1]
    sizes = {"micro_batch_size": 4, "sequence_length": 32, "hidden_size": 32, "dtype": torch.float32}
    found = of_stage(empty_stage(stage, plan.config, plan.parts, config.head), duty, **sizes)
    real = make_stage(stage, plan.config, plan.parts, seed=0, head=config.head)
    hidden, labels = torch.randn(4, 32, 32), RandomTokens(4, 32, 300).batch(0).labels
    with recorded() as record:
        for _ in range(2):
            record.mark("forward")
            output = real(hidden, labels, 1.0)
            record.mark("backward")
            output[1].backward()
            del output
    kept = record.alive(1) - record.alive(0) - hidden.nbytes
    later = record.peak(3) - record.alive(3)
    measured = (record.peak(0, 1), kept, record.peak(1, 2) - record.alive(1), later)
    assert (found.forward, found.kept, found.first_backward, found.backward) == pytest.approx(measured, abs=256)


# ------------------------------------------------------------------------------------------ arithmetic, by hand


def two_stages(ranks: int) -> list[StagePlan]:
    return [
        StagePlan(0, 0, 0, 0, ranks == 1, True, False, True),
        StagePlan(1, 1, 1, ranks - 1, True, False, True, True),
    ]


STATE = StageState(weights=10_000, gradients=1000, optimizer=20_000, copies=0, step=5)
PASS = PassBytes(forward=130, kept=100, first_backward=1010, backward=40)


def test_local_updates_hold_one_pass_and_backprop_as_many_as_there_are_ranks_above() -> None:
    sizes: dict[str, Any] = {"rounds": 4, "micro_batch_tokens": 1, "hidden_bytes": 7, "in_flight": 2}
    both = {0: STATE, 1: STATE}
    passes = [{0: PASS, 1: PASS}]
    local = footprint.predict(Objective(2, chunked(2, 2)), two_stages(1), 0, both, passes, **sizes)
    # In the upper stage: gradients of both, its pass with what comes in and goes out, four batches of ids and labels.
    assert local.peak == 60_000 + 2000 + (7 + 7 + 100 + 40) + 4 * 16
    assert (local.held, local.messages) == (1, 0)
    low, high = (
        footprint.predict(Objective(2, backprop(2)), two_stages(2), rank, both, passes, **sizes) for rank in (0, 1)
    )
    # Two passes with their outputs, and the gradient that has come down for one of them.
    assert low.peak == 30_000 + 1000 + 2 * (100 + 7) + 7 + 40 + 4 * 16 + low.messages
    assert (low.held, high.held) == (2, 1)
    assert (low.messages, high.messages) == (7 * (1 + 2), 7 * (2 + 1))


def test_with_one_micro_batch_no_stage_has_the_gradients_of_those_above() -> None:
    sizes: dict[str, Any] = {"rounds": 1, "micro_batch_tokens": 0, "hidden_bytes": 0, "in_flight": 2}
    big = PassBytes(forward=5000, kept=4900, first_backward=1100, backward=200)
    passes = [{0: big, 1: PASS}]
    found = footprint.predict(Objective(2, chunked(2, 2)), two_stages(1), 0, {0: STATE, 1: STATE}, passes, **sizes)
    assert found.peak == 60_000 + 4900 + 1100
    assert (found.gradients, found.activations) == (2000, 5000)


def test_zero_divides_what_it_divides() -> None:
    stage = StageTensors(trained=True, weights=1000, largest=400, decaying=900, copy_bytes=8)

    def of(zero_stage: int, replicas: int = 2) -> StageState:
        how = Precision(2, 2, 4, 2, 2, zero_stage=zero_stage, replicas=replicas, bucket_elements=50)
        return stage_state(stage, how)

    assert (of(1).weights, of(1).gradients, of(1).optimizer) == (2000, 2000, 500 * 12)
    assert (of(2).weights, of(2).gradients, of(2).optimizer) == (2000, 1000, 500 * 12)
    assert (of(3).weights, of(3).gradients, of(3).optimizer) == (1000, 1000, 500 * 12)
    assert {of(zero).bucket for zero in (1, 2, 3)} == {100}
    plain = stage_state(stage, Precision(4, 4, 4, 2, 2))
    assert (plain.weights, plain.gradients, plain.optimizer, plain.step) == (4000, 4000, 8000, 3200)
    frozen = stage_state(StageTensors(False, 1000, 400, 900, 0), Precision(4, 4, 4, 2, 2))
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (4000, 0, 0)


# ------------------------------------------------------------------------------------------ the command


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged.\n")
    data = {"train": str(text), "tokenizer": "bytes", "sequence_length": 32, "cache": str(tmp_path / "prepared")}
    config = configuration.load({**BASE, "data": data, "run": {"dir": str(tmp_path / "run")}}, ["parallel.pipeline=2"])
    dry_run(config, mock_batch=True)
    said = capsys.readouterr().out
    assert "FLOPs" in said and "predicted memory" in said and "measured" in said
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_mock_batch_without_a_dry_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{train: text.txt}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    with pytest.raises(SystemExit) as end:
        run(parser(), ["train", str(tmp_path / "c.yaml"), "--mock-batch"])
    assert end.value.code == 2
    assert "--mock-batch belongs to --dry-run" in capsys.readouterr().err


def test_no_memory_is_predicted_of_deepspeed_s_own_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Some text to have.\n")
    data = {"train": str(tmp_path / "text.txt"), "sequence_length": 32}
    overrides = ["parallel.pipeline=2", "objective.name=backprop"]
    for engine in ("local", "deepspeed_pipeline"):
        config = configuration.load(
            {**BASE, "data": data, "run": {"dir": str(tmp_path / "run")}}, [*overrides, f"engine={engine}"]
        )
        dry_run(config)
        said = capsys.readouterr().out
        assert "FLOPs" in said and "the model's own" in said
        assert ("predicted memory" in said) == (engine == "local")
        assert ("no memory is predicted with engine = 'deepspeed_pipeline'" in said) == (engine != "local")
