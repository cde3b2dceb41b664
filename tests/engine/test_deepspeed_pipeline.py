"""`engine: deepspeed_pipeline`: the same run on DeepSpeed's own PipelineEngine.

It equals the plain loop of reference.py with one span over all blocks, and the local engine's `objective: backprop`,
and its run folders are those of any run. With gradients accumulated over a power of two of micro-batches and clipping
off even the bits are equal: DeepSpeed divides the loss where we scale it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from baseline_jobs import (
    BASELINE,
    CLIP,
    LOSS_TOLERANCE,
    NO_CLIP,
    ONE_SPAN,
    OPTIMIZERS,
    SGD,
    Outcome,
    open_baseline,
    train,
)
from distributed import Pool
from engine_jobs import Trained, load_config
from engine_jobs import train as train_locally
from parity import expected, largest_difference
from tiers import slow
from torch import Tensor

from lptransformer.config import load as configuration
from lptransformer.config.resume import resume_differences
from lptransformer.engine.p2p import Control
from lptransformer.errors import ConfigError, RunError, TrainingError
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training.this_host import check_devices

UPDATES = 20


def lose_a_neighbour(overrides: Sequence[str]) -> tuple[str, float]:
    engine = open_baseline(overrides)
    engine.train_batch()
    if engine.world.pipeline_rank == 1:
        os._exit(9)
    started = time.monotonic()
    try:
        engine.train_batch()
    except TrainingError as error:
        message = str(error)
        (Path(os.environ["SEEN"]) / "message.txt").write_text(message)
        return message, time.monotonic() - started
    return "", 0.0


def start(pool: Pool, overrides: Sequence[str], updates: int, **options: Any) -> list[Outcome]:
    parallel = load_config((*overrides, *BASELINE)).parallel
    return pool.run(parallel.pipeline * parallel.data, call_train, tuple(overrides), updates, options)


def call_train(overrides: tuple[str, ...], updates: int, options: dict[str, Any]) -> Outcome:
    return train(overrides, updates, **options)


# --------------------------------------------------------------------------------------------- what came of them


def losses(outcomes: Sequence[Outcome]) -> list[float]:
    """Nats per label token of every update."""
    assert not any(one.error for one in outcomes)
    assert all(report.loss_sum is None for one in outcomes if not one.plan.is_last for report in one.reports)
    last = [one.reports for one in outcomes if one.plan.is_last]  # of every replica
    return [sum(r.loss_sum or 0.0 for r in of) / sum(r.label_tokens for r in of) for of in zip(*last, strict=True)]


def named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under their names in the whole GPT-2."""
    names = {"body.": "transformer.", "head.norm.": "transformer.ln_f.", "head.readout.": "lm_head."}
    return {name.replace(a, b): w for name, w in weights.items() for a, b in names.items() if name.startswith(a)}


def weights(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """All weights; replicas must agree."""
    found: dict[str, Tensor] = {}
    for one in outcomes:
        for name, weight in named(one.weights).items():
            assert torch.equal(found.setdefault(name, weight), weight), f"replicas disagree on {name}"
    return found


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_close(ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= tolerance, worst


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


# --------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    ("pipeline", "optimizer"),
    [slow(1, "sgd"), slow(1, "adamw"), slow(2, "sgd"), (2, "adamw"), slow(4, "sgd"), slow(4, "adamw")],
)
def test_it_equals_the_plain_loop(pool: Pool, pipeline: int, optimizer: str) -> None:
    overrides = (*OPTIMIZERS[optimizer], *NO_CLIP)
    wanted = expected((*overrides, *ONE_SPAN), UPDATES)
    got = start(pool, (*overrides, f"parallel.pipeline={pipeline}"), UPDATES)
    assert [one.plan.pipeline_rank for one in got] == list(range(pipeline))
    assert_close(losses(got), [loss for (loss,) in wanted.losses], LOSS_TOLERANCE[optimizer])
    assert losses(got) == [loss for (loss,) in wanted.losses]
    assert equal(weights(got), wanted.weights)


def test_two_replicas_of_two_ranks_equal_the_plain_loop(pool: Pool) -> None:
    wanted = expected((*SGD, *NO_CLIP, *ONE_SPAN), UPDATES, replicas=2)
    got = start(pool, (*SGD, *NO_CLIP, "parallel.pipeline=2", "parallel.data=2"), UPDATES)
    assert [(one.plan.pipeline_rank, one.data_rank) for one in got] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert losses(got) == [loss for (loss,) in wanted.losses]
    assert equal(weights(got), wanted.weights)


@pytest.mark.slow
def test_micro_batches_that_are_no_power_of_two(pool: Pool) -> None:
    """A division by 3 rounds; at a learning rate of 0.5 Llama diverges and makes any rounding large."""
    overrides = (*SGD, *NO_CLIP, "train.micro_batches_per_update=3", "model.family=llama", "train.learning_rate=0.1")
    wanted = expected((*overrides, *ONE_SPAN), UPDATES)
    got = start(pool, (*overrides, "parallel.pipeline=2"), UPDATES)
    assert_close(losses(got), [loss for (loss,) in wanted.losses], LOSS_TOLERANCE["sgd"])


@pytest.mark.parametrize(("stage", "replicas"), [(0, 1), (1, 1), slow(1, 2)])
def test_it_clips_by_the_norm_of_the_whole_model(pool: Pool, stage: int, replicas: int) -> None:
    """The formulas differ by roundings. DeepSpeed left alone takes the norm over pipeline rank 0 at ZeRO 0."""
    wanted = expected((*SGD, *CLIP, *ONE_SPAN), UPDATES, replicas=replicas)
    assert min(norm for (norm,) in wanted.grad_norms) > 0.25, "clipping is active"
    parallel = ("parallel.pipeline=2", f"parallel.data={replicas}", zero(stage))
    got = start(pool, (*SGD, *CLIP, *parallel), UPDATES)
    for one in got:
        assert_close([r.grad_norm or 0.0 for r in one.reports], [norm for (norm,) in wanted.grad_norms], 1e-6)
    assert_close(losses(got), [loss for (loss,) in wanted.losses], 1e-6)
    assert max(largest_difference(weight, wanted.weights[name]) for name, weight in weights(got).items()) < 1e-5


@pytest.mark.parametrize("optimizer", ["sgd", slow("adamw")])
def test_one_changed_line_is_the_local_engine(pool: Pool, optimizer: str) -> None:
    """`engine: local` with `objective.name: backprop`, on the same two pipeline ranks with a given partition, and
    after a baseline in the same processes."""
    overrides = (*OPTIMIZERS[optimizer], *NO_CLIP, "parallel.pipeline=2", "parallel.partition=[5,3]")
    ours = start(pool, overrides, UPDATES)
    theirs: list[Trained] = pool.run(2, train_locally, (*overrides, "objective.name=backprop"), UPDATES)
    assert [(one.plan.first_block, one.plan.last_block) for one in ours] == [(0, 4), (5, 7)]
    last = theirs[1].reports[1]
    local = [(report.loss_sum or 0.0) / report.label_tokens for report in last]
    assert_close(losses(ours), local, LOSS_TOLERANCE[optimizer])
    assert [r.learning_rate for r in ours[1].reports] == [r.learning_rate for r in last]
    local_weights = {k: w for one in theirs for i in one.plans for k, w in named(one.weights[i]).items()}
    assert equal(weights(ours), local_weights)


@pytest.mark.slow
def test_bf16(pool: Pool) -> None:
    """ZeRO 1 with fp32 masters, as everywhere."""
    overrides = (*CLIP, "train.dtype=bf16")
    ours = start(pool, (*overrides, "parallel.pipeline=2"), UPDATES)
    (theirs,) = pool.run(1, train_locally, (*overrides, "objective.name=backprop"), UPDATES)
    local = [(report.loss_sum or 0.0) / report.label_tokens for report in theirs.reports[0]]
    assert_close(losses(ours), local, 1e-3)
    assert all(weight.dtype == torch.bfloat16 for one in ours for weight in one.weights.values())


# --------------------------------------------------------------------------------------------- evaluation, checkpoints


@pytest.mark.parametrize("parallel", [slow(("parallel.pipeline=2",)), ("parallel.pipeline=2", "parallel.data=2")])
def test_evaluation_counts_every_window_once_and_changes_nothing(pool: Pool, parallel: tuple[str, ...]) -> None:
    """Three micro-batches: two replicas take two each, one of them without labels."""
    overrides = (*SGD, *NO_CLIP, *parallel)
    plain, interrupted = start(pool, overrides, 3), start(pool, overrides, 3, evaluate_before=2)
    assert losses(plain) == losses(interrupted) and equal(weights(plain), weights(interrupted))
    last = [one for one in plain if one.plan.is_last]
    assert sum(tokens for one in last for tokens in one.evaluation[1:]) == 78
    (alone,) = start(pool, (*SGD, *NO_CLIP), 3)
    total = sum(one.evaluation[0] or 0.0 for one in last)
    assert alone.evaluation[1] == 78 and total == pytest.approx(alone.evaluation[0], rel=1e-6)
    assert all(one.evaluation[0] is None for one in plain if not one.plan.is_last)


@pytest.mark.parametrize(
    ("stage", "dtype", "parallel"),
    [
        (0, "fp32", ("parallel.pipeline=2",)),
        (1, "fp32", ("parallel.pipeline=2",)),
        slow(1, "bf16", ("parallel.pipeline=2",)),
        slow(1, "fp32", ("parallel.pipeline=2", "parallel.data=2")),
    ],
)
def test_a_resumed_run_is_the_same_run(
    pool: Pool, tmp_path: Path, stage: int, dtype: str, parallel: tuple[str, ...]
) -> None:
    overrides = (*CLIP, zero(stage), f"train.dtype={dtype}", *parallel)
    whole = start(pool, overrides, 6)
    before = start(pool, overrides, 3, save=tmp_path)
    assert checkpoint.latest(tmp_path) == 3
    after = start(pool, overrides, 3, load=tmp_path)
    assert losses(before) + losses(after) == losses(whole)
    assert [r.update for one in after for r in one.reports] == [4, 5, 6] * len(after)
    assert [r.learning_rate for r in after[0].reports] == [r.learning_rate for r in whole[0].reports[3:]]
    assert equal(weights(after), weights(whole))


@pytest.mark.slow
def test_a_resumed_run_follows_the_learning_rate_that_is_given(pool: Pool, tmp_path: Path) -> None:
    """Before the end of its warm-up nobody sees the run's length, nor clipping at a norm that no gradient has."""
    before = (BASELINE[1], "deepspeed.zero_optimization.stage=1", "train.warmup_steps=3", "train.grad_clip=1000")
    after = (*before, "train.lr_scheduler=linear", "train.steps=30", "train.grad_clip=900")
    start(pool, before, 3, save=tmp_path)
    whole, resumed = start(pool, after, 6), start(pool, after, 3, load=tmp_path)
    assert [r.learning_rate for r in resumed[0].reports] == [r.learning_rate for r in whole[0].reports[3:]]
    assert equal(weights(resumed), weights(whole))


TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune.\n" * 60


def run_config(folder: Path, **train_keys: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    return {
        "engine": "deepspeed_pipeline",
        "model": {"hidden_size": 16, "num_layers": 3, "num_heads": 2},
        "data": {
            **dict.fromkeys(("train", "valid"), str(folder / "text.txt")),
            **{"tokenizer": "bytes", "sequence_length": 16, "cache": str(folder / "cache")},
        },
        "objective": {"name": "backprop"},
        "parallel": {"pipeline": 2},
        "train": {"steps": 4, "micro_batch_size": 2, "micro_batches_per_update": 2, "eval_every": 2, **train_keys},
        "run": {"dir": str(folder / "run")},
    }


def train_run(raw: dict[str, Any], resume: bool, until: int | None = None) -> None:
    from lptransformer.training.train import train as train_as_configured

    train_as_configured(configuration.load(raw), resume, until=until)


def save_locally(overrides: tuple[str, ...], folder: Path) -> None:
    train_locally(overrides, 1, save=folder)


def test_its_run_folder_is_that_of_any_run(pool: Pool, tmp_path: Path) -> None:
    """Trained by the story in training/train.py; evaluated and exported without DeepSpeed."""
    from transformers import AutoModelForCausalLM

    from lptransformer.evaluation import trained_model
    from lptransformer.evaluation.export import export_run
    from lptransformer.evaluation.perplexity import evaluate_run

    raw, run = run_config(tmp_path), tmp_path / "run"
    pool.run(2, train_run, raw, False)
    rows = read_metrics(run)
    updates = [row for row in rows if "stages" in row]
    assert [row["update"] for row in updates] == [1, 2, 3, 4]
    assert [[stage["loss"] is None for stage in row["stages"]] for row in updates] == [[True, False]] * 4
    evaluations = {row["update"]: row["exits"] for row in rows if "evaluation" in row}
    assert list(evaluations) == [2, 4]
    (seen,) = evaluations[4]
    (exit_,) = evaluate_run(run)["exits"]
    assert exit_["last_block"] == seen["last_block"] == 2 and exit_["tokens"] == seen["tokens"]
    assert exit_["nll_per_token"] == pytest.approx(seen["nll_per_token"], rel=1e-6)
    export_run(run, tmp_path / "model")
    ids = torch.arange(97, 113)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
    assert torch.equal(logits, trained_model.load(run, 4).logits(ids))


@pytest.mark.slow
def test_train_stops_and_resumes_it(pool: Pool, tmp_path: Path) -> None:
    raw = run_config(tmp_path)
    pool.run(2, train_run, raw, False)
    parts = {**raw, "run": {"dir": str(tmp_path / "parts")}}
    pool.run(2, train_run, parts, False, 2)
    assert checkpoint.complete_updates(tmp_path / "parts") == [2]
    pool.run(2, train_run, parts, True)
    whole, resumed = ([r for r in read_metrics(tmp_path / name) if "stages" in r] for name in ("run", "parts"))
    assert [r["stages"][1]["loss"] for r in resumed] == [r["stages"][1]["loss"] for r in whole]
    both = [[saved_stage.read_weights(f) for f in saved_stage.folders(tmp_path / n, 4)] for n in ("run", "parts")]
    assert all(equal(one, other) for one, other in zip(*both, strict=True))


def test_it_resumes_its_own_checkpoints_only(pool: Pool, tmp_path: Path) -> None:
    overrides = ("parallel.pipeline=2", BASELINE[1])
    pool.run(2, save_locally, overrides, tmp_path)
    with pytest.raises(RunError, match="was not written by engine: deepspeed_pipeline"):
        start(pool, overrides, 1, load=tmp_path)


# --------------------------------------------------------------------------------------------- control, failures


def test_all_processes_do_the_same_after_an_update(pool: Pool) -> None:
    """Pipeline rank 0 asks, and any process that gets a signal; what else other ranks ask for is not heard."""
    requests = [(0, 1, Control.EVALUATE, False), (1, 2, Control.SAVE, False), (1, 3, Control.NOTHING, True)]
    got = start(pool, (*NO_CLIP, "parallel.pipeline=2"), 3, requests=requests)
    assert [one.controls for one in got] == [[Control.EVALUATE, 0, Control.SAVE | Control.STOP]] * 2


def test_idle_time_is_what_ranks_wait_for_each_other(pool: Pool) -> None:
    (alone,) = start(pool, NO_CLIP, 2)
    assert all(report.idle_seconds == 0 for report in alone.reports)
    got = start(pool, (*CLIP, "parallel.pipeline=2"), 3, sleep=(1, 0.1))
    first, last = (sum(report.idle_seconds for report in one.reports) for one in got)
    assert first > 3 * 4 * 0.1 * 0.9 and last < first / 2
    assert all(0 <= r.idle_seconds <= r.seconds for one in got for r in one.reports)


def test_a_loss_that_is_not_finite_ends_the_run_on_all_ranks(pool: Pool) -> None:
    overrides = (*NO_CLIP, "parallel.pipeline=2", "train.max_skipped_updates=2")
    got = start(pool, overrides, 6, infinite_from=3)
    assert all("2 updates in a row" in one.error and "update 4" in one.error for one in got)
    assert [len(one.reports) for one in got] == [3, 3]


def test_a_neighbour_that_dies_is_named_at_once(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died"):
        pool.run(2, lose_a_neighbour, ("parallel.pipeline=2",), timeout=30, env={"SEEN": str(tmp_path)})
    assert "another process of this run has gone" in (tmp_path / "message.txt").read_text()


# --------------------------------------------------------------------------------------------- configuration

DATA = {"data": {"train": "books/*.txt"}}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("objective.name=chunked",), ["objective.name = 'chunked'", "backprop"]),
        (("objective.name=greedy",), ["objective.name = 'greedy'", "backprop"]),
        (("objective.name=delayed",), ["objective.name = 'delayed'", "backprop"]),
        ((BASELINE[1], zero(2)), ["deepspeed.zero_optimization.stage = 2", "0 and 1"]),
        ((BASELINE[1], zero(3)), ["deepspeed.zero_optimization.stage = 3"]),
        ((BASELINE[1], "train.dtype=fp64"), ["train.dtype = 'fp64'", "bf16"]),
        ((BASELINE[1], "deepspeed.wall_clock_breakdown=true"), ["wall_clock_breakdown", "steps_per_print"]),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        configuration.load(DATA, [BASELINE[0], *overrides])
    for part in ("engine = 'deepspeed_pipeline' (on the command line)", *parts):
        assert part in str(error.value)


def test_the_key_engine(tmp_path: Path) -> None:
    assert configuration.load(DATA).engine == configuration.load({**DATA, "engine": None}).engine == "local"
    config = configuration.load({**DATA, "engine": "deepspeed_pipeline", "objective": {"name": "backprop"}})
    (tmp_path / "again.yaml").write_text(configuration.to_yaml(config))
    again = configuration.load(tmp_path / "again.yaml")
    assert again.engine == config.engine == "deepspeed_pipeline"
    local = configuration.load(tmp_path / "again.yaml", ["--engine=local"])
    (line,) = resume_differences(configuration.to_dict(again), configuration.to_dict(local))
    assert line.startswith("engine: 'deepspeed_pipeline' in the run, 'local' now")


@pytest.mark.parametrize(
    ("source", "overrides", "parts"),
    [
        ({"engine": "deepspeed"}, (), ["engine = 'deepspeed' (in the given mapping)", "deepspeed_pipeline?"]),
        ({"engine": {"name": "local"}}, (), ["engine = {'name': 'local'}", "local, deepspeed_pipeline"]),
        ({}, ("engine.name=local",), ["unknown key engine.name (on the command line)", "did you mean engine?"]),
        ({"engin": "local"}, (), ["unknown key engin (in the given mapping)", "did you mean engine?"]),
    ],
)
def test_a_wrong_engine(source: dict[str, Any], overrides: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        configuration.load({**DATA, **source}, overrides)
    for part in parts:
        assert part in str(error.value)


def test_processes_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices("gloo", 1, "local", 2)
    with pytest.raises(ConfigError, match="engine is deepspeed_pipeline and 2 processes share 1 GPUs"):
        check_devices("gloo", 1, "deepspeed_pipeline", 2)
    with pytest.raises(ConfigError, match="parallel.channel is nccl and 2 processes share 1 GPUs"):
        check_devices("nccl", 1, "local", 2)


# --------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow
def test_a_signal_stops_it_and_it_resumes(tmp_path: Path) -> None:
    """SIGTERM reaches processes that wait for each other in the middle of an update."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_config(tmp_path, steps=100, eval_every=0)))
    command = [sys.executable, "-m", "lptransformer", "train", str(tmp_path / "c.yaml")]
    subprocess.run([*command, f"--run.dir={tmp_path / 'whole'}"], check=True, capture_output=True, timeout=300)
    parts = tmp_path / "parts"
    command.append(f"--run.dir={parts}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (parts / "metrics.jsonl").exists() or len((parts / "metrics.jsonl").read_text().splitlines()) < 8:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 3, "stopped before its end, and saved"
    assert 8 <= checkpoint.latest(parts) < 100
    subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=300)
    whole, resumed = ([s for r in read_metrics(f) for s in r.get("stages", [])] for f in (tmp_path / "whole", parts))
    assert len(whole) == 200 and [s["loss"] for s in whole] == [s["loss"] for s in resumed]


@pytest.mark.full  # each starts the other engine too (training/test_launchers)
def test_all_launchers_start_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_config(tmp_path)))
    bin_, launch = Path(sys.executable).parent, Path(__file__).parents[2] / "launch" / "train.py"
    script = [str(launch), "--config", str(tmp_path / "c.yaml")]
    commands = {
        "a": [sys.executable, "-m", "lptransformer", "train", str(tmp_path / "c.yaml")],
        "b": [str(bin_ / "torchrun"), "--nproc-per-node", "2", "--master-port", "29873", *script],
        "c": [str(bin_ / "deepspeed"), "--num_gpus", "2", "--master_port", "29874", *script],
    }
    environment = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    seen = []
    for name, command in commands.items():
        done = subprocess.run(
            [*command, f"--run.dir={tmp_path / name}"],
            capture_output=True, text=True, timeout=300, env=environment, cwd=launch.parent.parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        seen.append([[s["loss"] for s in r["stages"]] for r in read_metrics(tmp_path / name) if "stages" in r])
    assert len(seen[0]) == 4 and seen[0] == seen[1] == seen[2]
