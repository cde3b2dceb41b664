"""Real launchers, real signals, the README's commands: everything here starts programs, so it is slow."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.metrics_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timing]
ROOT = Path(__file__).parents[2]
SMALL = ["--data.sequence_length=32", "--model.hidden_size=32", "--train.micro_batch_size=2", "--data.valid=null"]
EXIT_KEYS = {"stage", "last_block", "nll_per_token", "perplexity", "bits_per_byte", "word_perplexity", "tokens"}
SMALL += ["--train.eval_every=0", "--train.warmup_steps=2"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files beside the environment that runs the tests."""
    copy = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    # An environment of its own to look at, whose parts are those of this one; the scripts find it installed.
    (copy / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "installed":
            (copy / ".venv" / part.name).symlink_to(part)
    wanted = b"".join((copy / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    (copy / ".venv" / "installed").write_text(hashlib.sha256(wanted).hexdigest() + "\n")
    return copy


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    keep = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return {**keep, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def run(checkout: Path, *command: str, timeout: float = 300, **more: str) -> str:
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, timeout=timeout, env=environment(**more)
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def losses(folder: Path) -> list[list[float]]:
    return [[stage["loss"] for stage in r["stages"]] for r in read_metrics(folder) if "stages" in r]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for stage in checkpoint.stage_folders(folder, checkpoint.latest(folder)):
        found |= {f"{stage.name}/{name}": tensor for name, tensor in checkpoint.read_weights(stage).items()}
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


@pytest.mark.parametrize(("pipeline", "zero_stage"), [(1, 0), (2, 0), (2, 2)])
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


DOCUMENTS = ("README.md", "docs/launching.md", "docs/runs.md")  # each goes on with what those before it have made


def readme_blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def test_the_readme_s_commands(checkout: Path) -> None:
    """Every command in the shell blocks of the README and of the pages behind it runs, in order, as it stands there."""
    blocks = [block for document in DOCUMENTS for block in readme_blocks("bash", document)]
    commands = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(commands) == len(set(commands)), "each is in one document"
    elsewhere = {"bash launch/quickstart.sh", "bash launch/test.sh"}  # the test below; the tests themselves
    assert elsewhere < set(commands)
    for command in commands:
        if command in elsewhere:
            continue
        if "multinode" in command:  # test_two_nodes runs the script; here is a node that no other joins
            assert re.fullmatch(r"NODE_RANK=0 bash launch/multinode.sh launch/hostfile.example \S+", command)
            continue
        out = run(checkout, "bash", "-c", f"set -eu; source .venv/bin/activate; {command}", timeout=400)
        if "--json" in command:
            assert [set(one) for one in json.loads(out)["exits"]] == [EXIT_KEYS, EXIT_KEYS]


def test_no_other_page_has_commands_that_nobody_runs() -> None:
    """Blocks of the pages that explain how to use the program; measurements take hours."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        name = str(page.relative_to(ROOT))
        if name not in (*DOCUMENTS, "docs/log.md"):
            for block in readme_blocks("bash", name):
                assert not re.search(r"^(python -m lptransformer|lptransformer|deepspeed|torchrun) ", block, re.M), name


def test_the_readme_s_python_example(checkout: Path) -> None:
    """In one process, and the same lines under torchrun in two."""
    (code,) = readme_blocks("python")
    assert len(code.strip().splitlines()) <= 15
    (checkout / "script.py").write_text(code)
    out = run(checkout, sys.executable, "script.py", "--parallel.pipeline=1", "--train.steps=20")
    assert out.count("exit of stage") == 2
    folder = checkout / "runs" / "python"
    assert checkpoint.latest(folder) == 20
    out = run(checkout, sys.executable, "-m", "lptransformer", "evaluate", "runs/python", "--json")
    assert len(json.loads(out)["exits"]) == 2
    shutil.rmtree(folder)
    out = run(checkout, "torchrun", "--nproc-per-node", "2", "script.py", "--train.steps=20")
    assert checkpoint.latest(folder) == 20 and len(checkpoint.stage_folders(folder, 20)) == 2
    assert {f"exit of stage {stage}" for stage in (0, 1)} <= set(re.findall(r"exit of stage \d", out))


def test_the_quick_start_keeps_its_promise(checkout: Path) -> None:
    """The time, the distance to the unigram model and the bigram model, and the perplexity that the README names."""
    started = time.monotonic()
    out = run(checkout, "bash", "launch/quickstart.sh", timeout=900)
    seconds = time.monotonic() - started
    rows = re.findall(r"^(exit after block \d+|unigram|bigram)\D*?(\d+\.\d+)", out, re.M)
    nats = {name: float(value) for name, value in rows}
    last = nats["exit after block 3"]
    assert last < nats["unigram"] - 1.0 and last < nats["bigram"], out
    promised = float(re.search(r"perplexity\s+below (\d+)", (ROOT / "README.md").read_text())[1])  # type: ignore[index]
    perplexity = float(re.search(r"^exit after block 3 +\S+ +(\S+)", out, re.M)[1])  # type: ignore[index]
    assert perplexity < promised
    assert seconds < 240, f"{seconds:.0f} s"
