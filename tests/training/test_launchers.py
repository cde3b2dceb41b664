"""Real launchers, real signals: everything here starts programs, so it is slow."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from own_checkout import environment, make_checkout, run
from tiers import full

from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics_log import read_metrics

pytestmark = pytest.mark.slow
SMALL = ["--data.sequence_length=32", "--model.hidden_size=32", "--train.micro_batch_size=2", "--data.valid=null"]
SMALL += ["--train.eval_every=0", "--train.warmup_steps=2"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("checkout"))


def losses(folder: Path) -> list[list[float]]:
    return [[stage["loss"] for stage in r["stages"]] for r in read_metrics(folder) if "stages" in r]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for stage in saved_stage.folders(folder, checkpoint.latest(folder)):
        found |= {f"{stage.name}/{name}": tensor for name, tensor in saved_stage.read_weights(stage).items()}
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_all_launchers_give_the_same_run(checkout: Path) -> None:
    """`deepspeed`, `torchrun` and the command line, on the quick start's configuration: the same bits."""
    options = ["--train.steps=20", *SMALL]
    config = ["--config", "configs/quickstart.yaml", *options]
    run(checkout, "deepspeed", "--num_gpus", "2", "launch/train.py", *config, "--run.dir=runs/a")
    run(checkout, "torchrun", "--nproc-per-node", "2", "launch/train.py", *config, "--run.dir=runs/b")
    command = ["-m", "lptransformer", "train", "configs/quickstart.yaml", *options]
    run(checkout, sys.executable, *command, "--run.dir=runs/c")
    folders = [checkout / "runs" / name for name in "abc"]
    assert len(losses(folders[0])) == 20
    assert losses(folders[0]) == losses(folders[1]) == losses(folders[2])
    assert equal(weights(folders[0]), weights(folders[1])) and equal(weights(folders[0]), weights(folders[2]))


def test_two_nodes(checkout: Path) -> None:
    """multinode.sh on two "nodes" that are this machine, one process each."""
    (checkout / "hosts").write_text("# two names of this machine\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = ["bash", "launch/multinode.sh", "hosts", "configs/quickstart.yaml", "--train.steps=5", *SMALL]
    command.append("--run.dir=runs/nodes")
    with subprocess.Popen(
        command, cwd=checkout, env=environment(NODE_RANK="1", MASTER_PORT="29871"), stdout=subprocess.DEVNULL
    ) as second:
        run(checkout, *command, NODE_RANK="0", MASTER_PORT="29871")
        assert second.wait(60) == 0
    assert len(losses(checkout / "runs" / "nodes")) == 5


@pytest.mark.parametrize(("pipeline", "zero_stage"), [(1, 0), full(2, 0), (2, 2)])
def test_stopped_by_a_signal_and_resumed_it_is_the_same_run(checkout: Path, pipeline: int, zero_stage: int) -> None:
    """Acceptance of resume: SIGTERM in the middle, then --resume, against a run that was left alone."""
    options = [*SMALL, "--train.steps=60", f"--parallel.pipeline={pipeline}", "--train.micro_batches_per_update=4"]
    options.append(f"--deepspeed.zero_optimization.stage={zero_stage}")
    base = [sys.executable, "-m", "lptransformer", "train", "configs/quickstart.yaml", *options]
    whole, parts = (checkout / "runs" / f"{name}-{pipeline}-{zero_stage}" for name in ("whole", "parts"))
    run(checkout, *base, f"--run.dir={whole}")
    process = subprocess.Popen([*base, f"--run.dir={parts}"], cwd=checkout, env=environment())
    deadline = time.monotonic() + 120
    while not (parts / "metrics.jsonl").exists() or len((parts / "metrics.jsonl").read_text().splitlines()) < 8:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 3, "stopped before its end, and saved"
    stopped = checkpoint.latest(parts)
    assert 8 <= stopped < 60, "it was not stopped in the middle"
    assert len(losses(parts)) == stopped
    run(checkout, *base, f"--run.dir={parts}", "--resume")
    assert losses(parts) == losses(whole)
    assert equal(weights(parts), weights(whole))
